"""Checkpoints that describe themselves, and the folders that runs live in."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arithmetic_llm.cli import build
from arithmetic_llm.config import ModelConfig
from arithmetic_llm.runtime import UserError, atomic_write, require_file

if TYPE_CHECKING:
    import torch

    from arithmetic_llm.model import ArithmeticModel
    from arithmetic_llm.tokenizer import ArithmeticTokenizer

FORMAT = "arithmetic_llm checkpoint 1"
STAMP = "YYYYMMDD_HHMMSS"
FINISHED = "training_summary.json"  # written last: a run folder that holds it is finished


# ------------------------------------------------------------------------------ checkpoints


@dataclass
class Checkpoint:
    """Everything a model is: weights, shape, tokenizer, and what it was trained on."""

    model: ArithmeticModel
    tokenizer: ArithmeticTokenizer
    stage: str  # "foundational", "instruction", ...
    trained_on: dict[str, Any]  # see corpus.Coverage: depths, styles, number range
    step: int = 0
    training: dict[str, Any] = field(default_factory=dict)  # what --resume needs; else empty


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write atomically; the file loads with ``weights_only=True`` and needs no other file."""
    import torch

    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    content = {
        "format": FORMAT,
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "model_config": dataclasses.asdict(model.config),
        "weights": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "tokenizer": tokenizer.serialized,
        "tokenizer_hash": tokenizer.hash,
        "trained_on": checkpoint.trained_on,
        "training": checkpoint.training,
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint without executing anything in it.

    Raises:
        UserError: no file, truncated, not a checkpoint of this package, code instead of data,
            weights that do not fit the model config or are not finite.
    """
    from arithmetic_llm.tokenizer import ArithmeticTokenizer

    path = require_file(path, "checkpoint")
    content = _read(path)
    try:
        config = build(ModelConfig, content["model_config"], {})
        tokenizer = ArithmeticTokenizer(content["tokenizer"])
        model = _model(config, tokenizer.vocab_size, content["weights"])
        checkpoint = Checkpoint(
            model=model.to(device),
            tokenizer=tokenizer,
            stage=str(content["stage"]),
            trained_on=dict(content["trained_on"]),
            step=int(content["step"]),
            training=dict(content["training"]),
        )
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path}: damaged checkpoint ({_reason(error)}); use another") from None
    return checkpoint


def _read(path: Path) -> dict[str, Any]:
    import torch

    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a checkpoint, or a truncated one; use another checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for damaged archives
        if "Weights only load failed" in str(error):
            why = "it holds code, not only weights, and was not executed"
        else:
            why = f"damaged: {_reason(error)}"
        raise UserError(f"{path}: refused ({why}); use a checkpoint of this toolkit") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this toolkit; train one, or name another")
    return content


def _model(config: ModelConfig, vocab_size: int, weights: dict) -> ArithmeticModel:
    """Build without allocating, compare shapes, and only then adopt the tensors."""
    import torch

    from arithmetic_llm.model import ArithmeticModel

    with torch.device("meta"):
        model = ArithmeticModel(config, vocab_size)
    expected = model.state_dict()
    for name in expected.keys() | weights.keys():
        if name not in weights or name not in expected:
            raise ValueError(f"weight {name} is {'missing' if name in expected else 'unknown'}")
        if weights[name].shape != expected[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"weight {name} has shape {shapes}")
        if not weights[name].isfinite().all():
            raise ValueError(f"weight {name} holds NaN or infinity")
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def weights_hash(model: ArithmeticModel) -> str:
    """SHA-256 over names and values of all weights; what an adapter remembers of its base."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_tokenizer(checkpoint: Checkpoint, path: str, checkpoint_path: str) -> None:
    """Refuse a tokenizer other than the one inside the checkpoint; an empty path is fine."""
    from arithmetic_llm.tokenizer import ArithmeticTokenizer

    if path and ArithmeticTokenizer.load(path).hash != checkpoint.tokenizer.hash:
        raise UserError(
            f"{path}: not the tokenizer that {checkpoint_path} was trained with; "
            "name that one, or leave --tokenizer-path out"
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------ run folders


def new_run_folder(output_dir: str | Path, kind: str) -> Path:
    """Make ``output_dir/kind_YYYYMMDD_HHMMSS``; a name that is taken moves on by a second."""
    moment = datetime.datetime.now()
    while True:
        folder = Path(output_dir) / f"{kind}_{moment:%Y%m%d_%H%M%S}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not Path(output_dir).is_dir():
                raise UserError(f"{output_dir}: is a file; name a directory") from None
            moment += datetime.timedelta(seconds=1)


def resolve_stamp(path: str) -> str:
    """Replace a literal ``YYYYMMDD_HHMMSS`` by the newest finished run of exactly that kind.

    ``models/foundational_YYYYMMDD_HHMMSS/best_model.pt`` becomes the newest finished foundational
    run's; which one is printed. Any other path comes back as it is.
    """
    parts = Path(path).parts
    place = next((i for i, part in enumerate(parts) if STAMP in part), None)
    if place is None:
        return path
    parent = Path(*parts[:place])
    pattern = re.compile(re.escape(parts[place]).replace(STAMP, r"\d{8}_\d{6}"))
    finished = sorted(f.name for f in _entries(parent) if pattern.fullmatch(f.name) and _done(f))
    if not finished:
        raise UserError(f"{path}: no finished run of that name in {parent}; run its stage first")
    chosen = Path(parent, finished[-1], *parts[place + 1 :])
    print(f"{path} -> {chosen}")
    return str(chosen)


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _done(entry: Path) -> bool:
    return entry.is_file() or (entry / FINISHED).is_file()


def step_checkpoints(folder: Path) -> list[Path]:
    """``checkpoint_step_N.pt`` files of a run, oldest first."""
    found = folder.glob("checkpoint_step_*.pt")
    numbered = [(int(m[1]), p) for p in found if (m := re.fullmatch(r"\D+(\d+)\.pt", p.name))]
    return [path for _, path in sorted(numbered)]
