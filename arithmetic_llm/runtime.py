"""The ground every stage stands on: errors for users, safe writes, progress, devices and seeds.

Nothing here imports torch when the module is imported; functions that need it import it themselves,
so that ``--help`` and the corpus tools answer at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import reprlib
import shlex
import signal
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, get_args, get_origin


class UserError(Exception):
    """A mistake that the user can mend: one line naming the thing, its value and the remedy."""


# ---------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears at ``path`` whole or not at all.

    The bytes go to a temporary file in the same folder (``os.replace`` is atomic only within one
    file system), reach the disk, and then take the name. On any error, an interrupt included, the
    temporary file is removed and what stood at ``path`` before is untouched.

    Raises:
        UserError: the file system refuses (full disk, no permission, a directory in the way).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Give a file its name; on Windows a reader or a virus scanner may hold the old one a while."""
    for wait in (0.1, 0.5, 2.0) if os.name == "nt" else ():
        with contextlib.suppress(PermissionError):
            os.replace(temporary, path)
            return
        time.sleep(wait)
    os.replace(temporary, path)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 with ``\\n`` line ends, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def atomic_write_all(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write several files into a folder; none of them takes its name before all are on the disk.

    Raises:
        UserError: as `atomic_write`; every file is then as it was, unless a rename fails.
    """
    with contextlib.ExitStack() as stack:
        for name, content in files.items():
            file = stack.enter_context(atomic_write(Path(folder) / name))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def require_file(path: str | Path, what: str) -> Path:
    """The path, if a non-empty file stands there; else a `UserError` that says what is wrong."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name the {what} file itself")
    if not path.is_file():
        raise UserError(f"{path}: no such {what} file; check the path")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the {what} file is empty; make it again")
    return path


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------- values that were read


def checked(form: Any, value: Any, name: str) -> Any:
    """The value, if it is of a form: a type, ``list[T]``, ``dict[K, V]`` or ``tuple[T, T]``.

    A float may be whole; a bool is no number; a list of as many values will do for a tuple.

    Raises:
        ValueError: it is of another one; the message has the name.
    """
    kind, parts = get_origin(form) or form, get_args(form)
    kinds = {float: (float, int), list: (list, tuple), tuple: (list, tuple)}.get(kind, kind)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not of type {kind.__name__}")
    if kind is tuple and len(value) != len(parts):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not {len(parts)} values")
    for part, item in _parts_of(kind, parts, value) if parts else ():
        checked(part, item, name)
    return value


def _parts_of(kind: type, parts: Sequence[Any], value: Any) -> Iterator[tuple[Any, Any]]:
    """The form of each item of a list, tuple or dict, with the item."""
    if kind is list:
        yield from ((parts[0], item) for item in value)
    elif kind is tuple:
        yield from zip(parts, value, strict=True)
    elif kind is dict:
        yield from (pair for entry in value.items() for pair in zip(parts, entry, strict=True))


def reason(error: BaseException) -> str:
    """Reason that an error gives, in one line."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------- progress


class Progress:
    """A tqdm bar on a terminal; a plain line every few seconds anywhere else (logs, CI, pipes)."""

    SECONDS_BETWEEN_LINES = 15.0

    def __init__(self, total: int | None, description: str, unit: str = "it", initial: int = 0):
        from tqdm import tqdm

        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            desc=description,
            unit=unit,
            initial=initial,
            dynamic_ncols=True,
            disable=not self.terminal,
        )
        self.total, self.description, self.unit = total, description, unit
        self.count, self.initial = initial, initial
        self.started = self.last_line = time.monotonic()
        self.metrics: dict[str, object] = {}

    def update(self, n: int = 1, **metrics: object) -> None:
        """Count ``n`` more units and show the latest figures (loss, accuracy, tokens/s)."""
        self.count += n
        self.metrics.update(metrics)
        if self.terminal:
            if metrics:
                self.bar.set_postfix(self.metrics, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.last_line > self.SECONDS_BETWEEN_LINES:
            self._print_line()

    def note(self, text: str) -> None:
        """Print a line of its own without tearing the bar."""
        with contextlib.suppress(OSError):  # the terminal may have gone, and work is to be saved
            if self.terminal:
                self.bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        rate = (self.count - self.initial) / max(self.last_line - self.started, 1e-9)
        of_total = f"/{self.total}" if self.total else ""
        left = ""
        if self.total and rate:
            left = f", {readable_seconds((self.total - self.count) / rate)} left"
        metrics = "".join(f", {name} {value}" for name, value in self.metrics.items())
        line = f"{self.description}: {self.count}{of_total} {self.unit}{metrics}{left}"
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def when_asked_to_stop(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Have Ctrl-C, SIGTERM and a closed terminal call a function; under nohup not the last.

    A shell's background jobs ignore Ctrl-C, and so do the processes that they start, unless it is
    taken up again.
    """
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)  # Windows has none
    before = {each: signal.signal(each, handle) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def quoted(arguments: Sequence[str]) -> str:
    """Arguments as they can be pasted into this system's shell."""
    return subprocess.list2cmdline(arguments) if os.name == "nt" else shlex.join(arguments)


def pasted(arguments: Sequence[str]) -> str:
    """A script with its arguments as a user types it."""
    return f"python {quoted(arguments)}"


def readable_seconds(seconds: float) -> str:
    """``75`` -> ``1m15s``; what a person wants to read, never more than two units."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def readable_limit(settings: Mapping[str, Any]) -> str:
    """How much a model might write in an evaluation of these settings."""
    if settings["max_gen_length"]:
        return f"at most {settings['max_gen_length']:,} new tokens"
    return f"a quarter more than a right answer, at most {settings['longest_room']:,} new tokens"


# ------------------------------------------------------------ devices, precision and seeds


def resolve_device(name: str):
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` as a ``torch.device`` that exists here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); try --device auto") from None
    return device


def moved(tensor, device):
    """A tensor from the CPU on a device, without waiting for what a GPU has still to do."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def multiplies_bf16(device) -> bool:
    """Whether the hardware has bf16 matrix instructions; elsewhere bf16 is emulated, slowly."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public name
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def bf16_pays(device) -> bool:
    """Whether matrix products are faster in bf16 than in fp32.

    With a CPU's instructions it takes a trial: AMD's make bf16 twice as fast, and on a Xeon whose
    tiles are hidden by a virtual machine fp32 is twice as fast.
    """
    import torch

    if not multiplies_bf16(device):
        return False
    if device.type != "cpu":
        return True
    return seconds_of_a_product(torch.bfloat16) < seconds_of_a_product(torch.float32)


def seconds_of_a_product(precision) -> float:
    """What a matrix product of the size of a small model's takes a CPU, at best."""
    import torch

    rows, weight = torch.ones(1024, 128).to(precision), torch.ones(128, 384).to(precision)
    return min(timeit.repeat(lambda: rows @ weight, number=4, repeat=10)) / 4


def resolve_precision(name: str, device):
    """The ``torch.dtype`` of the matrix products; weights and optimizer state are fp32 anyway."""
    import torch

    if name == "auto":
        name = "bf16" if bf16_pays(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def autocast(device, precision) -> contextlib.AbstractContextManager:
    """Matrix products in a precision; those of fp32 are left alone.

    Without torch's cache of cast weights: it is one for all threads, and whichever leaves its
    block first would empty it for the others. A forward pass uses each weight once anyway.
    """
    import torch

    return torch.autocast(
        device.type, precision, enabled=precision != torch.float32, cache_enabled=False
    )


def keep_freed_memory() -> None:
    """Have glibc keep the memory of large temporaries instead of returning it to the kernel.

    A training step on the CPU frees and takes the same megabytes again and again; getting them
    back costs a page fault every 4 KiB, a fifth of the whole step. Blocks of 16 MiB and more (the
    attention weights of long samples) do go back: kept, they are split for smaller ones and found
    too small when their like is needed again, which took half as much memory once more and saved
    no time. Without glibc this does nothing.
    """
    import ctypes

    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # names and values of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 1 << 24)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
        libc.mallopt(m_top_pad, 1 << 26)


def bound_kernel_caches() -> None:
    """Have oneDNN keep 64 compiled kernels instead of 1,024, unless the environment says otherwise.

    Each shape of a batch needs a few dozen in bf16, of some hundred KiB each, so that a run of many
    shapes would grow by half a GiB. The two caches read their size when the first kernel is made.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def prepare_training(threads: int, seed: int) -> None:
    """Bound memory, set threads (0 = torch's choice), kernels and seed, as every run does first.

    Torch is seeded on every device; the package draws from no other global generator.
    """
    import torch

    keep_freed_memory()
    bound_kernel_caches()
    # cuDNN's attention plans anew for every length of a batch, for longer than a step takes.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def derived_seed(*numbers: int) -> int:
    """A seed of its own for every combination of the numbers."""
    import numpy

    return int(numpy.random.SeedSequence(numbers).generate_state(1)[0])


def versions() -> dict[str, str]:
    """Versions of everything that can change a number; part of ``run.json``."""
    import numpy
    import tokenizers
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
    }


def processor() -> str:
    """The name of the processor, as far as the system tells."""
    return _of_cpuinfo("model name") or platform.processor()


def cpu_features() -> str:
    """What tells processors apart for which code is compiled, as far as the system tells."""
    features = _of_cpuinfo("flags") or _of_cpuinfo("Features")  # as Intel and AMD, or ARM have it
    return f"{platform.machine()} {processor()} {features}"


def _of_cpuinfo(name: str) -> str:
    """What Linux says of the first core under a name; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith(name)]
    return found[0] if found else ""
