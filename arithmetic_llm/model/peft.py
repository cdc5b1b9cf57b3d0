"""Adapters as files: beside a checkpoint, merged into one, and as a folder that PEFT reads."""

from __future__ import annotations

import dataclasses
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from arithmetic_llm.cli import build, read_json
from arithmetic_llm.config import AdapterFilesConfig, LoRAConfig, ModelConfig
from arithmetic_llm.model.checkpoint import (
    Checkpoint,
    Content,
    build_model,
    checked,
    description,
    find_base,
    load_adapter,
    load_checkpoint,
    read_checkpoint,
    reason,
    save_checkpoint,
    weights_hash,
)
from arithmetic_llm.model.lora import (
    add_lora,
    lora_config,
    merge_adapter,
    target_names,
    without_adapter,
)
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError, atomic_write, atomic_write_text, require_file

if TYPE_CHECKING:
    from arithmetic_llm.training.run import Run

BASE_MODEL = "base_model.pt"
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

    What a checkpoint says beside its weights is in their metadata, which PEFT passes over.
    """
    config, adapter = build(LoRAConfig, content.adapter["config"], {}), content.adapter
    weights = {_PEFT_PREFIX + name: t.contiguous() for name, t in content.weights.items()}
    data = _safetensors("safetensors.torch").save(weights, metadata=_metadata(content))
    with atomic_write(folder / PEFT_WEIGHTS) as file:
        file.write(data)
    text = json.dumps(peft_config(config, adapter["base_path"]), indent=2)
    atomic_write_text(folder / PEFT_CONFIG, text + "\n")


def _metadata(content: Content) -> dict[str, str]:
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
        base = load_checkpoint(base_checkpoint)
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
