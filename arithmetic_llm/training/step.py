"""A step of training: what is learned, and the optimizer updates that learn it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import torch

from arithmetic_llm.distributed import rank, world_size
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError, derived_seed
from arithmetic_llm.training.gradients import Loss, MicroBatch, add_gradients, clip_gradients
from arithmetic_llm.training.optim import learning_rate_factor, learning_rates
from arithmetic_llm.training.run import Run

Turn = Callable[[], AbstractContextManager[None]]  # what weights are changed within


class Task(Loss, Protocol):
    """Subject of a run: where batches come from, what the loss is, how the model is judged."""

    total_steps: int
    steps_per_epoch: int
    validates_start: bool  # is the model evaluated before the first step, too

    def updates(self, step: int) -> Iterable[list[MicroBatch]]:
        """The optimizer updates of a step (mostly one), each as its micro-batches."""

    def of_worker(self, number: int) -> Task:
        """The same with the batches of one worker; see `workers`."""

    def work(self, step: int) -> float:
        """Work done before ``step``, in any unit; what the time estimate rests on."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step beside its loss.

        The metrics stream has the mean of each figure over the steps that tell it.
        """

    def validate(self, model: ArithmeticModel) -> dict[str, float]:
        """Figures on held-out data."""

    def selection_loss(self, metrics: dict[str, float]) -> float:
        """Loss by which the best model is selected; lower is better."""

    def state_dict(self) -> dict[str, Any]:
        """State that the task itself has learned, for a checkpoint; mostly none."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state again."""


class UpdateResult(NamedTuple):
    """Metrics of an optimizer update."""

    loss: float  # nats per counted token
    gradient_norm: float  # of all gradients together, before clipping


class StepResult(NamedTuple):
    """Metrics of a step."""

    loss: float  # mean over its updates; 0 if it had none
    tokens: int  # positions that the model read, padding included
    rates: dict[str, float]  # learning rates by their names in the config
    gradient_norm: float | None  # of the last update; None if it had none


def train_step(run: Run, task: Task, turn: Turn = nullcontext) -> StepResult:
    """One step: as many updates as the task has for it, at one learning rate."""
    scale = learning_rate_factor(run.config, run.step, task.total_steps)
    if world_size() > 1 or not task.shares_batches:
        seed_dropout(run, rank() if task.shares_batches else run.number)
    updates, tokens = [], 0
    for micro_batches in task.updates(run.step):
        updates.append(update(run, task, micro_batches, scale, turn))
        tokens += sum(batch.tokens for batch in micro_batches)
    run.step += 1
    run.task_state = task.state_dict()
    return StepResult(
        fmean(u.loss for u in updates) if updates else 0.0,
        tokens,
        learning_rates(run.optimizer, scale),
        updates[-1].gradient_norm if updates else None,
    )


def seed_dropout(run: Run, place: int) -> None:
    """Give each process or worker random numbers of its own for a step: none is to be stored."""
    torch.manual_seed(derived_seed(run.config.seed, run.step, place))


def update(
    run: Run, task: Task, micro_batches: list[MicroBatch], scale: float, turn: Turn = nullcontext
) -> UpdateResult:
    """One optimizer update.

    Raises:
        UserError: loss or gradient is not finite; the weights are as they were.
    """
    run.optimizer.zero_grad(set_to_none=True)
    loss_sum = add_gradients(run.model, task, micro_batches, run.precision)
    norm = clip_gradients(run.model, run.config.gradient_clip)
    for name, value in (("loss", loss_sum), ("gradient norm", norm)):
        if not math.isfinite(value):
            flags = run.config.rate_flags
            raise UserError(f"the {name} is {value} at step {run.step}; lower {flags}")
    with turn():
        run.optimizer.step(scale)
    return UpdateResult(loss_sum, norm)
