"""What GRPO adds to a model that is half right, beside two other uses of the same prompts.

    python benchmarks/what_grpo_adds.py --jobs 2

The start has learned depths 1 to 3; one in a hundred of its instruction problems was of depth 4,
which it gets right about half the time. From there, for each seed, as many steps on the same
prompts of: GRPO; rejection sampling (attempts too, of which only the right ones are learned,
without a baseline); supervised training on the worked solutions. Each command is printed before it
runs, uses one core and writes its output to a log. Everything goes below half/ in the current
folder; what is finished there is not run again.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arithmetic_llm.cli import opt, parse, run_main  # noqa: E402
from arithmetic_llm.runtime import UserError, atomic_write_text  # noqa: E402

CPU, HALF = (shlex.quote((ROOT / "configs" / name).as_posix()) for name in ("cpu", "half"))
NEWEST = "YYYYMMDD_HHMMSS"  # stands for the newest finished run
START = f"half/start/instruction_{NEWEST}/best_model.pt"
FINISHED = "training_summary.json"

# What is there when a command is done, and the command.
CORPORA = (
    (
        "half/everything.txt",  # the tokenizer is the quickstart's, which knows greater depths
        f"generate_foundational_plaintext.py --config {CPU}/foundational_corpus.json "
        "--output-txt half/everything.txt",
    ),
    (
        "half/tokenizer/tokenizer.json",
        "train_tokenizer.py --corpus-path half/everything.txt --output-dir half/tokenizer",
    ),
    (
        "half/foundational.txt",
        f"generate_foundational_plaintext.py --config {CPU}/foundational_corpus.json "
        "--max-depth 3 --output-txt half/foundational.txt",
    ),
    (
        "half/depth_1_to_3.txt",
        f"generate_instruction_corpus_mixed.py --config {CPU}/instruction_corpus.json "
        "--max-depth 3 --output-mixed half/depth_1_to_3.txt",
    ),
    (
        "half/depth_4.txt",
        "generate_instruction_corpus_mixed.py --num-samples 300 --min-depth 4 --max-depth 4 "
        "--invalid-rate 0 --typed-rate 0 --seed 44 --output-mixed half/depth_4.txt",
    ),
)
START_MODELS = (
    (
        f"half/start/foundational_*/{FINISHED}",
        f"run_foundational_training.py --config {CPU}/foundational.json "
        f"--model-config {CPU}/model.json --corpus-path half/foundational.txt "
        "--tokenizer-path half/tokenizer --max-steps 3500 --eval-every 500 --threads 1 "
        "--output-dir half/start",
    ),
    (
        f"half/start/instruction_*/{FINISHED}",
        f"run_instruction_training.py --config {CPU}/instruction.json "
        "--instruction-corpus-path half/instruction.txt --tokenizer-path half/tokenizer "
        f"--foundational-checkpoint half/start/foundational_{NEWEST}/best_model.pt "
        "--max-steps 500 --threads 1 --output-dir half/start",
    ),
)
ARMS = {
    "GRPO": "",
    "rejection_sampling": "--baseline none",
    "supervised": "--learn-from solutions",
}


@dataclass(frozen=True)
class Config:
    """What GRPO adds."""

    seeds: int = opt(3, "runs of each arm", at_least=1)
    jobs: int = opt(1, "runs at a time, each on one core", at_least=1)
    num_samples: int = opt(2000, "test problems, spread over depths 1 to 4", at_least=4)


def main(argv=None):
    config = parse(Config, argv, __doc__)
    for done, command in CORPORA:
        run(command, done)
    parts = ("half/depth_1_to_3.txt", "half/depth_4.txt")
    joined = "".join(Path(part).read_text(encoding="utf-8") for part in parts)
    atomic_write_text("half/instruction.txt", joined)
    for done, command in START_MODELS:
        run(command, done)
    rows = [("start", "", None, evaluation(START, "half/start", config))]
    with ThreadPoolExecutor(config.jobs) as pool:
        runs = [
            pool.submit(arm_of_a_seed, arm, seed, config)
            for seed in range(1, config.seeds + 1)
            for arm in ARMS
        ]
    rows += sorted((r.result() for r in runs if not r.exception()), key=by_arm)
    print("\n" + table(rows))
    for r in runs:
        r.result()  # what failed says so here


def by_arm(row):
    """Rows in the order of ``ARMS``."""
    return [*ARMS].index(row[0])


def arm_of_a_seed(arm, seed, config):
    """Train and evaluate; returns a row of the table."""
    folder = f"half/{arm}_{seed}"
    finished = f"{folder}/grpo_*/{FINISHED}"
    run(
        f"run_grpo_training.py --config {HALF}/grpo.json --tokenizer half/tokenizer "
        f"--sft-checkpoint {START} --seed {seed} --output-dir {folder} {ARMS[arm]}",
        finished,
    )
    metrics = evaluation(f"{folder}/grpo_{NEWEST}/final_model.pt", folder, config)
    return arm, seed, newest(finished)["seconds"], metrics


def evaluation(model, folder, config):
    """The metrics of a model on the test split, measured now unless they have been."""
    results = f"{folder}/results_{config.num_samples}"
    run(
        f"run_evaluation.py --model-path {model} --max-depth 4 --num-samples {config.num_samples} "
        f"--output-dir {results}",
        f"{results}/evaluation_metrics_*.json",
    )
    return newest(f"{results}/evaluation_metrics_*.json")


def newest(pattern):
    """The content of the newest JSON file of a pattern."""
    return json.loads(max(Path().glob(pattern)).read_text(encoding="utf-8"))


def run(command, done):
    """Run a script of the repository on one core, unless ``done`` is there."""
    if [*Path().glob(done)]:
        return
    print(f"$ python {command}", flush=True)
    script, *flags = shlex.split(command)
    log = Path(done.replace("*", "").replace("/", "_")).with_suffix(".log")
    log = Path("half", "logs", log.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:
        ended = subprocess.run(
            [sys.executable, str(ROOT / script), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if ended.returncode:
        raise UserError(f"{script} ended with exit code {ended.returncode}; see {log}")


def table(rows):
    """Markdown: exact match in percent at each depth, and what else there is to say of depth 4."""
    lines = [
        "| run | seed | minutes | depth 1 | 2 | 3 | 4 | 95 % interval | whole trace right |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seed, seconds, metrics in rows:
        minutes = "" if seconds is None else f"{seconds / 60:.1f}"
        depths = metrics["by_depth"]
        matches = " | ".join(f"{row['exact_match_accuracy']:.1f}" for row in depths)
        last = depths[-1]
        interval = f"{last['low']:.1f} to {last['high']:.1f}"
        whole = f"{last['exact_trace_rate']:.1f}"
        lines.append(f"| {name} | {seed} | {minutes} | {matches} | {interval} | {whole} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
