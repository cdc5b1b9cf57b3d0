"""A training run as files: its folder, its checkpoints, its metrics, and how to go on with it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from arithmetic_llm.checkpoint import (
    FINISHED,
    Checkpoint,
    Content,
    load_weights,
    new_run_folder,
    read_checkpoint,
    save_checkpoint,
    step_checkpoints,
)
from arithmetic_llm.cli import read_json, to_json
from arithmetic_llm.config import RunConfig
from arithmetic_llm.model import ArithmeticModel
from arithmetic_llm.optim import MuonAdamW, build_optimizer
from arithmetic_llm.runtime import UserError, atomic_write_text, multiplies_bf16, versions

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"


@dataclass
class Run:
    """One training run: its folder, what it trains, and how far it is."""

    folder: Path
    config: RunConfig
    checkpoint: Checkpoint  # the model, with what every file saved from it must say
    optimizer: MuonAdamW
    step: int = 0
    best: float = math.inf  # lowest badness so far
    task_state: dict[str, Any] = field(default_factory=dict)
    precision: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.precision = resolve_precision(self.config.precision, self.model.device)

    @property
    def model(self) -> ArithmeticModel:
        return self.checkpoint.model

    # -- files

    def save(self, name: str, resumable: bool = False) -> None:
        """Write a checkpoint of this moment into the run folder."""
        training = self._training_state() if resumable else {}
        content = replace(self.checkpoint, step=self.step, training=training)
        save_checkpoint(self.folder / name, content)

    def save_step(self) -> None:
        """Write ``checkpoint_step_N.pt`` and drop those that are no longer kept."""
        self.save(f"checkpoint_step_{self.step}.pt", resumable=True)
        keep = self.config.keep_checkpoints
        for old in step_checkpoints(self.folder)[:-keep] if keep else []:
            old.unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> None:
        atomic_write_text(self.folder / name, json.dumps(value, indent=2) + "\n")

    # -- resuming

    def _training_state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "task": self.task_state,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "threads": torch.get_num_threads(),
            "precision": str(self.precision),
        }

    def restore(self, saved: Content) -> None:
        """Continue from a resumable checkpoint: weights, optimizer, random state, best so far."""
        state = saved.training
        load_weights(self.model, saved.weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.task_state = state["task"]
        self.step, self.best = saved.step, state["best"]
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available() and state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        if state["threads"] != torch.get_num_threads():
            torch.set_num_threads(state["threads"])
            print(f"using {state['threads']} CPU threads, as this run did before")
        if state["precision"] != str(self.precision):
            print(
                f"warning: this run computed in {state['precision']} before, now in "
                f"{self.precision}; its weights will not be bit-identical",
                file=sys.stderr,
            )


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products; weights and optimizer state are fp32 in any case."""
    if name == "auto":
        name = "bf16" if multiplies_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def open_run(config: RunConfig, checkpoint: Checkpoint, **sources: str) -> Run:
    """A new run, or the one that ``config.resume`` names.

    Args:
        sources: hashes and the like of what the run learns from; must be the same on resuming.

    Raises:
        UserError: the run to resume is finished, or learned from something else.
    """
    if not config.resume:
        return start_run(
            new_run_folder(config.output_dir, checkpoint.stage), config, checkpoint, sources
        )
    folder = Path(config.resume)
    if (folder / FINISHED).exists():
        raise UserError(
            f"{folder}: is finished; start a new run with "
            f"{config.START_FLAG} {folder / 'final_model.pt'}"
        )
    before = read_json(folder / "run.json")
    for name, value in {**sources, "tokenizer_hash": checkpoint.tokenizer.hash}.items():
        if before.get(name) != value:
            raise UserError(f"{folder}: its {name} has changed since; restore that, or start anew")
    return continue_run(folder, config, checkpoint)


def start_run(
    folder: Path, config: RunConfig, checkpoint: Checkpoint, sources: dict[str, str]
) -> Run:
    """A run at step 0, with ``run.json`` and the configs written."""
    run = Run(folder, config, checkpoint, build_optimizer(checkpoint.model, config))
    atomic_write_text(folder / "model_config.json", to_json(checkpoint.model.config))
    run.write_json(
        "run.json",
        {
            "command": sys.argv,
            "stage": checkpoint.stage,
            "seed": config.seed,
            "device": str(run.model.device),
            "precision": str(run.precision).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "parameters": run.model.parameter_count(),
            "tokenizer_hash": checkpoint.tokenizer.hash,
            "versions": versions(),
            **sources,
        },
    )
    # Last: a folder that --resume can read its settings from has all the rest, too.
    atomic_write_text(folder / "training_config.json", to_json(replace(config, resume="")))
    return run


def continue_run(folder: Path, config: RunConfig, checkpoint: Checkpoint) -> Run:
    """The run in ``folder``, at its newest readable checkpoint; at step 0 if there is none."""
    run = Run(folder, config, checkpoint, build_optimizer(checkpoint.model, config))
    for half_written in folder.glob(".*.tmp"):  # what a kill interrupted
        half_written.unlink()
    for path in reversed(step_checkpoints(folder)):
        try:
            run.restore(read_checkpoint(path))
        except UserError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
            continue
        print(f"resuming {folder} at step {run.step}")
        break
    else:
        print(f"resuming {folder}: it has no checkpoint yet, so it starts over")
    for name in (METRICS, ROLLOUTS):
        MetricsLog(folder, name).truncate(run.step)
    return run


class MetricsLog:
    """One JSON object a line, flushed as it is written, readable at any time."""

    def __init__(self, folder: Path, name: str = METRICS):
        self.path = folder / name

    def append(self, **values: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines so far; one that a kill left unfinished is passed over."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def truncate(self, step: int) -> None:
        """Forget what came after ``step``; a resumed run will write it again, at 0 all of it."""
        if not self.path.exists():
            return
        kept = [line for line in self.read() if line["step"] <= step and step > 0]
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
