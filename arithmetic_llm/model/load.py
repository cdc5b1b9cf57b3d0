"""Files to models: one call loads a whole model, an adapter, or a PEFT folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arithmetic_llm.cli import build
from arithmetic_llm.config import LoRAConfig, ModelConfig
from arithmetic_llm.model.checkpoint import (
    Checkpoint,
    CheckpointData,
    damaged,
    hash_of,
    read_checkpoint,
    weights_hash,
)
from arithmetic_llm.model.lora import adapter_weights, add_lora, merge_adapter
from arithmetic_llm.model.peft import PeftData, damaged_metadata, is_peft_folder, read_peft
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError


def load_model(
    path: str | Path, device: torch.device | str = "cpu", base: str | Path = ""
) -> Checkpoint:
    """A model ready for use; an adapter comes merged into its base, which is found by its hash.

    Args:
        path: a checkpoint of any stage, or a PEFT folder.
        base: where an adapter's base is, if it has moved.

    Raises:
        UserError: as `read_checkpoint` and `read_peft`; weights that do not fit the model config;
            no base, or one for a model that needs none.
    """
    if is_peft_folder(path):
        checkpoint = _from_peft(read_peft(path), Path(path), base)
    else:
        data = read_checkpoint(path)
        if base and not data.adapter:
            raise UserError(
                f"{path}: is a whole model, not an adapter; merge nothing, leave "
                "--base-checkpoint out"
            )
        checkpoint = _from_data(data, path, base)
    checkpoint.model.to(device)
    return checkpoint


def check_tokenizer(checkpoint: Checkpoint, path: str, checkpoint_path: str) -> None:
    """Refuse a tokenizer other than the one inside the checkpoint; an empty path is fine."""
    if path and ArithmeticTokenizer.load(path).hash != checkpoint.tokenizer.hash:
        raise UserError(
            f"{path}: not the tokenizer that {checkpoint_path} was trained with; name that one"
        )


# ------------------------------------------------------------------ what a file holds -> a model


def _from_data(data: CheckpointData, path: str | Path, base: str | Path = "") -> Checkpoint:
    """The model of a checkpoint file; ``path`` is where an adapter's base is looked for."""
    try:
        model = _merged(data, Path(path), base) if data.adapter else _whole(data, data.weights)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from None
    return Checkpoint(model, data.tokenizer, data.stage, data.trained_on, data.step, data.training)


def _whole(data: CheckpointData, weights: dict[str, Tensor]) -> ArithmeticModel:
    return build_model(data.config, data.tokenizer.vocab_size, weights)


def _merged(data: CheckpointData, path: Path, base: str | Path) -> ArithmeticModel:
    config = data.adapter["config"]
    start = find_base(path, data.adapter["base_hash"], data.adapter["base_path"], base)
    # The shape as it was in training: the base's own context may have been another.
    model = _whole(data, start.model.state_dict())
    return merge_adapter(load_adapter(model, _lora_config(config), data.weights))


def _lora_config(settings: dict[str, Any]) -> LoRAConfig:
    try:
        return build(LoRAConfig, settings, {})
    except UserError as error:  # of a file, not of a command line: the caller names the file
        raise ValueError(str(error)) from None


def _from_peft(data: PeftData, folder: Path, base: str | Path) -> Checkpoint:
    """The base with a PEFT folder's adapter merged into it.

    Stage, step, model config and ``trained_on`` are those of the adapter's training. A folder that
    PEFT itself wrote tells none of them: its stage is ``adapter``, its step 0, its config the
    base's, and ``trained_on`` is None, which means unknown. The base's ``trained_on`` would call
    problems unseen that the adapter may have been trained on.
    """
    start = _base_of_peft(data, folder, base)
    if data.model_config:
        try:
            weights, vocab_size = start.model.state_dict(), start.tokenizer.vocab_size
            start = replace(start, model=build_model(data.model_config, vocab_size, weights))
        except ValueError as error:
            raise damaged_metadata(folder, error) from None
    try:
        adapted = load_adapter(start.model, data.config, data.weights)
    except ValueError as error:
        raise UserError(f"{folder}: does not fit this model ({error})") from None
    said = {"stage": data.stage, "step": data.step, "trained_on": data.trained_on}
    return replace(start, model=merge_adapter(adapted), **said)


# ----------------------------------------------------------------------------- the base's place


def _base_of_peft(data: PeftData, folder: Path, base: str | Path) -> Checkpoint:
    if data.base_hash:
        return find_base(folder, data.base_hash, data.base_path, base)
    if base:  # PEFT itself does not write what it was trained on: any base that fits will do
        return load_model(base)
    raise UserError(
        f"{folder}: does not say what its base is; name it with --base-checkpoint, if need be "
        "in merge_lora_adapter.py"
    )


def find_base(path: Path, base_hash: str, base_path: str, named: str | Path = "") -> Checkpoint:
    """The model that an adapter was trained on: where it was then, or in a run folder nearby.

    Args:
        path: the adapter's own.
        base_hash: `weights_hash` of the base.
        base_path: where it was in training.
        named: where it is, if the user says so.

    Raises:
        UserError: it is nowhere, or ``named`` is another model.
    """
    if named:
        base = load_model(named)
        if weights_hash(base.model) != base_hash:
            raise UserError(f"{named}: not the base of {path}; that was {base_path}")
        return base
    for candidate in (Path(base_path), *_models_nearby(path)):
        with contextlib.suppress(UserError):  # damaged, or no checkpoint: the next one, then
            data = read_checkpoint(candidate)
            if data.adapter is None and hash_of(data.weights) == base_hash:
                return _from_data(data, candidate)
    raise UserError(
        f"{path}: its base model {base_path} is not there and none near it has the "
        "same weights; say where it is with --base-checkpoint, if need be in merge_lora_adapter.py"
    )


def _models_nearby(path: Path) -> Iterator[Path]:
    """``models/*/*_model.pt`` of an adapter at ``models/RUN/x.pt`` or ``models/grpo/RUN/x.pt``."""
    for folder in path.resolve().parents[1:3]:
        yield from sorted(folder.glob("*/*_model.pt"))


# ---------------------------------------------------------------------- weights into a model


def build_model(
    config: ModelConfig, vocab_size: int, weights: dict[str, Tensor]
) -> ArithmeticModel:
    """A model of these weights; nothing is allocated before the shapes are known to agree.

    Raises:
        ValueError: names or shapes differ.
    """
    with torch.device("meta"):
        model = ArithmeticModel(config, vocab_size)
    _check_shapes(model.state_dict(), weights)
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:  # assigning has put two tensors where one was
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def load_adapter(
    model: ArithmeticModel, config: LoRAConfig, weights: dict[str, Tensor]
) -> ArithmeticModel:
    """Put an adapter of these weights on a model, in place; returns the model.

    Raises:
        ValueError: the weights are of another rank, or their names or shapes differ.
    """
    ranks = {w.shape[0] for name, w in weights.items() if name.endswith("lora_A.weight") and w.ndim}
    if ranks != {config.lora_rank}:  # before a huge rank takes all memory
        raise ValueError(f"rank {config.lora_rank} in its settings, {sorted(ranks)} in its weights")
    load_weights(add_lora(model, config), weights)
    return model


def load_weights(model: ArithmeticModel, weights: dict[str, Tensor]) -> None:
    """Copy weights into a model, or an adapter's into a model with that adapter.

    Raises:
        ValueError: names or shapes differ.
    """
    _check_shapes(adapter_weights(model) or model.state_dict(), weights)
    model.load_state_dict(weights, strict=False)  # of an adapter the base's are missing


def _check_shapes(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            raise ValueError(f"weight {name} is {'missing' if name in expected else 'unknown'}")
        if weights[name].shape != expected[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"weight {name} has shape {shapes}")
