"""The whole quickstart: its minutes, its memory, and its speed within a run.

    python benchmarks/whole_quickstart.py

It runs in a folder of its own, below the folder of the results; what set-up takes is not counted.
"""

import json
import statistics

from common import ROOT, Materials, Row, main_of, run

from arithmetic_llm.cli import run_main


def measure(config):
    """Three rows from one run."""
    folder = Materials(config).folder / "quickstart"
    folder.mkdir(parents=True, exist_ok=True)
    ended = run(["quickstart.py", "--recipe", ROOT / "configs" / "cpu"], folder)
    (folder / "output.txt").write_text(ended.out, encoding="utf-8")
    newest = max(folder.glob("models/foundational_*/metrics.jsonl"))
    minutes, kept = ended.seconds / 60, speed_kept(newest)
    return [
        at_most("quickstart, set-up left out", minutes, "min", 12),
        at_most("peak memory of the quickstart", ended.peak_gib, "GiB", 0.8),
        Row("speed in the last tenth of a run over its second", "", "", kept, "x", 0.97),
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


main = main_of("whole_quickstart", measure, __doc__)

if __name__ == "__main__":
    run_main(main)
