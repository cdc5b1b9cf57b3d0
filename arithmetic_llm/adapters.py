"""Adapters as files: beside a checkpoint, merged into one, and as a folder that PEFT reads."""

from __future__ import annotations

import dataclasses
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from arithmetic_llm.checkpoint import (
    Checkpoint,
    Content,
    find_base,
    load_checkpoint,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    weights_hash,
)
from arithmetic_llm.cli import build, read_json
from arithmetic_llm.config import AdapterFilesConfig, LoRAConfig
from arithmetic_llm.lora import (
    add_lora,
    lora_config,
    merge_adapter,
    target_names,
    without_adapter,
)
from arithmetic_llm.model import ArithmeticModel
from arithmetic_llm.runtime import UserError, atomic_write, atomic_write_text, require_file

if TYPE_CHECKING:
    from arithmetic_llm.runs import Run

BASE_MODEL = "base_model.pt"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
# Settings of PEFT's that would compute something else from weights of the same names and shapes.
_PEFT_UNSUPPORTED = (
    "alpha_pattern",
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "use_dora",
    "use_qalora",
)


def with_adapter(checkpoint: Checkpoint, config: LoRAConfig, base_path: str) -> Checkpoint:
    """The checkpoint with a fresh adapter on its model, which is frozen from now on."""
    adapter = {
        "config": dataclasses.asdict(lora_config(config)),
        "base_hash": weights_hash(checkpoint.model),
        "base_path": base_path,
    }
    return replace(checkpoint, model=add_lora(checkpoint.model, config), adapter=adapter)


def keep_base(run: Run) -> None:
    """Write ``base_model.pt`` into the run's folder if the base is in no file of its own.

    That is so if the run started from an adapter: its base is then the merged model.
    """
    checkpoint, path = run.checkpoint, run.folder / BASE_MODEL
    start = Path(checkpoint.adapter["base_path"])
    if start.is_file() and read_checkpoint(start).adapter is None:
        return
    if not path.exists():
        base = without_adapter(checkpoint.model)
        save_checkpoint(path, replace(checkpoint, model=base, adapter=None))
    checkpoint.adapter["base_path"] = str(path)


def parameter_summary(model: ArithmeticModel) -> str:
    """``861,568 parameters``, and how many of them train if not all do."""
    total = model.parameter_count()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trainable == total:
        return f"{total:,} parameters"
    return f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %) train"


def save_adapter_files(run: Run, config: AdapterFilesConfig) -> None:
    """From a run's best model: ``lora_adapter.pt``, and what else ``config`` asks for."""
    best = run.folder / "best_model.pt"
    with atomic_write(run.folder / "lora_adapter.pt") as file:
        file.write(best.read_bytes())
    if config.save_merged_model:
        save_checkpoint(run.folder / "merged_model.pt", load_checkpoint(best))
    if config.save_peft_adapter:
        save_peft(run.folder / "peft_adapter", read_checkpoint(best))


# --------------------------------------------------------------------------- PEFT's own format


def save_peft(folder: Path, content: Content) -> None:
    """Write the adapter of a checkpoint as PEFT does: a JSON config and a safetensors file.

    The metadata of the weights, which PEFT passes over, hold the hash of their base.
    """
    config, adapter = build(LoRAConfig, content.adapter["config"], {}), content.adapter
    weights = {_PEFT_PREFIX + name: t.contiguous() for name, t in content.weights.items()}
    metadata = {"format": "pt", "base_hash": adapter["base_hash"]}
    data = _safetensors("safetensors.torch").save(weights, metadata=metadata)
    with atomic_write(folder / PEFT_WEIGHTS) as file:
        file.write(data)
    text = json.dumps(peft_config(config, adapter["base_path"]), indent=2)
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


def load_peft_checkpoint(folder: Path, base_checkpoint: str | Path = "") -> Checkpoint:
    """A base with a PEFT folder's adapter merged into it.

    Raises:
        UserError: as `load_peft`; no base, or another one than the folder remembers.
    """
    base_path = read_json(folder / PEFT_CONFIG).get("base_model_name_or_path")
    if base_hash := _base_hash(folder):
        adapter = {"base_hash": base_hash, "base_path": str(base_path)}
        base = find_base(adapter, folder, base_checkpoint)
    elif base_checkpoint:  # PEFT itself does not write what it was trained on
        base = load_checkpoint(base_checkpoint)
    else:
        raise UserError(
            f"{folder}: does not say what its base is; name it with --base-checkpoint, if need be "
            "in merge_lora_adapter.py"
        )
    return replace(base, model=merge_adapter(load_peft(folder, base.model)))


def load_peft(folder: str | Path, base: ArithmeticModel) -> ArithmeticModel:
    """Put a PEFT folder's adapter on a model, in place; returns the model.

    Raises:
        UserError: files missing or damaged, an adapter of another kind, or for another shape.
    """
    folder = Path(folder)
    config = _from_peft(read_json(folder / PEFT_CONFIG), folder)
    weights, _ = _peft_weights(folder)
    try:
        return _with_weights(base, config, weights)
    except ValueError as error:
        raise UserError(f"{folder}: does not fit this model ({error})") from None


def _with_weights(
    base: ArithmeticModel, config: LoRAConfig, weights: dict[str, Tensor]
) -> ArithmeticModel:
    model = add_lora(base, config)
    load_weights(model, {n.removeprefix(_PEFT_PREFIX): t for n, t in weights.items()})
    return model


def _from_peft(settings: dict[str, Any], folder: Path) -> LoRAConfig:
    """PEFT's settings under our names.

    Raises:
        UserError: a kind of adapter that would not compute here what it does there.
    """
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        raise UserError(f"{folder}: not a plain LoRA adapter without biases")
    if used := [name for name in _PEFT_UNSUPPORTED if settings.get(name)]:
        raise UserError(f"{folder}: not a plain LoRA adapter, it uses {', '.join(used)}")
    targets = settings.get("target_modules")
    values = {
        "lora_rank": settings.get("r"),
        "lora_alpha": settings.get("lora_alpha"),
        "lora_target_modules": ",".join(sorted(targets)) if isinstance(targets, list) else targets,
        "lora_dropout": settings.get("lora_dropout", 0.0),
        "use_rslora": settings.get("use_rslora", False),
    }
    try:
        target_names(str(values["lora_target_modules"]))
        return build(LoRAConfig, values, {})
    except (TypeError, UserError) as error:
        raise UserError(
            f"{folder / PEFT_CONFIG}: not settings of a LoRA adapter ({error})"
        ) from None


def _base_hash(folder: Path) -> str:
    """What the folder remembers of its base; empty if it is not ours."""
    return _peft_weights(folder)[1].get("base_hash", "")


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
