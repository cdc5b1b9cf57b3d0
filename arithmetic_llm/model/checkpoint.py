"""Checkpoints, file <-> data: one file that describes itself, written whole and read with care."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arithmetic_llm.cli import build
from arithmetic_llm.config import ModelConfig
from arithmetic_llm.corpus.coverage import Coverage, from_dict, to_dict
from arithmetic_llm.model.lora import adapter_weights
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError, atomic_write, checked, reason, require_file

FORMAT = "arithmetic_llm checkpoint 1"


@dataclass
class Checkpoint:
    """A model with all that belongs to it: its tokenizer, and what it was trained on."""

    model: ArithmeticModel
    tokenizer: ArithmeticTokenizer
    stage: str  # "foundational", "instruction", ...
    trained_on: Coverage | None = None  # None if nothing is known
    step: int = 0
    training: dict[str, Any] = field(default_factory=dict)  # what --resume needs; else empty
    adapter: dict[str, Any] | None = None  # of a model with LoRA: its config and its base


@dataclass
class CheckpointData:
    """Content of a checkpoint file, checked, before it becomes a model."""

    config: ModelConfig
    weights: dict[str, Tensor]  # the whole model's; an adapter's alone if there is one
    tokenizer: ArithmeticTokenizer
    stage: str
    trained_on: Coverage | None
    step: int
    training: dict[str, Any]
    adapter: dict[str, Any] | None  # config, base_hash and base_path; None of a whole model


# ------------------------------------------------------------------------------------- writing


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint file, whole or not at all; it loads with ``weights_only=True``.

    The file needs no other one, unless the model has an adapter: then it holds the adapter alone
    and the hash of its base.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    weights = adapter_weights(model) if checkpoint.adapter else model.state_dict()
    content = {
        "format": FORMAT,
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "model_config": dataclasses.asdict(model.config),
        "weights": {name: tensor.detach().cpu() for name, tensor in weights.items()},
        "tokenizer": tokenizer.serialized,
        "tokenizer_hash": tokenizer.hash,
        "trained_on": to_dict(checkpoint.trained_on),
        "training": checkpoint.training,
        "adapter": checkpoint.adapter,
    }
    memory = io.BytesIO()  # straight to a full disk, torch would fail with an error of its own
    torch.save(content, memory)
    # Left open, a view that an error holds on to crashes Python 3.12.1's garbage collector.
    with atomic_write(path) as file, memory.getbuffer() as view:
        file.write(view)


# ------------------------------------------------------------------------------------- reading


def read_checkpoint(path: str | Path) -> CheckpointData:
    """Read a checkpoint file without executing anything in it.

    Raises:
        UserError: no file, truncated, not a checkpoint of this package, code instead of data,
            parts missing or of another form, weights that are not finite.
    """
    path = require_file(path, "checkpoint")
    raw = _read(path)
    try:
        return CheckpointData(
            config=build(ModelConfig, checked(dict, raw["model_config"], "model_config"), {}),
            weights=finite(raw["weights"]),
            tokenizer=_with_hash(ArithmeticTokenizer(raw["tokenizer"]), raw["tokenizer_hash"]),
            training=checked(dict, raw["training"], "training"),
            adapter=_adapter(raw["adapter"]),
            **description(raw),
        )
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        raise damaged(path, error) from None


def _read(path: Path) -> dict[str, Any]:
    """Plain values and tensors of the file, unchecked but for their format.

    Raises:
        UserError: truncated, damaged, another format, or code instead of data.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a checkpoint, or a truncated one; use another checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip():  # torch does not compare the check sums
                raise ValueError(f"the bytes of {part} have changed")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for damaged archives
        if "Weights only load failed" in str(error):
            why = "it holds code, not only weights, and was not executed"
        else:
            why = f"damaged: {reason(error)}"
        raise UserError(f"{path}: refused ({why}); use a checkpoint of this toolkit") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this toolkit; train one, or name another")
    return content


def finite(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in fp32, however they are stored; none is NaN or infinite."""
    for name, tensor in checked(dict[str, torch.Tensor], weights, "weights").items():
        if tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise ValueError(f"weight {name} is no plain tensor of fractions")
        if not tensor.isfinite().all():
            raise ValueError(f"weight {name} holds NaN or infinity")
    return {name: tensor.float() for name, tensor in weights.items()}


def _with_hash(tokenizer: ArithmeticTokenizer, expected: str) -> ArithmeticTokenizer:
    if tokenizer.hash != expected:
        raise ValueError("its tokenizer is another than it was trained with")
    return tokenizer


def _adapter(said: Any) -> dict[str, Any] | None:
    if said is None:
        return None
    for key, form in {"config": dict, "base_hash": str, "base_path": str}.items():
        checked(form, checked(dict, said, "adapter")[key], f"adapter {key}")
    return said


def description(said: Any) -> dict[str, Any]:
    """Stage, step and ``trained_on`` of a model as a file states them, checked.

    Raises:
        KeyError, TypeError, ValueError: missing, or of another form.
    """
    stage, step = checked(str, said["stage"], "stage"), checked(int, said["step"], "step")
    if step < 0:
        raise ValueError(f"step is {step}")
    trained_on = from_dict(checked(dict, said["trained_on"], "trained_on"))
    return {"stage": stage, "step": step, "trained_on": trained_on}


def damaged(path: str | Path, error: BaseException) -> UserError:
    """Refusal of a checkpoint file that does not hold what it should."""
    return UserError(f"{path}: damaged checkpoint ({reason(error)}); use another")


# ------------------------------------------------------------------------- identity of weights


def weights_hash(model: ArithmeticModel) -> str:
    """SHA-256 over names and values of all weights; an adapter knows its base by it."""
    return hash_of(model.state_dict())


def hash_of(weights: dict[str, Tensor]) -> str:
    """`weights_hash` of weights that are not in a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
