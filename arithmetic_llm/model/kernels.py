"""The functions of kernels.c, compiled for the processor at hand and called with tensors.

The first process that wants them has the system's C compiler make a library, in half a second; the
file is kept beside Python's own compiled ones. Where there is no compiler, or the environment has
``ARITHMETIC_LLM_KERNELS=torch``, `kernels_for` finds none and PyTorch's operations do the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from arithmetic_llm.runtime import cpu_features, quoted, reason

WHICH = "ARITHMETIC_LLM_KERNELS"  # of the environment
_SOURCE = Path(__file__).with_name("kernels.c")
# Not -ffast-math: it has every program that loads the library flush small numbers to zero. Loops
# that may add up in another order say so themselves (omp simd).
_FLAGS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_TYPES = {torch.float32: [], torch.bfloat16: ["-DBF16"]}
# For the processor at hand, as the compilers of Intel's and AMD's processors call it, or of ARM's.
_NATIVE = "-march" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu"


class _Numbers:
    """A tensor's memory as an argument of a C function."""

    @classmethod
    def from_param(cls, tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())


_ARGUMENTS = {"p": _Numbers, "n": ctypes.c_int64, "f": ctypes.c_float}
_FUNCTIONS = {  # pointers, whole numbers and floats, in the order of kernels.c
    "rms_norm": "ppppnnf",
    "rms_norm_backward": "ppppppnn",
    "heads": "ppppppnnnnnf",
    "heads_backward": "ppppppppnnnnn",
    "causal_softmax": "pnnnnnf",
    "softmax_backward": "ppnnf",
    "cached_attention": "ppppppnnnnnnnnf",
    "swiglu": "pppn",
    "swiglu_backward": "pppppn",
    "cross_entropy": "pppppnn",
}


def kernels_for(tensor: Tensor) -> ctypes.CDLL | None:
    """The compiled functions for a tensor's type of number; None where there are none.

    They take contiguous tensors of that type (of a cache a part), but fp32 weights and sums, and
    let other threads of Python run meanwhile.
    """
    found = _library(tensor.dtype) if tensor.device.type == "cpu" else None
    return found if isinstance(found, ctypes.CDLL) else None


def in_use(device: torch.device) -> str:
    """What computes between the matrix products on a device: ``compiled`` functions or ``torch``.

    Part of what a run stores, since the last bits of its weights depend on it.
    """
    compiled = device.type == "cpu" and isinstance(_library(torch.float32), ctypes.CDLL)
    return "compiled" if compiled else "torch"


def failure(device: torch.device) -> str:
    """Why there are no compiled functions on a device that could have some; else nothing."""
    found = _library(torch.float32) if device.type == "cpu" else ""
    return found if isinstance(found, str) else ""


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The library for numbers of a type, made if there is none yet; or why there is none."""
    if dtype not in _TYPES or os.environ.get(WHICH) == "torch":
        return ""
    asked = shlex.split(os.environ.get("CC") or "cc")
    compilers = [each for each in (asked, ["gcc"], ["clang"]) if shutil.which(each[0])]
    if not compilers:
        return "there is no C compiler (gcc or clang)"
    flags = [*_FLAGS, f"{_NATIVE}=native", *_TYPES[dtype]]
    try:
        library = ctypes.CDLL(str(_built(compilers[0], flags)))
    except subprocess.CalledProcessError as error:
        return f"{quoted(compilers[0])}: {(error.stderr.splitlines() or ['fails'])[-1]}"
    except (OSError, subprocess.SubprocessError) as error:  # nowhere to write or to run it, say
        return reason(error)
    for name, letters in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_ARGUMENTS[letter] for letter in letters], None
    return library


def _built(compiler: list[str], flags: list[str]) -> Path:
    """The file that a compiler makes of kernels.c for this processor."""
    version = _output([*compiler, "-v"])
    made_of = repr((_SOURCE.read_text(), compiler, flags, version, cpu_features()))
    folder = _SOURCE.parent / "__pycache__"
    path = folder / f"kernels.{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / path.name
            _output([*compiler, *flags, "-o", str(made), str(_SOURCE), "-lm"])
            os.replace(made, path)  # whole or not at all: several processes may be at it
    return path


def _output(command: list[str]) -> str:
    """What a command prints; an error if it fails."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr
