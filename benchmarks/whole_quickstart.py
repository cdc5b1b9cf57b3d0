"""The whole quickstart: its table, its minutes, its memory, and the speed of its training runs.

    python benchmarks/whole_quickstart.py
    python benchmarks/whole_quickstart.py --recipe configs/gpu      on a machine with a GPU

It runs in a folder of its own, below the folder of the results; what set-up takes is not counted.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, BenchConfig, Materials, Row, product_rate, report, run, thousands
from training import matrix_shapes

from arithmetic_llm.cli import opt, parse, run_main
from arithmetic_llm.model.load import load_model

CPU_RECIPE = "configs/cpu"
SUPERVISED = ("foundational", "instruction", "instruction_lora")


@dataclass(frozen=True)
class WholeConfig(BenchConfig):
    """Benchmark."""

    recipe: str = opt(CPU_RECIPE, "folder with the configs of the stages")


def measure(config):
    """The rows of one run; the quickstart's own table is printed before."""
    folder = Materials(config).folder / f"quickstart_{Path(config.recipe).name}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = (ROOT / config.recipe).resolve()
    ended = run(["quickstart.py", "--recipe", recipe, "--processes", 1], folder)
    (folder / "output.txt").write_text(ended.out, encoding="utf-8")
    print(ended.out[ended.out.rindex("\nstage ") :])
    newest = [max(folder.glob(f"models/{stage}_2*")) for stage in SUPERVISED]
    barred = config.recipe == CPU_RECIPE  # the bars are for that one on two cores
    return [
        at_most("quickstart, set-up left out", ended.seconds / 60, "min", 12 if barred else None),
        at_most("peak memory of the quickstart", ended.peak_gib, "GiB", 0.8 if barred else None),
        Row(
            *("speed in the last tenth of a run over its second", "", ""),
            *(speed_kept(newest[0] / "metrics.jsonl"), "x", 0.97),
        ),
        *map(speed_row, newest),
    ]


def at_most(subject, value, unit, bar):
    """A row with an upper limit."""
    return Row(subject, f"{value:.3g} {unit}", "", value, unit, bar, at_most=True)


def speed_kept(metrics):
    """Speed in the last tenth of a run's lines as a share of that in its second tenth."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
    tenth = max(1, len(speeds) // 10)
    second, last = speeds[tenth : 2 * tenth] or speeds, speeds[-tenth:]
    return statistics.harmonic_mean(last) / statistics.harmonic_mean(second)


def speed_row(folder):
    """Tokens a second of a training run, and their share of the device's rate of products.

    Six operations for each weight of a matrix and token, padding included; attention is left out.
    """
    facts, summary = (
        json.loads((folder / name).read_text()) for name in ("run.json", "training_summary.json")
    )
    shapes = matrix_shapes(load_model(folder / "best_model.pt").model)
    done = 6 * sum(m * n for m, n in shapes) * summary["tokens_per_second"]
    limit = product_rate(shapes, 2048, device=facts["device"])
    is_gpu = facts["device"].startswith("cuda")
    name = torch.cuda.get_device_name(facts["device"]) if is_gpu else "the processor"
    subject = f"{summary['stage']}, {summary['seconds']:,.0f} s, share of the product rate"
    peer = f"{name}: {limit / 1e9:,.0f} GFLOP/s"
    return Row(subject, thousands(summary["tokens_per_second"]), peer, done / limit)


def main(argv=None):
    report("whole_quickstart", parse(WholeConfig, argv, __doc__), measure)


if __name__ == "__main__":
    run_main(main)
