"""Adapters of a training run: a fresh one at its start, a file of its base, files at its end."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

from arithmetic_llm.config import AdapterFilesConfig, LoRAConfig
from arithmetic_llm.distributed import is_main
from arithmetic_llm.folders import BEST
from arithmetic_llm.model.checkpoint import (
    Checkpoint,
    read_checkpoint,
    save_checkpoint,
    weights_hash,
)
from arithmetic_llm.model.load import load_model
from arithmetic_llm.model.lora import add_lora, lora_config, without_adapter
from arithmetic_llm.model.peft import is_peft_folder, read_peft, save_peft
from arithmetic_llm.runtime import atomic_write

BASE_MODEL = "base_model.pt"


def with_adapter(checkpoint: Checkpoint, config: LoRAConfig, base_path: str) -> Checkpoint:
    """The checkpoint with a fresh adapter on its model, whose own weights are frozen, in place."""
    adapter = {
        "config": dataclasses.asdict(lora_config(config)),
        "base_hash": weights_hash(checkpoint.model),
        "base_path": base_path,
    }
    return replace(checkpoint, model=add_lora(checkpoint.model, config), adapter=adapter)


def keep_base(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``base_model.pt`` into a run's folder if the base is in no file of its own.

    A run that starts from an adapter has such a base: the merged model. What the file says of its
    training is what that adapter says, and nothing of the run that begins.
    """
    path = folder / BASE_MODEL
    start = Path(checkpoint.adapter["base_path"])
    if is_peft_folder(start):
        said = read_peft(start)
    elif not (said := read_checkpoint(start)).adapter:
        return
    if is_main() and not path.exists():
        past = {"stage": said.stage, "step": said.step, "trained_on": said.trained_on}
        base = without_adapter(checkpoint.model)
        save_checkpoint(path, replace(checkpoint, model=base, adapter=None, **past))
    checkpoint.adapter["base_path"] = str(path)


def save_adapter_files(folder: Path, config: AdapterFilesConfig) -> None:
    """Write ``lora_adapter.pt`` of a run's best model, and what else ``config`` asks for."""
    best = folder / BEST
    with atomic_write(folder / "lora_adapter.pt") as file:
        file.write(best.read_bytes())
    if config.save_merged_model:
        save_checkpoint(folder / "merged_model.pt", load_model(best))
    if config.save_peft_adapter:
        save_peft(folder / "peft_adapter", read_checkpoint(best))
