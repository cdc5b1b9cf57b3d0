"""Safetensors files, the ecosystem's format for weights: tensors by name, and texts beside them."""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import Tensor

from arithmetic_llm.runtime import UserError, require_file


def to_bytes(weights: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return import_safetensors("safetensors.torch").save(plain, metadata=metadata)


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Args:
        what: the file holds, in words.

    Raises:
        UserError: safetensors is not installed; the file is missing or damaged.
    """
    module = import_safetensors("safetensors")
    path = require_file(path, what)
    try:
        with module.safe_open(path, "pt") as file:
            names = file.keys()  # the file itself is no iterable
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except module.SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); use another copy") from None


def import_safetensors(module: str):
    """A module of safetensors, imported when it is needed: it is an optional requirement.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError("this needs safetensors; pip install -r requirements-extras.txt") from None
