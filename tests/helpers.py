"""What several test modules share: running scripts, small corpora, small models."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from arithmetic_llm import runtime
from arithmetic_llm.cli import run_main
from arithmetic_llm.config import ModelConfig, SampleSpec
from arithmetic_llm.corpus.coverage import Coverage
from arithmetic_llm.corpus.draw import draw_samples
from arithmetic_llm.corpus.record import Record
from arithmetic_llm.model.checkpoint import Checkpoint
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer, Digits
from arithmetic_llm.model.transformer import ArithmeticModel

ROOT = Path(__file__).resolve().parents[1]
TINY = {"d_model": 32, "nhead": 2, "num_layers": 2, "dim_feedforward": 48, "dropout": 0.0}


# ---------------------------------------------------------------------------------- scripts


@dataclass(frozen=True)
class Ended:
    """How a script ended."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """Standard error without warnings and progress: what is left must be the one error line."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def load_script(name: str):
    """A root script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call(name: str, *argv: object) -> Ended:
    """Run a script's ``main`` in this process, through the `run_main` that it runs under."""
    main = load_script(name).main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_main(lambda _: main([str(word) for word in argv]))
        except SystemExit as end:
            return Ended(end.code, out.getvalue(), err.getvalue())


def command(name: str, *argv: object) -> list[str]:
    """The command line of a script, for a process of its own."""
    return [sys.executable, str(ROOT / name), *map(str, argv)]


def one_thread() -> dict[str, str]:
    """An environment in which a process keeps to one core."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(name: str, *argv: object, cwd: Path | None = None, stdin: str | None = None) -> Ended:
    """Run a script as a process of its own, to its end."""
    done = subprocess.run(
        command(name, *argv),
        cwd=cwd,
        input=stdin,
        env=one_thread(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


# --------------------------------------------------------------------------------- materials


def records(count: int = 400, seed: int = 0, **settings: object) -> list[Record]:
    """Records of the train split; depth 1 to 3 in all styles unless told otherwise."""
    spec = {
        "max_depth": 3,
        "typed_rate": 0.1,
        "padded_rate": 0.1,
        "flat_rate": 0.1,
        "drill_rate": 0.1,
    }
    samples = draw_samples(SampleSpec(**{**spec, **settings}), count, seed)
    return [sample.record for sample in samples]


def make_tokenizer(vocab_size: int = 400, digits: Digits = "reversed") -> ArithmeticTokenizer:
    """A tokenizer of the size and kind that the product uses."""
    texts = (record.sequence for record in records())
    return ArithmeticTokenizer.train(texts, vocab_size, digits)


def random_model(vocab_size: int, seed: int = 0, **shape: object) -> ArithmeticModel:
    """A model whose every weight is random, norms included, so that each of them matters."""
    torch.manual_seed(seed)
    model = ArithmeticModel(ModelConfig(**{**TINY, **shape}), vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def of_transformers(model: ArithmeticModel):
    """The same weights in transformers' own model of the architecture, Qwen3."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = model.config
    window = config.attention_window
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=model.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.dim_feedforward,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.nhead,
            num_key_value_heads=config.nhead,
            head_dim=config.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_seq_length,
            tie_word_embeddings=config.tie_embeddings,
            use_sliding_window=window > 0,
            sliding_window=window or None,
            max_window_layers=0,
            attn_implementation="eager",
        )
    )
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs.eval()


def checkpoint_of(model: ArithmeticModel, tokenizer: ArithmeticTokenizer) -> Checkpoint:
    """A checkpoint of a model that claims to have been trained on depth 1 to 3."""
    seen = Coverage({"nested": 100}, (1, 2, 3), (), (1, 20), {"train": 100})
    return Checkpoint(model, tokenizer, "foundational", seen)


def recipe(folder: Path) -> Path:
    """The configs of the shipped recipe with small numbers, in a folder."""
    small = {"num_samples": 100, "max_depth": 2, "num_range": [1, 9]}
    training = {"max_steps": 5, "eval_samples": 20, "threads": 1}
    attempts = {"min_depth": 1, "max_depth": 2, "num_range": [1, 9], "batch_size": 2}
    for path in (ROOT / "configs" / "cpu").glob("*.json"):
        content = json.loads(path.read_text())
        content |= small if path.stem.endswith("corpus") else {}
        trains = path.stem in ("foundational", "instruction", "lora", "grpo")
        content |= training if trains else {}
        content |= attempts if path.stem == "grpo" else {}
        content |= TINY if path.stem == "model" else {}
        (folder / path.name).write_text(json.dumps(content))
    return folder


# Training, 10 steps at 6 s and 10 at 12 s a step, and a validation at the start and in between.
RUN_LINES = [
    {"step": 0, "eval_loss": 4.0, "eval_exact": 0.0},
    {"step": 10, "loss": 2.0, "learning_rate": 0.1, "tokens_per_second": 1000, "seconds": 6.0},
    {"step": 15, "eval_loss": 1.0, "eval_exact": 0.5},
    {"step": 20, "loss": 1.0, "learning_rate": 0.2, "tokens_per_second": 500, "seconds": 12.0},
]


def write_run(folder: Path, lines: Sequence[dict] = RUN_LINES, **settings: object) -> str:
    """A run folder of some lines and settings; returns its path as a user types it."""
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if settings:
        (folder / "training_config.json").write_text(json.dumps(settings))
    return str(folder)


def evaluation(
    rates: Sequence[float],
    trained: bool = True,
    errors: dict[str, int] | None = None,
    model: str = "models/sft/best_model.pt",
    **more: object,
) -> dict:
    """The metrics of an evaluation with such accuracies of depth 1, 2, ..., in percent."""
    rows = [
        {"depth": depth, **row(rate), "trained": trained} for depth, rate in enumerate(rates, 1)
    ]
    empty = {"by_depth": rows, "by_terms": [], "invalid": None, "errors": errors or {}}
    return {"total_samples": 200, **empty, "settings": {"model_path": model}, **more}


def row(rate: float) -> dict[str, float]:
    """An accuracy in percent as a row of an evaluation has it, give or take 5."""
    return {"exact_match_accuracy": rate, "low": rate - 5, "high": min(rate + 5, 100)}


# ------------------------------------------------------------------------------- what goes wrong


def edit(path: Path, change: Callable[[dict], None]) -> None:
    """Save a checkpoint file again after ``change`` has had its way with its content."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def damages(content: dict, path: tuple = ()) -> Iterator[tuple[tuple, Callable[[dict], None]]]:
    """Where, and a change that puts a value of another type there, for every key of a checkpoint.

    Of the many keys of one kind, weights and the like, the first stands for all.
    """
    alike = path[-1:] in [("weights",), ("state",), ("styles",), ("splits",)]
    for key in list(content)[: 1 if alike else None]:
        for wrong in (None, -1.5, "text", [None], {"a": None}):
            if type(wrong) is not type(content[key]):
                yield (*path, key, wrong), partial(put, (*path, key), wrong)
        if isinstance(content[key], dict):
            yield from damages(content[key], (*path, key))


def removals(content: dict) -> Iterator[tuple[tuple, Callable[[dict], None]]]:
    """Where, and a change that takes the key away, for every key."""
    for key in content:
        yield (key, "removed"), lambda damaged, key=key: damaged.pop(key)


def put(path: Sequence, value: object, content: dict) -> None:
    """Set ``content[path[0]][path[1]]... = value``."""
    *outer, last = path
    for key in outer:
        content = content[key]
    content[last] = value


class Hostile:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class FullDisk(io.FileIO):
    """A file on a disk that has room for some bytes more."""

    room = 400

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def full_when_writing(monkeypatch) -> None:
    """From now on no file that is written safely gets beyond its first bytes."""
    monkeypatch.setattr(runtime, "open", FullDisk, raising=False)


def full_when_flushing(monkeypatch) -> None:
    """From now on the disk turns out to be full when a file is flushed."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runtime.os, "fsync", fsync)


@contextlib.contextmanager
def on_threads(count):
    """Torch with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
