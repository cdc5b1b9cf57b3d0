"""One set of weights, which workers update in turn.

A worker has its turn when its gradient is ready: it takes up weights and moments as the one before
has left them, updates them, and begins its next batch from there, while the others do the same. So
a gradient is of the weights of N - 1 updates before (Langford, Smola & Zinkevich, "Slow learners
are fast", 2009). The updates are as many, one after the other, as those of one model; but no batch
is cut into parts that wait for one another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from arithmetic_llm.distributed import collectively, world_size
from arithmetic_llm.training.run import Run
from arithmetic_llm.training.state import in_one_piece, moments, on_their_own

WAKES_AFTER = 0.1  # seconds, to see whether another worker has failed


class Stopped(Exception):
    """A worker's turn will not come: another one has failed."""


class Turns:
    """The turns of one round of steps, after which the run itself is what the last one has left.

    Args:
        end: the step that ends the round.
        stopped: is set when a worker has failed.
    """

    def __init__(self, run: Run, end: int, stopped: threading.Event):
        self.run, self.stopped, self.changed = run, stopped, threading.Condition()
        self.first, self.end = run.step * run.config.workers, end * run.config.workers
        self.next = self.first  # whose turn it is: the updates of all workers before
        self.sending: dist.Work | None = None
        self.state = in_one_piece(remembered(run))
        self.states = {w.number: in_one_piece(remembered(w)) for w in run.workers}

    @contextlib.contextmanager
    def of(self, worker: Run) -> Iterator[None]:
        """The block is the update of a worker; it begins when all before it are done."""
        update = worker.step * self.run.config.workers + worker.number
        self._take_up(self.states[worker.number], update)
        worker.optimizer.count_from(update)
        yield
        self._hand_on(self.states[worker.number], update)

    def _take_up(self, state: Tensor, update: int) -> None:
        """Weights and moments as the update before has left them."""
        if update == self.first:
            state.copy_(self.state)
        elif world_size() > 1:
            self._wait_until_sent()
            collectively(dist.recv, state, (update - 1) % world_size())
        else:
            self._wait_for_turn(update)
            state.copy_(self.states[(update - 1) % self.run.config.workers])

    def _wait_for_turn(self, update: int) -> None:
        with self.changed:
            while self.next != update and not self.stopped.is_set():
                self.changed.wait(WAKES_AFTER)
        if self.stopped.is_set():
            raise Stopped

    def _hand_on(self, state: Tensor, update: int) -> None:
        if world_size() == 1:
            with self.changed:
                self.next = update + 1
                self.changed.notify_all()
        elif update + 1 < self.end:  # without waiting until the other one takes it
            self.sending = collectively(dist.isend, state, (update + 1) % world_size())

    def _wait_until_sent(self) -> None:
        if self.sending:
            collectively(self.sending.wait)
            self.sending = None

    def close(self) -> None:
        """Have the run be what the last worker has left."""
        self._wait_until_sent()
        last = (self.end - 1) % self.run.config.workers
        self.state.copy_(self.states.get(last, self.state))
        if world_size() > 1:
            collectively(dist.broadcast, self.state, last)
        self.run.optimizer.count_from(self.end)
        for each in (self.run, *self.run.workers):
            on_their_own(remembered(each))


def remembered(worker: Run) -> list[Tensor]:
    """Its weights and moments."""
    worker.optimizer.remember()
    return [*worker.trained, *moments(worker)]
