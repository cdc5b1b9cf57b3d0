"""Gradients of an optimizer update, from micro-batches that threads or processes share out.

They add up and are divided once by the count of the whole batch, so that how a batch is cut, and
among how many, cannot change the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from arithmetic_llm.distributed import added_up, collectively, share, world_size
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import autocast
from arithmetic_llm.threads import map_at_once


class MicroBatch(Protocol):
    """Some sequences that a gradient is computed for at one time."""

    tokens: int  # positions that the model reads, padding included
    loss_denominator: float  # the summed loss is divided once by that of all micro-batches

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""


class Loss(Protocol):
    """What is learned, as far as gradients are concerned."""

    at_once: int  # micro-batches computed side by side, on a CPU thread each; 1: on all threads
    shares_batches: bool  # do all processes compute a batch's gradients; or is it one worker's

    def loss(self, model: ArithmeticModel, batch: MicroBatch) -> Tensor:
        """The loss of a micro-batch, summed (not averaged) over what it counts."""


LossOf = Callable[[ArithmeticModel, MicroBatch], Tensor]


def add_gradients(
    model: ArithmeticModel, task: Loss, micro_batches: Sequence[MicroBatch], precision: torch.dtype
) -> float:
    """Leave the gradients of all micro-batches in the weights; returns the loss of them all."""
    total = sum(batch.loss_denominator for batch in micro_batches)

    def loss_of(model: ArithmeticModel, batch: MicroBatch) -> Tensor:
        with autocast(model.device, precision):  # holds for the thread that enters it
            return task.loss(model, batch.to(model.device)) / total

    if world_size() > 1 and task.shares_batches:
        return _with_other_processes(model, loss_of, share(micro_batches))
    return _by_threads(model, loss_of, micro_batches, task.at_once)


# ------------------------------------------------------------------------------------- threads


def threads_side_by_side(model: ArithmeticModel) -> int:
    """Threads that may compute gradients of a model, or of copies of it, at the same time.

    With dropout one after another: side by side they would draw their random numbers from one
    generator in whatever order the threads come.
    """
    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    return torch.get_num_threads() if model.device.type == "cpu" and not drops else 1


def _by_threads(
    model: ArithmeticModel, loss_of: LossOf, micro_batches: Sequence[MicroBatch], at_once: int
) -> float:
    """Gradients of some micro-batches at a time, each on a thread of its own.

    They add up in order, whichever is ready first: so the sum is the same, bit for bit, whenever
    there are as many threads.
    """
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss_and_gradients(batch: MicroBatch) -> tuple[float, tuple[Tensor | None, ...]]:
        loss = loss_of(model, batch)
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return loss.item(), gradients  # asked for a number only now: a GPU is waited for

    loss_sum = 0.0
    for loss, gradients in map_at_once(loss_and_gradients, micro_batches, at_once):
        loss_sum += loss
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                before = parameter.grad
                parameter.grad = gradient if before is None else before.add_(gradient)
    return loss_sum


# ----------------------------------------------------------------------------------- processes


class _LossModule(nn.Module):
    """A loss as a forward pass, which is where `DistributedDataParallel` begins its work."""

    def __init__(self, model: ArithmeticModel):
        super().__init__()
        self.model = model
        # Or DDP would warn that it looks in vain.
        self.unused = nn.Parameter(torch.zeros((), device=model.device))

    def forward(self, loss_of: LossOf, batch: MicroBatch | None) -> Tensor:
        if batch is None:
            return sum(0.0 * p.sum() for p in self.model.parameters() if p.requires_grad)
        return loss_of(self.model, batch)


@lru_cache(maxsize=1)  # a process trains one model at a time
def _parallel(model: ArithmeticModel) -> DistributedDataParallel:
    """The model's losses, with gradients that are summed over all processes.

    Unused weights are looked for in each step because gradients then keep their places in the
    sums (else they move after the first step, and with three processes a resumed run would differ
    in its last bits), and because a weight that no process used keeps no gradient.
    """
    parallel = DistributedDataParallel(
        _LossModule(model), find_unused_parameters=True, gradient_as_bucket_view=True
    )
    parallel.register_comm_hook(None, _sum_of_all)
    return parallel


def _sum_of_all(_, bucket):  # DDP wants its own annotations or none, and not as text
    """Sum some gradients, laid end to end; by itself `DistributedDataParallel` would average."""
    summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda done: done.value()[0])


def _with_other_processes(
    model: ArithmeticModel, loss_of: LossOf, mine: Sequence[MicroBatch]
) -> float:
    """Gradients of the micro-batches of all processes, of which this one computes its own.

    They are summed during a process's last backward pass. One that has no micro-batch takes part
    with gradients of zero, or the others would wait for it.
    """
    parallel, loss_sum = collectively(_parallel, model), 0.0
    *before, last = mine or [None]
    for batch in before:
        with parallel.no_sync():
            loss = parallel(loss_of, batch)
            loss.backward()
        loss_sum += loss.item()
    loss = parallel(loss_of, last)
    collectively(loss.backward)
    loss_sum += loss.item()
    return added_up([loss_sum])[0]


# ------------------------------------------------------------------------------------ clipping


def clip_gradients(model: ArithmeticModel, limit: float) -> float:
    """Scale all gradients down to a common norm of ``limit``, 0 = none; returns what it was."""
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf))
