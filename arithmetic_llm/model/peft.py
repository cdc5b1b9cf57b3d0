"""PEFT's own format, file <-> data: a folder with a JSON config and a safetensors file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from arithmetic_llm.cli import build, read_json
from arithmetic_llm.config import LoRAConfig, ModelConfig
from arithmetic_llm.corpus.coverage import Coverage, to_dict
from arithmetic_llm.model.checkpoint import CheckpointData, description
from arithmetic_llm.model.lora import target_names
from arithmetic_llm.model.tensors import read_tensors, to_bytes
from arithmetic_llm.runtime import UserError, atomic_write, atomic_write_text, checked, reason

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


@dataclass
class PeftData:
    """Content of a PEFT folder, checked, before it becomes a part of a model.

    PEFT itself writes neither the base's hash nor anything of the training: the defaults are what
    is then known.
    """

    config: LoRAConfig
    weights: dict[str, Tensor]  # the adapter's, under our names
    base_path: str  # where the base was in training
    base_hash: str = ""
    model_config: ModelConfig | None = None  # the shape in training; None = the base's
    stage: str = "adapter"
    step: int = 0
    trained_on: Coverage | None = None


def is_peft_folder(path: str | Path) -> bool:
    """Whether the path is a folder of PEFT's, as its config shows."""
    return Path(path).is_dir() and (Path(path) / PEFT_CONFIG).exists()


# ------------------------------------------------------------------------------------- writing


def save_peft(folder: Path, data: CheckpointData) -> None:
    """Write the adapter of a checkpoint as PEFT does.

    What a checkpoint says beside its weights is in their metadata, which PEFT passes over.
    """
    config, adapter = build(LoRAConfig, data.adapter["config"], {}), data.adapter
    weights = {_PEFT_PREFIX + name: t.contiguous() for name, t in data.weights.items()}
    written = to_bytes(weights, _metadata(data))
    with atomic_write(folder / PEFT_WEIGHTS) as file:
        file.write(written)
    text = json.dumps(_to_peft(config, adapter["base_path"]), indent=2)
    atomic_write_text(folder / PEFT_CONFIG, text + "\n")


def _metadata(data: CheckpointData) -> dict[str, str]:
    """Texts, as safetensors has them: the hash of the base, and the training as one JSON object."""
    training = {
        "stage": data.stage,
        "step": data.step,
        "trained_on": to_dict(data.trained_on),
        "model_config": dataclasses.asdict(data.config),  # the base's context may be another
    }
    return {
        "format": "pt",
        "base_hash": data.adapter["base_hash"],
        "training": json.dumps(training),
    }


def _to_peft(config: LoRAConfig, base_path: str) -> dict[str, Any]:
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


# ------------------------------------------------------------------------------------- reading


def read_peft(folder: str | Path) -> PeftData:
    """Read a PEFT folder, written by this toolkit or by PEFT itself.

    Raises:
        UserError: files or metadata missing or damaged, or an adapter of another kind.
    """
    folder = Path(folder)
    weights, metadata = read_tensors(folder / PEFT_WEIGHTS, "adapter")
    settings = read_json(folder / PEFT_CONFIG)
    return PeftData(
        config=_from_peft(settings, folder),
        weights={name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in weights.items()},
        base_path=str(settings.get("base_model_name_or_path")),
        base_hash=metadata.get("base_hash", ""),
        **_training(metadata, folder),
    )


def _training(metadata: dict[str, str], folder: Path) -> dict[str, Any]:
    """Model config, stage, step and ``trained_on`` of the adapter's training; none if unknown."""
    if "training" not in metadata:
        return {}
    try:
        said = checked(dict, json.loads(metadata["training"]), "training")
        shape = checked(dict, said["model_config"], "model_config")
        return {"model_config": build(ModelConfig, shape, {}), **description(said)}
    except (KeyError, RecursionError, ValueError, UserError) as error:
        raise damaged_metadata(folder, error) from None


def damaged_metadata(folder: Path, error: BaseException) -> UserError:
    """The refusal of a PEFT folder whose metadata do not hold."""
    return UserError(
        f"{folder / PEFT_WEIGHTS}: damaged metadata ({reason(error)}); use another copy"
    )


def _from_peft(settings: dict[str, Any], folder: Path) -> LoRAConfig:
    """PEFT's settings under our names.

    Raises:
        UserError: a kind of adapter that would not compute here what it does there.
    """
    _check_plain(settings, folder)
    values = {
        "lora_rank": settings.get("r"),
        "lora_alpha": settings.get("lora_alpha"),
        "lora_target_modules": _comma_separated(settings.get("target_modules")),
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


def _is_empty(value: Any) -> bool:
    """Whether a setting is off; 0 is not, it may be the number of a layer."""
    return value is None or value is False or value in ("", [], {})


def _comma_separated(targets: Any) -> str:
    return ",".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets)
