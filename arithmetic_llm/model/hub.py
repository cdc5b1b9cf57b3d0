"""The Hugging Face ecosystem's folder of a model, file <-> data: Qwen3 under its own names.

Nothing is converted but names of settings: the weights have that architecture's names and shapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arithmetic_llm.cli import build, read_json
from arithmetic_llm.config import ModelConfig
from arithmetic_llm.corpus.coverage import to_dict
from arithmetic_llm.model.card import Metrics, card_text
from arithmetic_llm.model.checkpoint import (
    Checkpoint,
    description,
    finite,
    hash_of,
    weights_hash,
)
from arithmetic_llm.model.load import build_model
from arithmetic_llm.model.peft import PEFT_CONFIG
from arithmetic_llm.model.tensors import read_tensors, to_bytes
from arithmetic_llm.model.tokenizer import BOS, EOS, FILE_NAME, PAD, UNK, ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError, atomic_write_all, checked, reason
from arithmetic_llm.task.text import SPECIAL_TOKENS

PAST = "arithmetic_llm"  # of config.json, which others keep without reading it
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_FULL, _SLIDING = "full_attention", "sliding_attention"  # a layer's attention, in their words
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What this toolkit's transformer is and cannot be otherwise. Left out, each is the default there.
_FIXED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "quantization_config": None,
}
# In transformers' words, what must be said of the shape.
_SIZES = {
    "hidden_size": "d_model",
    "num_attention_heads": "nhead",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "dim_feedforward",
    "max_position_embeddings": "max_seq_length",
}
# Files that loaders would prefer to, or combine with, what is written beside them.
_IN_THE_WAY = (PEFT_CONFIG, f"{WEIGHTS}.index.json")


# ------------------------------------------------------------------------------------- writing


def write_hub_folder(
    folder: str | Path, checkpoint: Checkpoint, metrics: Metrics | None = None
) -> None:
    """Write all files of a model, whole or not at all; an earlier export is overwritten.

    Args:
        metrics: of an evaluation of this very model; see `read_metrics`.

    Raises:
        UserError: safetensors is not installed; the folder holds something else; it cannot be
            written.
    """
    files = contents(checkpoint, metrics)
    _check_free(Path(folder), files)
    atomic_write_all(folder, files)


def contents(checkpoint: Checkpoint, metrics: Metrics | None = None) -> dict[str, bytes]:
    """Every file of the folder, by name."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    texts = {
        CONFIG: _json({**hub_config(model), PAST: _past(checkpoint)}),
        "generation_config.json": _json(generation_config(model.config)),
        FILE_NAME: tokenizer.serialized,
        "tokenizer_config.json": _json(tokenizer_config(model.config)),
        "special_tokens_map.json": _json(_named_tokens()),
        CARD: card_text(checkpoint, metrics),
    }
    written = {name: text.encode("utf-8") for name, text in texts.items()}
    return {WEIGHTS: to_bytes(_without_tied_head(model), {"format": "pt"}), **written}


def hub_config(model: ArithmeticModel) -> dict[str, Any]:
    """``config.json``; what transformers 5 has renamed stands under both names."""
    config = model.config
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": model.vocab_size,
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "num_key_value_heads": config.nhead,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **_window(config),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        **{name: value for name, value in _FIXED.items() if value is not None},
        **_token_ids(),
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _window(config: ModelConfig) -> dict[str, Any]:
    """How far the layers look back, all of them alike."""
    windowed = config.attention_window > 0
    return {
        "use_sliding_window": windowed,
        "sliding_window": config.attention_window or None,
        "max_window_layers": 0 if windowed else config.num_layers,
        "layer_types": [_SLIDING if windowed else _FULL] * config.num_layers,
    }


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """``generation_config.json``: greedy, a whole context at most."""
    return {"do_sample": False, "max_new_tokens": config.max_seq_length, **_token_ids()}


def tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    """``tokenizer_config.json``; padding stands on the left, where generation needs it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_named_tokens(),
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.max_seq_length,
        "padding_side": "left",
    }


def _token_ids() -> dict[str, int]:
    return {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def _named_tokens() -> dict[str, str]:
    ids = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}
    return {name: SPECIAL_TOKENS[token_id] for name, token_id in ids.items()}


def _without_tied_head(model: ArithmeticModel) -> dict[str, Tensor]:
    """The weights, each once: safetensors takes no tensor under two names."""
    tied = {HEAD} if model.config.tie_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _past(checkpoint: Checkpoint) -> dict[str, Any]:
    """What Qwen3's config has no word for; it is true of weights with this hash only."""
    return {
        "weights_hash": weights_hash(checkpoint.model),
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "trained_on": to_dict(checkpoint.trained_on),
        "dropout": checkpoint.model.config.dropout,
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _check_free(folder: Path, files: dict[str, bytes]) -> None:
    """Refuse a folder whose files are someone else's, as ``.`` with its own README.md."""
    found = [name for name in files if (folder / name).exists()]
    foreign = [name for name in _IN_THE_WAY if (folder / name).exists()]
    foreign += [name for name in found if not (folder / name).is_file()]
    if foreign or (found and CONFIG not in found):
        name = (foreign or found)[0]
        raise UserError(f"{folder}: holds a {name} that is of no export; name a new folder")


def read_metrics(path: str | Path, checkpoint: Checkpoint) -> Metrics:
    """The figures of an ``evaluation_metrics_*.json``.

    Raises:
        UserError: not such a file; the evaluation of another model.
    """
    metrics = read_json(path)
    try:
        said = checked(dict, metrics["settings"], "settings")
        card_text(checkpoint, metrics)  # has every figure that the card needs
        theirs, model = said["weights_hash"], said["model_path"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not the metrics of an evaluation ({reason(error)}); name a file that "
            "run_evaluation.py wrote"
        ) from None
    if theirs != weights_hash(checkpoint.model):
        raise UserError(f"{path}: has the figures of another model, {model}; evaluate this one")
    return metrics


# ------------------------------------------------------------------------------------- reading


def read_hub_folder(folder: str | Path) -> Checkpoint:
    """The checkpoint that a folder of this ecosystem amounts to.

    Stage, step and ``trained_on`` are known if the weights are still those of the export; else the
    stage is ``imported``, the step 0, and ``trained_on`` None.

    Raises:
        UserError: files missing or damaged; a model that this toolkit's transformer cannot be; a
            tokenizer without its special tokens.
    """
    folder = Path(folder)
    said = read_json(folder / CONFIG)
    try:
        shape, past = _shape(said), checked(dict, said.get(PAST, {}), PAST)
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        raise _refused(folder / CONFIG, error) from None
    tokenizer = _as_trained(ArithmeticTokenizer.load(folder))
    weights, _ = read_tensors(folder / WEIGHTS, "weights")
    try:
        weights = _with_tied_head(finite(weights), shape["tie_embeddings"])
        training = _training(past, hash_of(weights))
        config = build(ModelConfig, {**shape, "dropout": training.pop("dropout")}, {})
        model = build_model(config, tokenizer.vocab_size, weights)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise _refused(folder / WEIGHTS, error) from None
    return Checkpoint(model, tokenizer, **training)


def _shape(said: dict[str, Any]) -> dict[str, Any]:
    """The model config's values, but for dropout.

    Raises:
        KeyError, ValueError: not said, or of no model that this toolkit has.
    """
    for why in _misfits(said):
        raise ValueError(why)
    shape = {ours: said[theirs] for theirs, ours in _SIZES.items()}
    shape["tie_embeddings"] = said.get("tie_word_embeddings", False)
    shape["attention_window"] = said["sliding_window"] if said.get("use_sliding_window") else 0
    shape["rope_theta"] = _rope(said).get("rope_theta", said.get("rope_theta", 10000.0))
    config = build(ModelConfig, shape, {})  # types and bounds
    if said["head_dim"] != config.head_dim:
        raise ValueError(f"head_dim is {said['head_dim']}, not hidden_size / num_attention_heads")
    return shape


def _misfits(said: dict[str, Any]) -> Iterator[str]:
    """Whatever would compute something else here than there."""
    if said["model_type"] != "qwen3":
        yield f"model_type is {said['model_type']!r}, not 'qwen3'"
    for name, ours in _FIXED.items():
        if said.get(name, ours) != ours:
            yield f"{name} is {said[name]!r}, not {ours!r}"
    if said["num_key_value_heads"] != said["num_attention_heads"]:
        yield "num_key_value_heads is not num_attention_heads: heads that share keys are unknown"
    windowed = said.get("use_sliding_window", False)
    if others := {*_layer_types(said)} - {_SLIDING if windowed else _FULL}:
        yield f"layer_types: {', '.join(others)}, with use_sliding_window {windowed}"
    rope = _rope(said)
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind != "default" or part != 1.0 or rope.keys() & {"type", "factor"}:
        yield f"rotary positions are scaled or partial, {rope}"


def _layer_types(said: dict[str, Any]) -> list[str]:
    """Each layer's attention; where it is not said, the first layers have no window."""
    layers = range(said["num_hidden_layers"])
    first = said.get("max_window_layers", 28) if said.get("use_sliding_window") else len(layers)
    return said.get("layer_types") or [_FULL if at < first else _SLIDING for at in layers]


def _rope(said: dict[str, Any]) -> dict[str, Any]:
    """Settings of the rotary positions, under the name that transformers 5 or 4 gives them."""
    return checked(dict, said.get("rope_parameters") or said.get("rope_scaling") or {}, "rope")


def _as_trained(tokenizer: ArithmeticTokenizer) -> ArithmeticTokenizer:
    """The tokenizer without what others save beside it and encoding here does not use."""
    said = json.loads(tokenizer.serialized)
    plain = {**said, "padding": None, "truncation": None, "post_processor": None}
    return tokenizer if said == plain else ArithmeticTokenizer(json.dumps(plain))


def _with_tied_head(weights: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The weights with a tied head under its own name, too.

    Raises:
        ValueError: head and embedding are said to be one, and differ.
    """
    if not tied or EMBEDDING not in weights:
        return weights
    embedding = weights[EMBEDDING]
    if not torch.equal(weights.get(HEAD, embedding), embedding):
        raise ValueError("tie_word_embeddings is true, but head and embedding differ")
    return {**weights, HEAD: embedding}


def _training(past: dict[str, Any], hash_now: str) -> dict[str, Any]:
    """Stage, step, ``trained_on`` and dropout; those of no training if nothing is known."""
    if past.get("weights_hash") != hash_now:  # others have trained it, or made it
        return {"stage": "imported", "step": 0, "trained_on": None, "dropout": 0.0}
    return {**description(past), "dropout": checked(float, past["dropout"], "dropout")}


def _refused(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path}: cannot become a checkpoint ({reason(error)}); this takes what an export wrote, "
        "or a Qwen3 of the same make"
    )
