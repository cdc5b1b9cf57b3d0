"""Work side by side on the threads of a CPU, each on a core of its own.

Threads that share every operation wait for each other at the end of each; with other work on the
machine that is most of what they do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Given = TypeVar("Given")
Result = TypeVar("Result")


def map_at_once(
    function: Callable[[Given], Result], given: Sequence[Given], at_once: int
) -> Iterable[Result]:
    """`map` with so many calls at a time; where there is one to make, it has all threads."""
    each = pool(at_once).map if min(at_once, len(given)) > 1 else map
    return each(function, given)


def map_on_cores(
    function: Callable[[Given], Result], given: Sequence[Given], at_once: int
) -> Iterable[Result]:
    """`map` with so many calls at a time, each on one core even where it is the only one.

    So what is computed does not depend on how many there are.
    """
    return pool(at_once).map(function, given)


@contextlib.contextmanager
def setting_on_error(event: threading.Event) -> Iterator[None]:
    """Set an event if the block ends with an error, for other threads to see."""
    try:
        yield
    except BaseException:
        event.set()
        raise


@cache
def pool(count: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each; kept, for each has kernels and memory of its own."""

    def keep_to_one_core() -> None:
        torch.get_num_threads()  # or the first operation here would take up the main thread's count
        torch.set_num_threads(1)

    return ThreadPoolExecutor(count, initializer=keep_to_one_core)
