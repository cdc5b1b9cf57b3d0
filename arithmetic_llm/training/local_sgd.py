"""Local SGD: copies of a model train on their own, and become their mean now and then.

Threads or processes that share out a batch wait for one another several times a step; workers meet
once in ``local_steps`` steps (Stich, "Local SGD converges fast and communicates little", 2019). And
a mean of weights errs less than those that it is of. A run is a function of the number of workers;
whether a thread or a process computes one changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from arithmetic_llm.distributed import collectively, gather_shares, is_mine, world_size
from arithmetic_llm.runtime import UserError
from arithmetic_llm.threads import map_at_once, map_on_cores, setting_on_error
from arithmetic_llm.training.gradients import threads_side_by_side
from arithmetic_llm.training.run import Run
from arithmetic_llm.training.step import StepResult, Task, train_step

AT_A_TIME = 20  # steps: so long does a request to stop wait, and then one worker for another


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
    """Some steps of every worker: up to where something is due, but at most `AT_A_TIME`.

    The run's model is the mean of all workers then; at every multiple of ``local_steps`` the
    workers, too, go on from there. On a CPU a worker is computed on one core, wherever it is.

    Args:
        show: is given the result of each step of this process's workers, by any thread.

    Returns:
        Of each step the mean loss and gradient norm of all workers, and their tokens together.
    """
    end, stopped = end_of_round(run, task), threading.Event()

    @setting_on_error(stopped)
    def steps_of(worker: Run) -> list[StepResult]:
        own, results = task.of_worker(worker.number), []
        while worker.step < end and not stopped.is_set():
            results.append(train_step(worker, own))
            show(results[-1])
        return results

    side_by_side = map_on_cores if run.model.device.type == "cpu" else map_at_once
    with setting_on_error(stopped):  # Ctrl-C comes to this thread alone
        results = [*side_by_side(steps_of, run.workers, threads_side_by_side(run.model))]
    run.step = end
    meet = end % run.config.local_steps == 0
    to_their_mean(run, attrgetter("trained"), [run, *(run.workers if meet else [])])
    if meet:
        to_their_mean(run, moments, run.workers)
    return [over_workers(step) for step in zip(*gather_shares(results), strict=True)]


def end_of_round(run: Run, task: Task) -> int:
    """The next step at which something is done for all workers together."""
    config = run.config
    due = (config.local_steps, config.eval_every, config.save_every, config.log_every)
    multiples = [
        (run.step // every + 1) * every for every in (AT_A_TIME, *due, task.steps_per_epoch)
    ]
    return min(task.total_steps, *multiples)


@torch.no_grad()
def to_their_mean(run: Run, of: Callable[[Run], list[Tensor]], takers: Iterable[Run]) -> None:
    """Set tensors of some to the mean over all workers, those of other processes included.

    They are added up by their numbers in every process, so that the sum is the same to the bit.
    """
    total = 0.0
    for number in range(run.config.workers):
        mine, place = is_mine(number), number // world_size()
        vector = end_to_end(of(run.workers[place if mine else 0]))
        if world_size() > 1:
            collectively(dist.broadcast, vector, number % world_size())
        total = total + vector
    mean = total / run.config.workers
    for tensors in map(of, takers):
        parts = mean.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector, a copy of them."""
    return torch.cat([tensor.flatten() for tensor in tensors])


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
