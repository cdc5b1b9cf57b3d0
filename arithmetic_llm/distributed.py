"""Several processes that train or evaluate as one. Alone, everything here does next to nothing.

``torchrun`` or ``--processes`` starts them; each finds its rank in the environment and meets the
others in `together`. All run the same script with the same seed, so each knows the whole plan of a
step, and takes its `share` of the work. What they tell one another is sums of gradients or workers'
weights, and the results of shares. Rank 0 is the main one: it alone writes, files as well as lines
on the terminal.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, zip_longest
from typing import Any, TypeVar

from arithmetic_llm.runtime import UserError, reason

Item = TypeVar("Item")
TIMEOUT = "ARITHMETIC_LLM_TIMEOUT"  # of the environment: seconds
DEFAULT_TIMEOUT = 600
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # as the systems call it


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that work together."""

    rank: int = 0
    world_size: int = 1
    store: Any = None  # small values that all can read and change; None if it is alone


_place = Place()  # process groups are global in torch, and so is this


def world_size() -> int:
    """Number of processes that work together."""
    return _place.world_size


def rank() -> int:
    """Number of this process among them, from 0 on."""
    return _place.rank


def is_main() -> bool:
    """Whether this is the process that writes."""
    return _place.rank == 0


# ------------------------------------------------------------------------------- a shared task


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The items that fall to this process: each takes every N-th, the first from its rank on."""
    return items[_place.rank :: _place.world_size]


def gather_shares(results: Sequence[Item]) -> list[Item]:
    """The results of all shares on every process, in the order of the items; see `share`."""
    parts = _gather(results)
    missing = object()
    in_turn = chain.from_iterable(zip_longest(*parts, fillvalue=missing))
    return [result for result in in_turn if result is not missing]


def is_mine(place: int) -> bool:
    """Whether the item at this place falls to this process; see `share`."""
    return place % _place.world_size == _place.rank


def from_main(make: Callable[[], Item]) -> Item:
    """What rank 0 makes, on every process; the others wait for it."""
    if _place.world_size == 1:
        return make()
    import torch.distributed as dist

    box = [make() if is_main() else None]
    collectively(dist.broadcast_object_list, box)
    return box[0]


def added_up(values: Sequence[float]) -> list[float]:
    """The sum over all processes of each value."""
    if _place.world_size == 1:
        return [*values]
    import torch
    import torch.distributed as dist

    sums = torch.tensor(values, dtype=torch.float64)
    collectively(dist.all_reduce, sums)
    return sums.tolist()


def require_same(value: Any, what: str) -> None:
    """See to it that all processes have the same value of something.

    Raises:
        UserError: they have not.
    """
    if any(theirs != value for theirs in _gather(value)):
        raise UserError(f"the processes do not have the same {what}; give all of them the same")


def _gather(value: Item) -> list[Item]:
    """The value that each process has, by rank."""
    if _place.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _place.world_size
    collectively(dist.all_gather_object, values, value)
    return values


def collectively(call: Callable[..., Item], *arguments: Any) -> Item:
    """Do what takes all processes, a backward pass included; returns what it gives.

    Raises:
        UserError: another one has ended, or has not come within the time-out.
    """
    try:
        return call(*arguments)
    except RuntimeError as error:
        if not _is_of_others(error):
            raise
        raise UserError(
            f"another of the {_place.world_size} processes has ended or does not answer "
            f"({reason(error)}); a training run goes on from its last checkpoint with --resume"
        ) from error


def _is_of_others(error: RuntimeError) -> bool:
    """Whether the other processes are to blame; gloo's errors have no type of their own."""
    import torch.distributed as dist

    of_gloo = re.search("gloo|connection|timed out", str(error), re.IGNORECASE)
    return isinstance(error, dist.DistError) or of_gloo is not None


# -------------------------------------------------------------------------- beginning and end


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Work with the other processes of a launcher inside the block, if there are any.

    Rank 0 alone is heard. Of errors the first is heard, whose ever it is: the others have the same,
    or only miss the process that had it.
    """
    if not is_launched():
        yield
        return
    _join()
    heard = sys.stdout, sys.stderr
    unheard = (open(os.devnull, "w", encoding="utf-8"),) * 2  # noqa: SIM115 (used beyond the block)
    sys.stdout, sys.stderr = heard if is_main() else unheard
    try:
        yield
    except (Exception, KeyboardInterrupt):
        sys.stdout, sys.stderr = heard if _is_first_to_fail() else unheard
        raise
    sys.stdout, sys.stderr = heard
    _leave()


def _join() -> None:
    """Meet the other processes: by gloo, and for tensors on GPUs by NCCL."""
    global _place
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=float(os.environ.get(TIMEOUT, DEFAULT_TIMEOUT)))
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # what "cuda" means from now on
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # A restarted job has its old store, with the addresses of the dead. On several hosts
            # the counts of restarts differ; docs/SCALING.md has the variable that renews the store.
            store = dist.PrefixStore(f"attempt {_restarts()}", store)
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot find one another ({reason(error)})") from error
    _place = Place(rank, size, store)


def _leave() -> None:
    global _place
    import torch.distributed as dist

    dist.destroy_process_group()
    _place = Place()


def _is_first_to_fail() -> bool:
    """Whether no other process has failed before; in doubt, yes."""
    try:
        return _place.store.add("failures", 1) == 1
    except RuntimeError:  # the store has gone with the launcher
        return True


def job_name() -> str:
    """Name of the launcher's job, the same after it has restarted its processes; empty if alone."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # Unless it is given one, torchrun calls every job "none".
    return f"{socket.gethostname()}/{os.getppid()}" if name == "none" else name


def is_restarted() -> bool:
    """Whether the launcher has restarted the processes of this job, here or on another host."""
    return any(added_up([_restarts()]))


def _restarts() -> int:
    """How often the launcher of this host has done so."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


# ----------------------------------------------------------------------------------- starting


def to_launch(processes: int, resuming: bool = False) -> bool:
    """Whether a script that was asked for so many processes has to start them.

    Args:
        resuming: the number may be that of the run before; the launcher's counts then.

    Raises:
        UserError: a launcher has started another number.
    """
    if not is_launched():
        return processes > 1
    started = int(os.environ["WORLD_SIZE"])
    if processes not in (1, started) and not resuming:
        raise UserError(f"--processes {processes}: leave it out, a launcher has started {started}")
    return False


def launch(processes: int, script: str, argv: Sequence[str] | None) -> int:
    """Run a script as several processes on this machine, by torch's own elastic launcher.

    They share the cores out among them, and speak over the loopback interface alone.

    Args:
        argv: the script's arguments; None = those of this process.

    Returns:
        The exit code: that of the process that failed first, 130 on Ctrl-C. They have said why.

    Raises:
        UserError: they cannot be started, or one was killed.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for part in ("", ".agent.server.api"):  # the second has set itself a level
        logging.getLogger(f"torch.distributed.elastic{part}").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(DEFAULT_TIMEOUT))  # a step may last
    if sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"{socket.gethostname()}-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    arguments = sys.argv[1:] if argv is None else argv
    try:
        elastic_launch(config, sys.executable)(script, *arguments)
    except SignalException:
        return 130
    except RendezvousError as error:  # torch for Windows has no libuv, which this launcher wants
        raise UserError(
            f"--processes: several cannot be started here ({reason(error.__cause__ or error)}); "
            "leave it out, or start them with torchrun"
        ) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise UserError(f"process {rank} was killed by signal {-failure.exitcode}") from None
        return failure.exitcode
    return 0


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
