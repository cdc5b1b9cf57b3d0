"""One set of weights, which workers update in turn.

A worker whose gradient is ready waits for its turn, takes up weights and moments as the one before
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
from arithmetic_llm.training.state import (
    copy_to,
    in_one_piece,
    on_their_own,
    parts_of,
    weights_and_moments,
)

WAKES_AFTER = 0.1  # seconds, to see whether another worker has failed


class Stopped(Exception):
    """A worker's turn will not come: another one has failed."""


class Turns:
    """The turns of one round of steps, after which the run itself is what the last one has left.

    Several processes have one worker each, and send its weights and moments as one vector.

    Args:
        end: the step that ends the round.
        stopped: is set when a worker has failed.
    """

    def __init__(self, run: Run, end: int, stopped: threading.Event):
        self.run, self.stopped, self.changed = run, stopped, threading.Condition()
        self.first, self.end = run.step * run.config.workers, end * run.config.workers
        self.next = self.first  # whose turn it is: the updates of all workers before
        self.of_run = weights_and_moments(run)
        self.of_workers = {w.number: weights_and_moments(w) for w in run.workers}
        (mine, *_) = self.of_workers.values()
        self.vector = in_one_piece(mine) if world_size() > 1 else None
        self.sending: dist.Work | None = None

    @contextlib.contextmanager
    def of(self, worker: Run) -> Iterator[None]:
        """The block is a worker's update; it begins when all before it are done."""
        update = worker.step * self.run.config.workers + worker.number
        self._take_up(self.of_workers[worker.number], update)
        worker.optimizer.count_from(update)
        yield
        self._hand_on(update)

    def _take_up(self, mine: list[Tensor], update: int) -> None:
        """Weights and moments as the update before has left them."""
        if update == self.first:
            copy_to(mine, self.of_run)
        elif world_size() > 1:
            self._wait_until_sent()
            collectively(dist.recv, self.vector, (update - 1) % world_size())
        else:
            self._wait_for_turn(update)
            copy_to(mine, self.of_workers[(update - 1) % self.run.config.workers])

    def _wait_for_turn(self, update: int) -> None:
        with self.changed:
            while self.next != update and not self.stopped.is_set():
                self.changed.wait(WAKES_AFTER)
        if self.stopped.is_set():
            raise Stopped

    def _hand_on(self, update: int) -> None:
        if world_size() == 1:
            with self.changed:
                self.next = update + 1
                self.changed.notify_all()
        elif update + 1 < self.end:  # without waiting until the other one takes it
            self.sending = collectively(dist.isend, self.vector, (update + 1) % world_size())

    def _wait_until_sent(self) -> None:
        if self.sending:
            collectively(self.sending.wait)
            self.sending = None

    def close(self) -> None:
        """Have the run be what the last worker has left."""
        self._wait_until_sent()
        last = self.run.config.workers - 1
        if world_size() > 1:
            vector = self.vector.clone()
            collectively(dist.broadcast, vector, last)
            copy_to(self.of_run, parts_of(vector, self.of_run))
            on_their_own(*self.of_workers.values())
        else:
            copy_to(self.of_run, self.of_workers[last])
