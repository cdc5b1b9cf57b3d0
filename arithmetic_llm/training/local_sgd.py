"""Local SGD: copies of a model train on their own, and become their mean now and then.

Threads or processes that share out a batch wait for one another several times a step; workers meet
once in ``local_steps`` steps (Stich, "Local SGD converges fast and communicates little", 2019). And
a mean of weights errs less than those that it is of. A run is a function of the number of workers;
whether a thread or a process computes one changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from arithmetic_llm.distributed import collectively, gather_shares, share, world_size
from arithmetic_llm.runtime import UserError
from arithmetic_llm.threads import map_at_once
from arithmetic_llm.training.gradients import threads_side_by_side
from arithmetic_llm.training.optim import build_optimizer
from arithmetic_llm.training.run import Run
from arithmetic_llm.training.step import StepResult, Task, train_step


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


def train_round(run: Run, task: Task, show: Callable[[StepResult], None]) -> list[StepResult]:
    """All workers' steps up to their next mean.

    Args:
        show: is given one of a step's results when as many are done as this process has workers.

    Returns:
        Of each step the mean loss and gradient norm of all workers, and their tokens together.
    """
    every = run.config.local_steps
    end = min((run.step // every + 1) * every, task.total_steps)
    first, *others = share(range(task.workers))
    # The first one has the run's own weights, whose gradients are looked at after the first round.
    workers = [replace(run, worker=first), *(copied(run, number) for number in others)]

    done = count(1)

    def one_step(worker: Run, own: Task) -> StepResult:
        result = train_step(worker, own)
        if next(done) % len(workers) == 0:
            show(result)
        return result

    def steps_of(worker: Run) -> list[StepResult]:
        own = task.of_worker(worker.worker)
        return [one_step(worker, own) for _ in range(run.step, end)]

    results = [*map_at_once(steps_of, workers, threads_side_by_side(run.model))]
    take_mean(run, workers)
    run.step = end
    return [over_workers(step) for step in zip(*gather_shares(results), strict=True)]


def copied(run: Run, number: int) -> Run:
    """A worker with weights and an optimizer of its own, which are as the run's are."""
    model = copy.deepcopy(run.model)
    optimizer = build_optimizer(model, run.config, run.precision)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    checkpoint = replace(run.checkpoint, model=model)
    return replace(run, checkpoint=checkpoint, optimizer=optimizer, worker=number)


@torch.no_grad()
def take_mean(run: Run, workers: Sequence[Run]) -> None:
    """Give a run the mean of all processes' workers: of weights, and of the optimizers' moments."""
    total = torch.stack([end_to_end(worker) for worker in workers]).sum(0)
    if world_size() > 1:
        collectively(dist.all_reduce, total)
    tensors = trained_tensors(run)
    means = (total / run.config.workers).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


def end_to_end(run: Run) -> Tensor:
    """All that training changes as one vector."""
    return torch.cat([tensor.flatten() for tensor in trained_tensors(run)])


def trained_tensors(run: Run) -> list[Tensor]:
    """Trained weights, and what the optimizer remembers of each, in the same order every time."""
    weights = [p for group in run.optimizer.param_groups for p in group["params"]]
    moments = [run.optimizer.state.get(weight, {}) for weight in weights]
    kept = [value for each in moments for _, value in sorted(each.items())]
    return [*weights, *(value for value in kept if isinstance(value, Tensor))]


def over_workers(results: Sequence[StepResult]) -> StepResult:
    """The metrics of a step of several workers."""
    return StepResult(
        fmean(result.loss for result in results),
        sum(result.tokens for result in results),
        results[0].rates,
        fmean(result.gradient_norm for result in results),
    )
