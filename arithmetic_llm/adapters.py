"""Adapters as files: beside a checkpoint, merged into one, and as a folder that PEFT reads."""

from __future__ import annotations

import dataclasses
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from arithmetic_llm.checkpoint import (
    Checkpoint,
    Content,
    load_checkpoint,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    weights_hash,
)
from arithmetic_llm.cli import build, read_json
from arithmetic_llm.config import LoRAConfig, LoRAInstructionConfig
from arithmetic_llm.lora import add_lora, lora_config, merge_adapter, target_names
from arithmetic_llm.model import ArithmeticModel
from arithmetic_llm.runtime import UserError, atomic_write, atomic_write_text, require_file
from arithmetic_llm.trainer import Run

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def with_adapter(checkpoint: Checkpoint, config: LoRAConfig, base_path: str) -> Checkpoint:
    """The checkpoint with a fresh adapter on its model, which is frozen from now on."""
    adapter = {
        "config": dataclasses.asdict(lora_config(config)),
        "base_hash": weights_hash(checkpoint.model),
        "base_path": base_path,
    }
    return replace(checkpoint, model=add_lora(checkpoint.model, config), adapter=adapter)


def parameter_summary(model: ArithmeticModel) -> str:
    """``861,568 parameters``, and how many of them train if not all do."""
    total = model.parameter_count()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trainable == total:
        return f"{total:,} parameters"
    return f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %) train"


def save_adapter_files(run: Run, config: LoRAInstructionConfig) -> None:
    """From a run's best model: ``lora_adapter.pt``, and what else ``config`` asks for."""
    best = run.folder / "best_model.pt"
    content = read_checkpoint(best)
    with atomic_write(run.folder / "lora_adapter.pt") as file:
        file.write(best.read_bytes())
    if config.save_merged_model:
        merged = load_checkpoint(best, base_checkpoint=content.adapter["base_path"])
        save_checkpoint(run.folder / "merged_model.pt", merged)
    if config.save_peft_adapter:
        save_peft(run.folder / "peft_adapter", content)


def merge_files(base_path: str, adapter_path: str) -> Checkpoint:
    """A model with an adapter merged in; the adapter is a ``.pt`` file or a PEFT folder.

    Raises:
        UserError: not an adapter, or one of another base.
    """
    if Path(adapter_path).is_dir():
        base = load_checkpoint(base_path)
        return replace(base, model=merge_adapter(load_peft(adapter_path, base.model)))
    if read_checkpoint(adapter_path).adapter is None:
        raise UserError(f"{adapter_path}: is a whole model, not an adapter; there is none to merge")
    return load_checkpoint(adapter_path, base_checkpoint=base_path)


# --------------------------------------------------------------------------- PEFT's own format


def save_peft(folder: Path, content: Content) -> None:
    """Write the adapter of a checkpoint as PEFT does: a JSON config and a safetensors file."""
    config = build(LoRAConfig, content.adapter["config"], {})
    save = _safetensors().save
    weights = {_PEFT_PREFIX + name: t.contiguous() for name, t in content.weights.items()}
    with atomic_write(folder / PEFT_WEIGHTS) as file:
        file.write(save(weights, metadata={"format": "pt"}))
    text = json.dumps(peft_config(config, content.adapter["base_path"]), indent=2)
    atomic_write_text(folder / PEFT_CONFIG, text + "\n")


def peft_config(config: LoRAConfig, base_path: str) -> dict[str, Any]:
    """Our settings under PEFT's names."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_path,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(target_names(config.lora_target_modules)),
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def load_peft(folder: str | Path, base: ArithmeticModel) -> ArithmeticModel:
    """Put a PEFT folder's adapter on a model, in place; returns the model.

    Raises:
        UserError: files missing, another kind of adapter, or one for a model of another shape.
    """
    folder = Path(folder)
    model = add_lora(base, _from_peft(read_json(folder / PEFT_CONFIG), folder))
    data = require_file(folder / PEFT_WEIGHTS, "adapter").read_bytes()
    try:
        weights: dict[str, Tensor] = _safetensors().load(data)
        load_weights(model, {n.removeprefix(_PEFT_PREFIX): t for n, t in weights.items()})
    except Exception as error:  # safetensors raises its own kind for damaged files
        raise UserError(f"{folder}: does not fit this model ({error})") from None
    return model


def _from_peft(settings: dict[str, Any], folder: Path) -> LoRAConfig:
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        raise UserError(f"{folder}: not a plain LoRA adapter without biases")
    targets = settings["target_modules"]
    return LoRAConfig(
        lora_rank=settings["r"],
        lora_alpha=float(settings["lora_alpha"]),
        lora_target_modules=targets if isinstance(targets, str) else ",".join(sorted(targets)),
        lora_dropout=float(settings.get("lora_dropout", 0.0)),
        use_rslora=bool(settings.get("use_rslora", False)),
    )


def _safetensors():
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        raise UserError(
            "PEFT folders need safetensors; pip install -r requirements-extras.txt"
        ) from None
