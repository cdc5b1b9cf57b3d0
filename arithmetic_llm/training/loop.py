"""The training loop. It knows steps, files and signals; what is learned is a `Task`.

A run is a function of its config and seed: a task gives the same batches for a step however often
it is asked, and a checkpoint holds all that changes. So a run that was killed and resumed ends
with the same weights, bit for bit, on a CPU with the same number of threads.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from arithmetic_llm.distributed import added_up, from_main, is_main
from arithmetic_llm.folders import BEST, FINISHED
from arithmetic_llm.model.checkpoint import read_checkpoint
from arithmetic_llm.model.decode import evaluating
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import (
    Progress,
    UserError,
    readable_seconds,
    when_asked_to_stop,
)
from arithmetic_llm.training.adapters import save_adapter_files
from arithmetic_llm.training.run import MetricsLog, Run, workers_of
from arithmetic_llm.training.step import StepResult, Task, train_step
from arithmetic_llm.training.workers import train_workers

SHOWN = ("reward", "accuracy")  # of a task's figures, on the bar
STOPPING = b"\nfinishing the step at hand and saving; a second Ctrl-C ends at once without saving\n"


# ------------------------------------------------------------------------------------ the loop


def fit(run: Run, task: Task, more_files: Callable[[Run], None] | None = None) -> dict[str, Any]:
    """Train from ``run.step`` to the end and write every file of the run.

    Args:
        more_files: writes what a stage has beyond the common files, when all else is done.

    Returns:
        The training summary.

    Raises:
        KeyboardInterrupt: on Ctrl-C, SIGTERM or a closed terminal, after the step at hand is done
            and saved; if that was the last one, after all files are written.
        UserError: the loss is not finite.
    """
    config, log = run.config, MetricsLog(run.folder)
    task.load_state_dict(run.task_state)
    watched, *_ = trained = run.workers or [run]
    witness = FirstUpdate(watched.model) if run.step == 0 else None
    bar = Progress(task.total_steps, run.checkpoint.stage, "step", run.step)
    for each in trained:
        each.model.train()
    with bar, on_request_to_stop() as stop:
        if task.validates_start and run.step == 0:
            validate(run, task, log, bar)
        meter = Meter(run, task, bar)
        while run.step < task.total_steps:
            steps = next_steps(run, task, meter)
            if witness:
                witness.check(watched, steps[-1])
            meter.add(steps)
            last = run.step == task.total_steps
            epoch_ends = run.step % task.steps_per_epoch == 0 or last
            if run.step % config.log_every == 0 or epoch_ends:
                log.append(**meter.line())
            if run.step % config.eval_every == 0 or last:
                validate(run, task, log, bar)
            if last:  # writing the final files may fail, and the training must not be lost
                run.save(run.step_file, resumable=True)
            elif run.step % config.save_every == 0:
                run.save_step()
            if any(added_up([stop.is_set()])) and not last:  # all processes stop at the same step
                run.save_step()
                from_main(lambda: say_how_to_go_on(run))  # all wait, or it would not be said last
                raise KeyboardInterrupt
        if witness and witness.before is not None:
            bar.note("warning: no step had an update; the weights are those of the start")
        summary = from_main(lambda: finish(run, task, log, meter, more_files))
        if any(added_up([stop.is_set()])):
            raise KeyboardInterrupt
        return summary


def next_steps(run: Run, task: Task, meter: Meter) -> list[StepResult]:
    """One step or, of workers, some of each, up to where something is due."""
    if run.workers:
        return train_workers(run, task, meter.show)
    step = train_step(run, task)
    meter.show(step)
    return [step]


def say_how_to_go_on(run: Run) -> None:
    """Say that the run is saved."""
    with contextlib.suppress(OSError):  # the terminal may have gone
        print(f"saved; go on with --resume {run.folder}", file=sys.stderr)


class FirstUpdate:
    """Watches a run's first update, of a worker its first ones: what should train has moved, what
    is frozen has not.
    """

    def __init__(self, model: ArithmeticModel):
        self.before: dict[str, Tensor] | None = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }

    def check(self, run: Run, step: StepResult) -> None:
        """Compare once, after the first step that has an update.

        A tensor may stay where its gradient is missing or zero (an adapter's A at first, as its B
        is zero), or where a step of this rate is too small to show in it.

        Raises:
            RuntimeError: a frozen tensor has moved.
            UserError: nothing has a gradient, or a tensor that should have moved has not.
        """
        if self.before is None or step.gradient_norm is None:
            return
        before, self.before = self.before, None
        parameters = dict(run.model.named_parameters())
        moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
        frozen = {name for name, p in parameters.items() if not p.requires_grad}
        if moved & frozen:
            raise RuntimeError(f"frozen weights have moved: {sorted(moved & frozen)[:3]}")
        if all(p.grad is None for p in parameters.values()):
            raise UserError("the first update trains nothing: no weight has a gradient")
        if not moved:
            flags = run.config.rate_flags
            raise UserError(f"the first update moved no weight; raise {flags}")
        for name, p in parameters.items():
            if name not in moved and should_move(p, before[name], min(step.rates.values())):
                raise UserError(
                    f"the first update did not move {name}, which has a gradient; "
                    f"raise {run.config.rate_flags}"
                )


def should_move(parameter: Tensor, before: Tensor, rate: float) -> bool:
    """Whether an update of this learning rate is sure to show in a weight, rounding considered.

    Not sure are gradients near AdamW's epsilon, and a rate near the spacing of floats at the
    weight: norms begin at 1, and a long warm-up begins below what 1 can be changed by.
    """
    if parameter.grad is None:
        return False
    felt = parameter.grad.abs() > 1e-6
    shows = rate > 32 * torch.finfo(before.dtype).eps * before.abs()
    return bool((felt & shows).any())


def validate(run: Run, task: Task, log: MetricsLog, bar: Progress) -> None:
    """Judge the model on held-out data; keep it as ``best_model.pt`` if it is the best so far."""
    with torch.no_grad(), evaluating(run.model):
        metrics = task.validate(run.model)
    if math.isnan(task.selection_loss(metrics)):
        flags = run.config.rate_flags
        raise UserError(f"the held-out loss is nan at step {run.step}; lower {flags}")
    log.append(step=run.step, **metrics)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    bar.note(f"step {run.step}: {shown}")
    if task.selection_loss(metrics) < run.best:
        run.best = task.selection_loss(metrics)
        run.save(BEST)


def finish(
    run: Run,
    task: Task,
    log: MetricsLog,
    meter: Meter,
    more_files: Callable[[Run], None] | None,
) -> dict[str, Any]:
    """Write the files that mark a run as finished, the summary last."""
    if not (run.folder / BEST).exists():  # no figure was finite
        run.save(BEST)
    run.save("final_model.pt")
    if run.checkpoint.adapter:
        save_adapter_files(run.folder, run.config)
    if more_files:
        more_files(run)
    lines = log.read()
    run.write_json("training_log.json", epoch_log(lines, task.steps_per_epoch))
    evaluations = [line for line in lines if "loss" not in line]
    summary = {
        "stage": run.checkpoint.stage,
        "steps": run.step,
        "best": best_line(evaluations, run),
        "final": evaluations[-1],
        "seconds": round(meter.seconds, 1),  # of this process; a resumed run counts its last part
        "tokens_per_second": round(meter.tokens_per_second),
        "parameters": run.model.parameter_count(),
        "config": asdict(run.config),
    }
    run.write_json(FINISHED, summary)
    (run.folder / run.step_file).unlink(missing_ok=True)
    return summary


def best_line(evaluations: list[dict[str, Any]], run: Run) -> dict[str, Any]:
    """The evaluation that ``best_model.pt`` comes from."""
    step = read_checkpoint(run.folder / BEST).step
    return next((line for line in evaluations if line["step"] == step), evaluations[-1])


def epoch_log(lines: list[dict[str, Any]], steps_per_epoch: int) -> list[dict[str, Any]]:
    """Mean training loss and last held-out figures of each epoch, from the metrics stream."""
    epochs: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        epochs.setdefault((line["step"] - 1) // steps_per_epoch + 1, []).append(line)
    log = []
    for epoch, members in epochs.items():
        told = [line for line in members if "loss" in line]
        steps = [line.get("steps", 1) for line in told]  # older runs do not say
        mean = fmean([line["loss"] for line in told], steps) if any(steps) else None
        held_out = [line for line in members if "loss" not in line]
        log.append({"epoch": epoch, "train_loss": mean, **(held_out[-1] if held_out else {})})
    return log


class Meter:
    """Loss, speed and time left, for the bar and the metrics stream.

    A line of the stream tells of all steps since the line before (or since this process began):
    loss and figures are means over the steps, each over those that tell it (a step without an
    update has no loss; where none had one it is 0), so seconds are seconds a step; learning rates
    and gradient norm are the last update's.
    """

    ESTIMATE_AFTER_STEPS = 10

    def __init__(self, run: Run, task: Task, bar: Progress):
        self.run, self.task, self.bar = run, task, bar
        self.started = time.monotonic()
        self.tokens = self.steps = 0  # of whole steps, all workers'
        self.tokens_begun = self.results = 0  # of steps at hand, this process's workers'
        self.lock = threading.Lock()
        self.first_step = run.step
        self._open_window()

    def _open_window(self) -> None:
        self.window: list[StepResult] = []
        self.metrics: list[dict[str, float]] = []
        self.window_start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def tokens_per_second(self) -> float:
        mine = len(self.run.workers) or 1
        begun = self.tokens_begun * workers_of(self.run.config) / mine
        return (self.tokens + begun) / max(self.seconds, 1e-9)

    def show(self, result: StepResult) -> None:
        """A step of the model or of one of its workers on the bar, with its loss; by any thread."""
        metrics = self.task.metrics()
        shown = {name: f"{metrics[name]:.3f}" for name in SHOWN if name in metrics}
        with self.lock:
            self.tokens_begun += result.tokens
            self.results += 1
            if self.results % (len(self.run.workers) or 1) == 0:
                speed = f"{self.tokens_per_second:,.0f}"
                self.bar.update(1, loss=f"{result.loss:.3f}", **shown, tokens_per_s=speed)

    def add(self, steps: Sequence[StepResult]) -> None:
        """Count steps that are done."""
        self.tokens_begun = 0
        self.window += steps
        self.metrics.append(self.task.metrics())
        self.tokens += sum(step.tokens for step in steps)
        before, self.steps = self.steps, self.steps + len(steps)
        if before < min(self.ESTIMATE_AFTER_STEPS, self.task.total_steps) <= self.steps:
            speed = f"{self.tokens_per_second:,.0f} tokens/s"
            left = readable_seconds(self.seconds_left())
            self.bar.note(f"expected time for this run: about {left} more at {speed}")

    def seconds_left(self) -> float:
        """Estimate by the work that this process has done and what remains, at the same speed."""
        done = self.task.work(self.run.step) - self.task.work(self.first_step)
        left = self.task.work(self.task.total_steps) - self.task.work(self.run.step)
        return self.seconds * left / max(done, 1e-9)

    def line(self) -> dict[str, Any]:
        """One line of the metrics stream; starts the next window."""
        seconds = time.monotonic() - self.window_start
        learned = [step for step in self.window if step.gradient_norm is not None]
        line = {
            "step": self.run.step,
            "epoch": round(self.run.step / self.task.steps_per_epoch, 4),
            "steps": len(learned),  # that the loss is the mean of
            "loss": fmean(step.loss for step in learned) if learned else 0.0,
            **self.window[-1].rates,
            **({"grad_norm": learned[-1].gradient_norm} if learned else {}),
            "tokens_per_second": round(sum(s.tokens for s in self.window) / max(seconds, 1e-9)),
            "seconds": seconds / len(self.window),
            **means(self.metrics),
        }
        self._open_window()
        return line


def means(metrics: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over those that have it."""
    values = defaultdict(list)
    for each in metrics:
        for name, value in each.items():
            values[name].append(value)
    return {name: fmean(column) for name, column in values.items()}


@contextlib.contextmanager
def on_request_to_stop() -> Iterator[threading.Event]:
    """A request to stop sets the event, so that no step is cut in half; a second one interrupts."""
    event = threading.Event()

    def handle(signum: int, frame: object) -> None:
        if event.is_set() and signum in (signal.SIGINT, signal.SIGTERM):  # not a second SIGHUP
            raise KeyboardInterrupt
        event.set()
        if is_main():  # by no stream of Python's, which may be in the midst of writing
            with contextlib.suppress(OSError):
                os.write(2, STOPPING)

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    with when_asked_to_stop(handle):
        yield event
