"""Local SGD: workers train on their own and become their mean now and then.

They meet once in ``local_steps`` steps (Stich, "Local SGD converges fast and communicates little",
2019), and a mean of weights errs less than those that it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter

import torch.distributed as dist
from torch import Tensor

from arithmetic_llm.distributed import collectively, is_mine, world_size
from arithmetic_llm.training.run import Run
from arithmetic_llm.training.state import copy_to, end_to_end, moments, parts_of


def meet(run: Run) -> None:
    """Set the run's model to the workers' mean; when it is time, they, too, go on from there."""
    together = run.step % run.config.local_steps == 0
    to_their_mean(run, attrgetter("trained"), [run, *(run.workers if together else [])])
    if together:
        to_their_mean(run, moments, run.workers)


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
    for taker in takers:
        copy_to(of(taker), parts_of(mean, of(taker)))
