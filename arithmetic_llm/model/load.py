"""Files to models: one call loads a checkpoint of any stage, an adapter or a PEFT folder."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arithmetic_llm.cli import build, read_json
from arithmetic_llm.config import LoRAConfig, ModelConfig
from arithmetic_llm.model.checkpoint import (
    Checkpoint,
    CheckpointData,
    _damaged,
    checked,
    description,
    hash_of,
    read_checkpoint,
    reason,
    weights_hash,
)
from arithmetic_llm.model.lora import adapter_weights, add_lora, merge_adapter
from arithmetic_llm.model.peft import (
    _PEFT_PREFIX,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    _from_peft,
    _peft_weights,
)
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError


def load_model(
    path: str | Path, device: torch.device | str = "cpu", base_checkpoint: str | Path = ""
) -> Checkpoint:
    """A model ready for use. An adapter is merged into its base, which is found by its hash.

    Args:
        path: a checkpoint of any stage, or a PEFT folder.
        base_checkpoint: where an adapter's base is, if it has moved.

    Raises:
        UserError: as `read_checkpoint`; weights that do not fit the model config; no base, or one
            for a model that needs none.
    """
    if Path(path).is_dir() and (Path(path) / "adapter_config.json").exists():
        checkpoint = load_peft_checkpoint(Path(path), base_checkpoint)
        checkpoint.model.to(device)
        return checkpoint
    content = read_checkpoint(path)
    if base_checkpoint and not content.adapter:
        raise UserError(
            f"{path}: is a whole model, not an adapter; merge nothing, leave --base-checkpoint out"
        )
    try:
        if content.adapter:
            model = _merged(content, path, base_checkpoint)
        else:
            model = build_model(content.config, content.tokenizer.vocab_size, content.weights)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None
    return Checkpoint(
        model.to(device),
        content.tokenizer,
        content.stage,
        content.trained_on,
        content.step,
        content.training,
    )


def _merged(
    content: CheckpointData, path: str | Path, base_checkpoint: str | Path
) -> ArithmeticModel:
    base = find_base(content.adapter, Path(path), base_checkpoint)
    # The shape as it was in training: the base's own context may have been another.
    model = build_model(content.config, content.tokenizer.vocab_size, base.model.state_dict())
    return merge_adapter(load_adapter(model, _adapter_config(content.adapter), content.weights))


def _adapter_config(adapter: dict[str, Any]) -> LoRAConfig:
    try:
        return build(LoRAConfig, adapter["config"], {})
    except UserError as error:
        raise ValueError(str(error)) from None


def find_base(adapter: dict[str, Any], path: Path, base_checkpoint: str | Path) -> Checkpoint:
    """The model that an adapter was trained on: where it was then, or in a run folder nearby.

    Raises:
        UserError: it is nowhere, or ``base_checkpoint`` is another model.
    """
    if base_checkpoint:
        base = load_model(base_checkpoint)
        if weights_hash(base.model) != adapter["base_hash"]:
            raise UserError(
                f"{base_checkpoint}: not the base of {path}; that was {adapter['base_path']}"
            )
        return base
    around = path.resolve().parents[1:3]  # models/ of models/RUN/x.pt and of models/grpo/RUN/x.pt
    nearby = [found for folder in around for found in sorted(folder.glob("*/*_model.pt"))]
    for candidate in (Path(adapter["base_path"]), *nearby):
        with contextlib.suppress(UserError):
            content = read_checkpoint(candidate)
            if content.adapter is None and hash_of(content.weights) == adapter["base_hash"]:
                return load_model(candidate)
    raise UserError(
        f"{path}: its base model {adapter['base_path']} is not there and none near it has the "
        "same weights; say where it is with --base-checkpoint, if need be in merge_lora_adapter.py"
    )


def load_peft_checkpoint(folder: Path, base_checkpoint: str | Path = "") -> Checkpoint:
    """A base with a PEFT folder's adapter merged into it.

    Stage, step, model config and ``trained_on`` are those of the adapter's training. A folder that
    PEFT itself wrote tells none of them: its stage is ``adapter``, its step 0, its config the
    base's, and ``trained_on`` is empty, which means unknown. The base's ``trained_on`` would call
    problems unseen that the adapter may have been trained on.

    Raises:
        UserError: as `load_peft`; damaged metadata; no base, or another one than the folder
            remembers.
    """
    metadata = _peft_weights(folder)[1]
    if base_hash := metadata.get("base_hash"):
        base_path = read_json(folder / PEFT_CONFIG).get("base_model_name_or_path")
        adapter = {"base_hash": base_hash, "base_path": str(base_path)}
        base = find_base(adapter, folder, base_checkpoint)
    elif base_checkpoint:  # PEFT itself does not write what it was trained on
        base = load_model(base_checkpoint)
    else:
        raise UserError(
            f"{folder}: does not say what its base is; name it with --base-checkpoint, if need be "
            "in merge_lora_adapter.py"
        )
    try:
        trained = _as_in_training(base, metadata.get("training"))
    except (KeyError, RecursionError, ValueError, UserError) as error:
        raise UserError(
            f"{folder / PEFT_WEIGHTS}: damaged metadata ({reason(error)}); use another copy"
        ) from None
    return replace(trained, model=merge_adapter(load_peft(folder, trained.model)))


def _as_in_training(base: Checkpoint, text: str | None) -> Checkpoint:
    """The base with what the metadata of a PEFT folder say of the adapter's training.

    Raises:
        KeyError, RecursionError, ValueError, UserError: they are damaged.
    """
    if text is None:
        return replace(base, stage="adapter", step=0, trained_on={})
    said = checked(dict, json.loads(text), "training")
    config = build(ModelConfig, checked(dict, said["model_config"], "model_config"), {})
    model = build_model(config, base.tokenizer.vocab_size, base.model.state_dict())
    return replace(base, model=model, **description(said))


def load_peft(folder: str | Path, base: ArithmeticModel) -> ArithmeticModel:
    """Put a PEFT folder's adapter on a model, in place; returns the model.

    Raises:
        UserError: files missing or damaged, an adapter of another kind, or for another shape.
    """
    folder = Path(folder)
    config = _from_peft(read_json(folder / PEFT_CONFIG), folder)
    weights, _ = _peft_weights(folder)
    try:
        ours = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in weights.items()}
        return load_adapter(base, config, ours)
    except ValueError as error:
        raise UserError(f"{folder}: does not fit this model ({error})") from None


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
    expected = adapter_weights(model) or model.state_dict()
    _same_shapes(expected, weights)
    model.load_state_dict(weights, strict=False)


def build_model(
    config: ModelConfig, vocab_size: int, weights: dict[str, Tensor]
) -> ArithmeticModel:
    """A model of these weights; nothing is allocated before the shapes are known to agree."""
    with torch.device("meta"):
        model = ArithmeticModel(config, vocab_size)
    _same_shapes(model.state_dict(), weights)
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def _same_shapes(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            raise ValueError(f"weight {name} is {'missing' if name in expected else 'unknown'}")
        if weights[name].shape != expected[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"weight {name} has shape {shapes}")


def check_tokenizer(checkpoint: Checkpoint, path: str, checkpoint_path: str) -> None:
    """Refuse a tokenizer other than the one inside the checkpoint; an empty path is fine."""
    if path and ArithmeticTokenizer.load(path).hash != checkpoint.tokenizer.hash:
        raise UserError(
            f"{path}: not the tokenizer that {checkpoint_path} was trained with; name that one"
        )
