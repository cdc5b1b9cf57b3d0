"""Local SGD: copies of a model train on their own, and become their mean now and then.

Threads or processes that share out a batch wait for one another several times a step; workers meet
once in ``local_steps`` steps (Stich, "Local SGD converges fast and communicates little", 2019). And
a mean of weights errs less than those that it is of. A run is a function of the number of workers;
whether a thread or a process computes one changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from arithmetic_llm.distributed import collectively, gather_shares, world_size
from arithmetic_llm.runtime import UserError
from arithmetic_llm.threads import map_at_once
from arithmetic_llm.training.gradients import threads_side_by_side
from arithmetic_llm.training.run import Run
from arithmetic_llm.training.step import StepResult, Task, train_step

AT_A_TIME = 25  # steps: so long does a request to stop wait, and then one worker for another


def require_a_worker_each(workers: int) -> None:
    """Refuse processes that would have nothing to do.

    Raises:
        UserError: there are several workers, but fewer than processes.
    """
    if 1 < workers < world_size():
        raise UserError(
            f"--workers {workers}: is fewer than the {world_size()} processes; start at most "
            f"{workers}, or have --workers {world_size()}, or 1, which share out each batch"
        )


def train_workers(run: Run, task: Task, show: Callable[[StepResult], None]) -> list[StepResult]:
    """Some steps of every worker, up to their mean or at most `AT_A_TIME`.

    The run's model is the mean of all workers then; at every multiple of ``local_steps`` the
    workers, too, go on from there.

    Args:
        show: is given one of a step's results when as many are done as this process has workers.

    Returns:
        Of each step the mean loss and gradient norm of all workers, and their tokens together.
    """
    every = run.config.local_steps
    end = min(next_multiple(AT_A_TIME, run.step), next_multiple(every, run.step), task.total_steps)
    done = count(1)

    def one_step(worker: Run, own: Task) -> StepResult:
        result = train_step(worker, own)
        if next(done) % len(run.workers) == 0:
            show(result)
        return result

    def steps_of(worker: Run) -> list[StepResult]:
        own = task.of_worker(worker.number)
        return [one_step(worker, own) for _ in range(run.step, end)]

    results = [*map_at_once(steps_of, run.workers, threads_side_by_side(run.model))]
    run.step = end
    meet = end % every == 0
    to_their_mean(run, weights, [run, *(run.workers if meet else [])])
    if meet:
        to_their_mean(run, moments, run.workers)
    return [over_workers(step) for step in zip(*gather_shares(results), strict=True)]


def next_multiple(of: int, after: int) -> int:
    return (after // of + 1) * of


@torch.no_grad()
def to_their_mean(run: Run, of: Callable[[Run], list[Tensor]], takers: Iterable[Run]) -> None:
    """Set tensors of some to the mean over all workers, those of other processes included."""
    total = torch.stack([end_to_end(of(worker)) for worker in run.workers]).sum(0)
    if world_size() > 1:
        collectively(dist.all_reduce, total)
    mean = total / run.config.workers
    for tensors in map(of, takers):
        parts = mean.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def weights(worker: Run) -> list[Tensor]:
    """What is trained."""
    return worker.trained


def moments(worker: Run) -> list[Tensor]:
    """What the optimizer remembers of each weight, in the same order every time."""
    states = [worker.optimizer.state.get(weight, {}) for weight in worker.trained]
    kept = [value for state in states for _, value in sorted(state.items())]
    return [value for value in kept if isinstance(value, Tensor)]


def over_workers(results: Sequence[StepResult]) -> StepResult:
    """The metrics of a step of several workers."""
    return StepResult(
        fmean(result.loss for result in results),
        sum(result.tokens for result in results),
        results[0].rates,
        fmean(result.gradient_norm for result in results),
    )
