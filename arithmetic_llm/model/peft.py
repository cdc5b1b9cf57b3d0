"""PEFT's own format: a folder with a JSON config and a safetensors file."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from arithmetic_llm.cli import build
from arithmetic_llm.config import LoRAConfig
from arithmetic_llm.model.checkpoint import (
    CheckpointData,
)
from arithmetic_llm.model.lora import (
    target_names,
)
from arithmetic_llm.runtime import UserError, atomic_write, atomic_write_text, require_file

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_PEFT_READ = {  # settings of PEFT's that have a meaning here
    "base_model_name_or_path",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "target_modules",
    "use_rslora",
}
# Settings that change nothing in what a plain LoRA adapter on linear layers computes, whatever they
# say; those of an initialisation act only beside an `init_lora_weights` that is refused, or on the
# adapter's own weights. Any other setting, one of a later PEFT included, must be empty.
_PEFT_IDLE = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",  # of embedding and head, which are never targets
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Ways to begin, beside true and false, that leave the base's weights alone. The others (pissa,
# olora, corda, lora_ga, loftq) train beside a changed base, which the adapter's file does not hold.
_PEFT_INITS = ("eva", "gaussian", "mica", "orthogonal")


def save_peft(folder: Path, content: CheckpointData) -> None:
    """Write the adapter of a checkpoint as PEFT does: a JSON config and a safetensors file.

    What a checkpoint says beside its weights is in their metadata, which PEFT passes over.
    """
    config, adapter = build(LoRAConfig, content.adapter["config"], {}), content.adapter
    weights = {_PEFT_PREFIX + name: t.contiguous() for name, t in content.weights.items()}
    data = _safetensors("safetensors.torch").save(weights, metadata=_metadata(content))
    with atomic_write(folder / PEFT_WEIGHTS) as file:
        file.write(data)
    text = json.dumps(peft_config(config, adapter["base_path"]), indent=2)
    atomic_write_text(folder / PEFT_CONFIG, text + "\n")


def _metadata(content: CheckpointData) -> dict[str, str]:
    """Texts, as safetensors has them: the hash of the base, and the training as one JSON object."""
    training = {
        "stage": content.stage,
        "step": content.step,
        "trained_on": content.trained_on,
        "model_config": dataclasses.asdict(content.config),  # the base's context may be another
    }
    return {
        "format": "pt",
        "base_hash": content.adapter["base_hash"],
        "training": json.dumps(training),
    }


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


def _check_plain(settings: dict[str, Any], folder: Path) -> None:
    """Refuse PEFT's settings of an adapter that would not compute here what it does there."""
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        raise UserError(f"{folder}: not a plain LoRA adapter without biases; train one")
    others = settings.keys() - _PEFT_READ - _PEFT_IDLE
    if names := ", ".join(sorted(name for name in others if not _is_empty(settings[name]))):
        raise UserError(f"{folder}: not a plain LoRA adapter, it uses {names}; train one without")
    start = settings.get("init_lora_weights")
    if not (start is None or isinstance(start, bool) or start in _PEFT_INITS):
        raise UserError(
            f"{folder}: init_lora_weights {start!r} is not known to leave the base's weights as "
            "they are; save the adapter with PEFT's path_initial_model_for_weight_conversion, or "
            "train it with another initialisation"
        )


def _comma_separated(targets: Any) -> str:
    return ",".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets)


def _is_empty(value: Any) -> bool:
    """Whether a setting is off; 0 is not, it may be the number of a layer."""
    return value is None or value is False or value in ("", [], {})


def _from_peft(settings: dict[str, Any], folder: Path) -> LoRAConfig:
    """PEFT's settings under our names.

    Raises:
        UserError: a kind of adapter that would not compute here what it does there.
    """
    _check_plain(settings, folder)
    targets = settings.get("target_modules")
    values = {
        "lora_rank": settings.get("r"),
        "lora_alpha": settings.get("lora_alpha"),
        "lora_target_modules": _comma_separated(targets),
        "lora_dropout": settings.get("lora_dropout", 0.0),
        "use_rslora": settings.get("use_rslora", False),
    }
    try:
        target_names(values["lora_target_modules"])
        return build(LoRAConfig, values, {})
    except (TypeError, UserError) as error:
        raise UserError(
            f"{folder / PEFT_CONFIG}: not settings of a LoRA adapter ({error})"
        ) from None


def _peft_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a PEFT folder, and the metadata beside them."""
    safetensors = _safetensors("safetensors")
    path = require_file(folder / PEFT_WEIGHTS, "adapter")
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()  # the file itself is no iterable
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); use another copy") from None


def _safetensors(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            "PEFT folders need safetensors; pip install -r requirements-extras.txt"
        ) from None
