"""The small tools: corpus, tokenizer, --help, and the solver's first token.

python benchmarks/corpus.py
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RECIPE, ROOT, Materials, Row, main_of, run

from arithmetic_llm.cli import run_main
from arithmetic_llm.task.text import STEP

EXPRESSION = "5 + (10 - 3)"


def measure(config):
    """All rows; each is a median of whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            corpus_row(config, Path(folder)),
            tokenizer_row(config, Path(folder)),
            help_row(config),
            first_token_row(config),
        ]


def seconds_row(subject, seconds, bar, **evidence):
    """A row whose bar is an upper limit in seconds."""
    median = statistics.median(seconds)
    facts = {"seconds": seconds, **evidence}
    return Row(subject, f"{median:.3g} s", "", median, "s", bar, at_most=True, evidence=facts)


def corpus_row(config, folder):
    """A foundational corpus of the recipe's kind."""
    samples = config.size(100_000, 200)
    words = ["generate_foundational_plaintext.py", "--num-samples", samples]
    words += [
        "--config",
        RECIPE / "foundational_corpus.json",
        "--output-txt",
        folder / "corpus.txt",
    ]
    turns = min(2, config.repetitions)
    seconds = [run(words).seconds for _ in range(turns)]
    return seconds_row(f"corpus of {samples:,} samples", seconds, 4)


def tokenizer_row(config, folder):
    """The tokenizer of the quickstart's corpus."""
    words = ["train_tokenizer.py", "--config", RECIPE / "tokenizer.json"]
    words += ["--corpus-path", Materials(config).corpus]
    words += ["--output-dir", folder / "tokenizer"]
    seconds = [run(words).seconds for _ in range(config.repetitions)]
    return seconds_row("tokenizer of the quickstart's corpus", seconds, 3)


def help_row(config):
    """``--help`` of the script that takes longest for it."""
    scripts = sorted(path.name for path in ROOT.glob("*.py"))[: config.size(None, 2)]
    seconds = {
        script: [run([script, "--help"]).seconds for _ in range(config.repetitions)]
        for script in scripts
    }
    slowest = max(seconds, key=lambda script: statistics.median(seconds[script]))
    return seconds_row("--help of the slowest script", seconds[slowest], 0.3, script=slowest)


def first_token_row(config):
    """From the start of the solver to the first token that it writes."""
    model = Materials(config).model
    seconds = [first_token(model) for _ in range(config.repetitions)]
    return seconds_row("first token of the solver", seconds, 2)


def first_token(model):
    """Seconds until the first step shows, or the end of a solution without steps."""
    words = [sys.executable, str(ROOT / "run_interactive.py"), "--model-path", str(model)]
    started, text = time.perf_counter(), ""
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as solver:
        solver.stdin.write(f"{EXPRESSION}\nexit\n")
        solver.stdin.flush()
        while f"\n  {STEP}" not in text and (piece := solver.stdout.read(1)):
            text += piece
        seconds = time.perf_counter() - started
        solver.communicate()
    return seconds


main = main_of("corpus", measure, __doc__)

if __name__ == "__main__":
    run_main(main)
