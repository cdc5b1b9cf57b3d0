"""Checkpoints that describe themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import reprlib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from arithmetic_llm.cli import build
from arithmetic_llm.config import LoRAConfig, ModelConfig
from arithmetic_llm.runtime import UserError, atomic_write, require_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
    from arithmetic_llm.model.transformer import ArithmeticModel

FORMAT = "arithmetic_llm checkpoint 1"

TRAINED_ON = {  # the form of corpus.coverage.Coverage.as_dict
    "styles": dict[str, int],
    "depths": list[int],
    "flat_terms": list[int],
    "num_range": tuple[int, int],
    "splits": dict[str, int],
}


@dataclass
class Checkpoint:
    """Everything a model is: weights, shape, tokenizer, and what it was trained on."""

    model: ArithmeticModel
    tokenizer: ArithmeticTokenizer
    stage: str  # "foundational", "instruction", ...
    trained_on: dict[str, Any]  # of the form `TRAINED_ON`; empty if nothing is known
    step: int = 0
    training: dict[str, Any] = field(default_factory=dict)  # what --resume needs; else empty
    adapter: dict[str, Any] | None = None  # of a model with LoRA: its config and its base


@dataclass
class Content:
    """What a checkpoint file holds, checked, but not yet a model."""

    config: ModelConfig
    weights: dict[str, Tensor]  # the whole model's; an adapter's alone if there is one
    tokenizer: ArithmeticTokenizer
    stage: str
    trained_on: dict[str, Any]
    step: int
    training: dict[str, Any]
    adapter: dict[str, Any] | None


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write atomically; the file loads with ``weights_only=True``.

    It needs no other file, unless the model has an adapter: then it holds the adapter alone and
    remembers the hash of its base.
    """
    import torch

    from arithmetic_llm.model.lora import adapter_weights

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
        "trained_on": checkpoint.trained_on,
        "training": checkpoint.training,
        "adapter": checkpoint.adapter,
    }
    memory = io.BytesIO()  # straight to a full disk, torch would fail with an error of its own
    torch.save(content, memory)
    with atomic_write(path) as file:
        file.write(memory.getbuffer())


def read_checkpoint(path: str | Path) -> Content:
    """Read a checkpoint file without executing anything in it.

    Raises:
        UserError: no file, truncated, not a checkpoint of this package, code instead of data,
            parts missing or of another form, weights that are not finite.
    """
    from arithmetic_llm.model.tokenizer import ArithmeticTokenizer

    path = require_file(path, "checkpoint")
    raw = _read(path)
    try:
        return Content(
            config=build(ModelConfig, checked(dict, raw["model_config"], "model_config"), {}),
            weights=_finite(raw["weights"]),
            tokenizer=_with_hash(ArithmeticTokenizer(raw["tokenizer"]), raw["tokenizer_hash"]),
            training=checked(dict, raw["training"], "training"),
            adapter=_adapter(raw["adapter"]),
            **description(raw),
        )
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        raise _damaged(path, error) from None


def description(said: Any) -> dict[str, Any]:
    """Stage, step and ``trained_on`` of what a file says of a model, checked.

    Raises:
        KeyError, TypeError, ValueError: missing, or of another form.
    """
    stage, step = checked(str, said["stage"], "stage"), checked(int, said["step"], "step")
    if step < 0:
        raise ValueError(f"step is {step}")
    trained_on = checked(dict, said["trained_on"], "trained_on")
    for key, form in TRAINED_ON.items() if trained_on else ():
        checked(form, trained_on[key], f"trained_on {key}")
    return {"stage": stage, "step": step, "trained_on": trained_on}


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


def checked(form: Any, value: Any, name: str) -> Any:
    """The value, if it has a form: a type, ``list[T]``, ``dict[K, V]`` or ``tuple[T, T]``.

    A float may be whole; a bool is no number; a list of as many values will do for a tuple.

    Raises:
        ValueError: it has another one; the message has the name.
    """
    kind, parts = get_origin(form) or form, get_args(form)
    kinds = {float: (float, int), list: (list, tuple), tuple: (list, tuple)}.get(kind, kind)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not of type {kind.__name__}")
    if kind is tuple and len(value) != len(parts):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not {len(parts)} values")
    columns = (value, value.values()) if kind is dict else zip(value) if kind is tuple else (value,)
    for part, column in zip(parts, columns, strict=False):  # a bare type has no parts
        for item in column:
            checked(part, item, name)
    return value


def load_checkpoint(
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
        from arithmetic_llm.model.peft import load_peft_checkpoint

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


def _merged(content: Content, path: str | Path, base_checkpoint: str | Path) -> ArithmeticModel:
    from arithmetic_llm.model.lora import merge_adapter

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
        base = load_checkpoint(base_checkpoint)
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
                return load_checkpoint(candidate)
    raise UserError(
        f"{path}: its base model {adapter['base_path']} is not there and none near it has the "
        "same weights; say where it is with --base-checkpoint, if need be in merge_lora_adapter.py"
    )


def load_adapter(
    model: ArithmeticModel, config: LoRAConfig, weights: dict[str, Tensor]
) -> ArithmeticModel:
    """Put an adapter of these weights on a model, in place; returns the model.

    Raises:
        ValueError: the weights are of another rank, or their names or shapes differ.
    """
    from arithmetic_llm.model.lora import add_lora

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
    from arithmetic_llm.model.lora import adapter_weights

    expected = adapter_weights(model) or model.state_dict()
    _same_shapes(expected, weights)
    model.load_state_dict(weights, strict=False)


def _read(path: Path) -> dict[str, Any]:
    import torch

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


def build_model(
    config: ModelConfig, vocab_size: int, weights: dict[str, Tensor]
) -> ArithmeticModel:
    """A model of these weights; nothing is allocated before the shapes are known to agree."""
    import torch

    from arithmetic_llm.model.transformer import ArithmeticModel

    with torch.device("meta"):
        model = ArithmeticModel(config, vocab_size)
    _same_shapes(model.state_dict(), weights)
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def _finite(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in fp32, in whatever they are stored."""
    import torch

    for name, tensor in checked(dict[str, torch.Tensor], weights, "weights").items():
        if tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise ValueError(f"weight {name} is no plain tensor of fractions")
        if not tensor.isfinite().all():
            raise ValueError(f"weight {name} holds NaN or infinity")
    return {name: tensor.float() for name, tensor in weights.items()}


def _same_shapes(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            raise ValueError(f"weight {name} is {'missing' if name in expected else 'unknown'}")
        if weights[name].shape != expected[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"weight {name} has shape {shapes}")


def weights_hash(model: ArithmeticModel) -> str:
    """SHA-256 over names and values of all weights; what an adapter remembers of its base."""
    return hash_of(model.state_dict())


def hash_of(weights: dict[str, Tensor]) -> str:
    """`weights_hash` of weights that are not in a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_tokenizer(checkpoint: Checkpoint, path: str, checkpoint_path: str) -> None:
    """Refuse a tokenizer other than the one inside the checkpoint; an empty path is fine."""
    from arithmetic_llm.model.tokenizer import ArithmeticTokenizer

    if path and ArithmeticTokenizer.load(path).hash != checkpoint.tokenizer.hash:
        raise UserError(
            f"{path}: not the tokenizer that {checkpoint_path} was trained with; name that one"
        )


def _damaged(path: str | Path, error: BaseException) -> UserError:
    return UserError(f"{path}: damaged checkpoint ({reason(error)}); use another")


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return (str(error).splitlines() or [type(error).__name__])[0]
