"""What the tests of studies share: a tiny recipe, and running stages without new processes."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import call

from arithmetic_llm.study import runner

SMALL = {"max_depth": 2, "num_range": [1, 9]}
TRAINING = {
    "batch_size": 8,
    "max_steps": 3,
    "eval_samples": 8,
    "warmup_steps": 0,
    "learning_rate": 1e-3,
    "device": "cpu",
    "precision": "fp32",
    "log_every": 1,
}
RECIPE = {
    "foundational_corpus": {"num_samples": 300, **SMALL},
    "instruction_corpus": {"num_samples": 200, "invalid_rate": 0.0, **SMALL},
    "test_corpus": {"num_samples": 24, "invalid_rate": 0.0, **SMALL},
    "model": {
        "d_model": 32,
        "nhead": 2,
        "num_layers": 2,
        "dim_feedforward": 48,
        "dropout": 0.0,
        "max_seq_length": 1536,
    },
    "foundational": TRAINING,
    "instruction": TRAINING,
    "lora": {"lora_rank": 2, **TRAINING},
    "grpo": {
        "data_mode": "generated",
        "max_depth": 2,
        "num_range": [1, 9],
        "batch_size": 2,
        "num_candidates": 2,
        "max_steps": 1,
        "eval_samples": 4,
        "max_gen_length": 8,
        "device": "cpu",
    },
}
MODEL_ALONE = {"model_path": "{foundational}", "max_gen_length": 8}


def write_recipe(folder: Path) -> Path:
    """A recipe of which every stage takes a moment."""
    folder.mkdir()
    for name, settings in RECIPE.items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
    return folder


def write_study(path: Path, **keys: object) -> Path:
    """A study in a file of its own."""
    path.write_text(json.dumps({"question": "Does it matter?", **keys}))
    return path


class Called:
    """A stage that was run in this process, as if it had been one of its own."""

    pid = 0

    def __init__(self, command: list[str], log, lock):
        ended = call(Path(command[1]).name, *command[2:])
        log.write((ended.out + ended.err).encode())
        self.returncode = ended.code

    def poll(self) -> int:
        return self.returncode

    def wait(self, timeout: float = 0) -> int:
        return self.returncode

    def send_signal(self, number: int) -> None:
        """It has ended."""


def run_here(monkeypatch) -> None:
    """From now on stages are run in this process, and nobody waits between them."""
    monkeypatch.setattr(runner, "launch", Called)
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_LOOKS", 0.0)


def commands(stages: Path) -> list[str]:
    """Every command that was run, by the logs of all stages."""
    logs = sorted(stages.glob("*/log.txt"))
    return [line for log in logs for line in log.read_text().splitlines() if line.startswith("$ ")]
