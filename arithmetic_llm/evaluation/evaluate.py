"""Evaluation: put problems to a model, judge what it writes, and store the result."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from arithmetic_llm.config import EvaluationConfig, SampleSpec
from arithmetic_llm.corpus.coverage import Coverage
from arithmetic_llm.corpus.draw import distinct_samples
from arithmetic_llm.corpus.files import read_problems
from arithmetic_llm.corpus.record import Sample
from arithmetic_llm.distributed import gather_shares, share, world_size
from arithmetic_llm.evaluation.draft import right_continuations
from arithmetic_llm.evaluation.judge import Outcome, judge
from arithmetic_llm.evaluation.length import (
    check_sizes,
    rooms_to_answer,
    warn_if_too_short,
)
from arithmetic_llm.evaluation.metrics import EvaluationResult
from arithmetic_llm.folders import resolve_stamp
from arithmetic_llm.model import kernels
from arithmetic_llm.model.checkpoint import Checkpoint, weights_hash
from arithmetic_llm.model.decode import GREEDY, Completion, SamplingParams, generate
from arithmetic_llm.model.load import check_tokenizer, load_model
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import (
    Progress,
    UserError,
    atomic_write_text,
    resolve_device,
    sha256_file,
    versions,
)
from arithmetic_llm.task.problem import Problem, problem_from, split_of


def evaluate_checkpoint(config: EvaluationConfig) -> EvaluationResult:
    """The evaluation that ``run_evaluation.py`` makes, without its files.

    Raises:
        UserError: a path, tokenizer or device that does not fit; a stratum without problems.
    """
    path = resolve_stamp(config.model_path)
    # What "auto" means elsewhere would make results depend on the machine and the batch size.
    device = resolve_device("cpu" if config.device == "auto" else config.device)
    checkpoint = load_model(path, device, resolve_stamp(config.base_checkpoint))
    check_tokenizer(checkpoint, config.tokenizer_path, path)
    problems, source = problems_for(config)
    warn_if_too_short(config.max_gen_length, problems, checkpoint.tokenizer)
    return evaluate(
        checkpoint.model,
        checkpoint.tokenizer,
        problems,
        trained_on=checkpoint.trained_on,
        sampling=SamplingParams(config.temperature, config.top_k, config.top_p, config.seed),
        max_new_tokens=config.max_gen_length,
        batch_size=config.batch_size,
        settings={**_identity(path, checkpoint), **source, "seed": config.seed},
    )


def _identity(path: str, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "model_path": path,
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "weights_hash": weights_hash(checkpoint.model),
        "tokenizer_hash": checkpoint.tokenizer.hash,
    }


# ---------------------------------------------------------------------------- the problems


def problems_for(config: EvaluationConfig) -> tuple[list[Problem], dict[str, Any]]:
    """The problems of an evaluation, and where they come from, as its settings tell."""
    return _from_file(config.test_file) if config.test_file else _drawn(config)


def _from_file(path: str) -> tuple[list[Problem], dict[str, Any]]:
    path = resolve_stamp(path)
    problems = [problem_from(record.expression) for record in read_problems(path)]
    check_sizes(problems, path)
    seen = in_train_split(problems)
    return problems, {"test_file": path, "sha256": sha256_file(path), "in_train_split": seen}


def _drawn(config: EvaluationConfig) -> tuple[list[Problem], dict[str, Any]]:
    rates = {f"{style}_rate": 0.0 for style in ("typed", "padded", "flat", "drill")}
    if config.style != "nested":
        rates[f"{config.style}_rate"] = 1.0 - config.invalid_rate
    names = ("num_range", "min_depth", "max_depth", "invalid_rate", "flat_terms")
    chosen = {name: getattr(config, name) for name in names}
    problems = problems_from(
        distinct_samples(SampleSpec(**chosen, **rates), config.num_samples, config.seed)
    )
    if len(problems) < config.num_samples:
        print(f"{len(problems):,} of {config.num_samples:,} problems: the test split has no more")
    return problems, {"style": config.style, "num_samples": config.num_samples, **chosen}


def problems_from(samples: Sequence[Sample]) -> list[Problem]:
    """The problems of samples that were drawn, each in its own style."""
    return [problem_from(sample.record.expression, sample.style) for sample in samples]


def in_train_split(problems: Sequence[Problem]) -> int:
    """Count the problems of the train split, which a model may have learned."""
    return sum(split_of(problem.expression) == "train" for problem in problems)


# ------------------------------------------------------------------------------- the model


def evaluate(
    model: ArithmeticModel,
    tokenizer: ArithmeticTokenizer,
    problems: Sequence[Problem],
    *,
    trained_on: Coverage | None,
    sampling: SamplingParams = GREEDY,
    max_new_tokens: int = 0,
    batch_size: int = 64,
    settings: dict[str, Any] | None = None,
) -> EvaluationResult:
    """Put every problem to the model and judge what it writes, with a progress bar.

    Of several processes each takes its share, which the bar counts, and returns the result of all.

    A right solver makes the decoder's guesses: they save passes where the model writes just them,
    and change nothing that it writes.

    Args:
        trained_on: what the checkpoint says of its training; None if nothing is known.
        max_new_tokens: 0 = as `rooms_to_answer` gives, but to an invalid problem as many as to any:
            what takes it for a right one is let go on to its end.
        batch_size: changes the speed and the memory, never a result (on a CPU, in fp32).
        settings: where the model and the problems come from; the result keeps them beside how the
            text was decoded.
    """
    if not problems:
        raise UserError("there is no problem to evaluate; raise --num-samples")
    context = model.config.max_seq_length
    rooms = rooms_to_answer(problems, tokenizer, context, max_new_tokens)
    most = max(rooms)
    invalid = [problem.row.kind == "invalid" for problem in problems]
    limits = [most if bad else room for bad, room in zip(invalid, rooms, strict=True)]
    prompts = [tokenizer.prompt_ids(problem.expression) for problem in problems]
    outcomes: dict[int, Outcome] = {}
    mine = share(range(len(problems)))
    who = "" if world_size() == 1 else f", 1 of {world_size()} processes"
    with Progress(len(mine), f"evaluating{who}", "problems") as progress:
        show = _scoreboard(progress)

        def on_done(row: int, completion: Completion) -> None:
            outcome = judge(problems[row], completion, len(prompts[row]), tokenizer, context)
            outcomes[row] = outcome
            show(outcome)

        started = time.monotonic()
        guess = right_continuations(problems, tokenizer)
        generate(model, prompts, limits, sampling, batch_size, on_done, guess, mine)
        in_order = tuple(gather_shares([outcomes[row] for row in mine]))
        seconds = time.monotonic() - started
    settings = {**(settings or {}), **_decoding(model, sampling, batch_size)}
    settings |= {"max_gen_length": max_new_tokens, "longest_room": most}
    return EvaluationResult(in_order, trained_on, settings, seconds)


def _decoding(model: ArithmeticModel, sampling: SamplingParams, batch_size: int) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "context": model.config.max_seq_length,
        "batch_size": batch_size,
        "device": str(model.device),
        "precision": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "kernels": kernels.in_use(model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _scoreboard(progress: Progress) -> Callable[[Outcome], None]:
    """A function that counts an outcome and shows the accuracy and the speed so far."""
    started, done, correct, tokens = time.monotonic(), 0, 0, 0

    def show(outcome: Outcome) -> None:
        nonlocal done, correct, tokens
        done, correct, tokens = done + 1, correct + outcome.correct, tokens + outcome.tokens
        speed = tokens / max(time.monotonic() - started, 1e-9)
        progress.update(1, accuracy=f"{100 * correct / done:.1f}%", tokens_per_s=f"{speed:,.0f}")

    return show


# ------------------------------------------------------------------------------ the files


def save(result: EvaluationResult, summary: str, folder: str | Path) -> dict[str, Path]:
    """Write metrics, sample outputs and summary under one new time stamp.

    The metrics appear last: where they stand, the other two do.

    Returns:
        The paths by what they hold: ``samples``, ``summary``, ``metrics``.
    """
    folder = prepare_folder(folder)
    contents = {
        "samples": ("sample_outputs_{}.json", _json(result.sample_outputs)),
        "summary": ("evaluation_summary_{}.txt", summary),
        "metrics": ("evaluation_metrics_{}.json", _json(result.metrics)),
    }
    paths = {}
    with _new_stamp(folder, [name for name, _ in contents.values()]) as stamp:
        for what, (name, text) in contents.items():
            paths[what] = folder / name.format(stamp)
            atomic_write_text(paths[what], text)
    return paths


def prepare_folder(folder: str | Path) -> Path:
    """Make the folder for results, so that a bad path is refused before the work and not after."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: is or lies under a file; name a directory") from None
    return folder


@contextlib.contextmanager
def _new_stamp(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """A ``YYYYMMDD_HHMMSS`` that no file of these names has; it is ours inside the block.

    A taken stamp moves on by a second. While the block runs, an empty lock file keeps others off.
    """
    moment = datetime.datetime.now()
    while True:
        stamp = f"{moment:%Y%m%d_%H%M%S}"
        moment += datetime.timedelta(seconds=1)
        lock = folder / f".evaluation_{stamp}.lock"
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        try:
            if not any((folder / name.format(stamp)).exists() for name in names):
                yield stamp
                return
        finally:
            lock.unlink(missing_ok=True)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
