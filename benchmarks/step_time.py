"""Where the time of a training step goes: the quickstart's foundational stage, on one thread.

    python benchmarks/step_time.py

By torch's profiler. Each operation counts by what it takes itself, without those it calls; what no
operation takes is Python. The profiler adds to that last part: believe the order.
"""

import contextlib
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

from common import RECIPE, Materials, Row, main_of
from torch.profiler import ProfilerActivity, profile

from arithmetic_llm.cli import build, read_json, run_main
from arithmetic_llm.config import FoundationalConfig
from arithmetic_llm.training.supervised import train_foundational

OPTIMIZER, BETWEEN = "optimizer", "Python between operations"
KINDS = {  # the first whose words an operation's name has, in whatever letters
    "matrix products": ("mm", "linear", "matmul", "einsum"),
    "attention weights": ("softmax", "attention"),
    "norms and rotation": ("norm", "heads"),
    "embedding and loss": ("embedding", "nll_loss", "entropy", "index"),
    "copies and casts": ("copy", "cat", "clone", "contiguous", "_to_", "stack", "pad"),
    "element by element": ("",),
}


def measure(config):
    """A row for each kind of operation, the largest first."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        microseconds = profiled(Materials(config), config.size(80, 3), Path(folder))
    total = sum(microseconds.values())
    return [
        Row(f"step time: {kind}", "", "", 100 * spent / total, "%")
        for kind, spent in microseconds.most_common()
    ]


def profiled(materials, steps, folder):
    """Microseconds of the training loop by kind of operation."""
    paths = {"tokenizer_path": str(materials.tokenizer), "corpus_path": str(materials.corpus)}
    few = {"max_steps": steps, "eval_every": steps, "eval_samples": 8, "threads": 1}
    settings = read_json(RECIPE / "foundational.json") | paths | few
    settings["output_dir"] = str(folder)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        made = train_foundational(build(FoundationalConfig, settings, {}), materials.shape)
    spent = Counter()
    for event in found.events():
        spent[kind_of(event)] += event.self_cpu_time_total
    seconds = json.loads((made / "training_summary.json").read_text())["seconds"]
    spent[BETWEEN] = max(0.0, seconds * 1e6 - spent.total())
    return spent


def kind_of(event):
    """The kind of an operation."""
    if in_optimizer(event):
        return OPTIMIZER
    name = event.name.removeprefix("aten::").lower()
    return next(kind for kind, words in KINDS.items() if any(word in name for word in words))


def in_optimizer(event):
    """Whether an operation belongs to the optimizer's step."""
    while event:
        if event.name.startswith("Optimizer."):
            return True
        event = event.cpu_parent
    return False


main = main_of("step_time", measure, __doc__)

if __name__ == "__main__":
    run_main(main)
