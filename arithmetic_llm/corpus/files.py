"""Corpus files: how samples are written, with a sidecar, and read back."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arithmetic_llm.config import STYLES, TREE_STYLES, CorpusConfig
from arithmetic_llm.corpus.draw import (
    distinct_samples,
    draw_samples,
)
from arithmetic_llm.corpus.record import Record, Sample
from arithmetic_llm.runtime import (
    Progress,
    UserError,
    atomic_write,
    atomic_write_text,
    require_file,
)
from arithmetic_llm.task.text import (
    CLOSE,
    OPEN,
    STEP,
    are_first_steps,
    are_next_steps,
    expression_text,
    is_solution,
    one_line,
    problem_text,
    read_answer,
    result_text,
)

_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")
NO_PROBLEM = "has rewritings alone and no problem; lower --rewrite-rate and make it anew"

# ------------------------------------------------------------------------------- writing


def json_line(record: Record) -> str:
    """A record as a line of an instruction corpus (JSON Lines)."""
    return json.dumps(record._asdict(), ensure_ascii=False) + "\n"


def plain_lines(record: Record) -> str:
    """A record as the two lines it has in a foundational corpus."""
    return f"{record.problem}\n{one_line(record.solution)}\n"


def make_corpus(config: CorpusConfig, path: str, as_text: Callable[[Record], str]) -> None:
    """Write a corpus file with its sidecar ``<path>.meta.json``, and print what is in it."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a directory; name the corpus file itself")
    draw = draw_samples if config.split == "train" else distinct_samples
    samples = draw(config, config.num_samples, config.seed, config.split)
    meta = write_corpus(path, samples, as_text, config.num_samples, asdict(config))
    print(summary(path, meta, config))


def write_corpus(
    path: str | Path,
    samples: Iterable[Sample],
    as_text: Callable[[Record], str],
    expected: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write samples and a sidecar; both files appear whole or not at all. Returns the sidecar."""
    counts, digest = Counts(), hashlib.sha256()
    with atomic_write(path) as file, Progress(expected, str(path), "samples") as progress:
        for sample in samples:
            data = as_text(sample.record).encode()
            file.write(data)
            digest.update(data)
            counts.add(sample)
            progress.update()
    meta = {**counts.as_dict(), "sha256": digest.hexdigest(), "settings": settings}
    atomic_write_text(f"{path}.meta.json", json.dumps(meta, indent=2) + "\n")
    return meta


class Counts:
    """Numbers of samples by style, depth (of trees) and number of terms (of flat sums)."""

    def __init__(self) -> None:
        self.styles: Counter[str] = Counter()
        self.depths: Counter[int] = Counter()
        self.flat_terms: Counter[int] = Counter()

    def add(self, sample: Sample) -> None:
        self.styles[sample.style] += 1
        if sample.style in TREE_STYLES:
            self.depths[sample.depth] += 1
        elif sample.style == "flat":
            self.flat_terms[sample.terms] += 1

    def as_dict(self) -> dict[str, Any]:
        """The counts as JSON has them, in a fixed order."""
        return {
            "samples": self.styles.total(),
            "by_style": {style: self.styles[style] for style in STYLES if self.styles[style]},
            "by_depth": {str(depth): self.depths[depth] for depth in sorted(self.depths)},
            "flat_by_terms": {str(n): self.flat_terms[n] for n in sorted(self.flat_terms)},
        }


def summary(path: str, meta: dict[str, Any], config: CorpusConfig) -> str:
    """Summary of a file that was just written, for a person."""
    missing = config.num_samples - meta["samples"]
    styles = ", ".join(f"{style} {count:,}" for style, count in meta["by_style"].items())
    depths = ", ".join(f"{depth}: {count:,}" for depth, count in meta["by_depth"].items())
    return "\n".join(
        [
            f"{path}: {meta['samples']:,} samples, {config.split} split, seed {config.seed}",
            f"  styles  {styles}",
            f"  depths  {depths}",
            f"  sha256  {meta['sha256']}",
        ]
        + [f"  {missing:,} fewer than asked for: the split has no more problems"] * (missing > 0)
    )


# ------------------------------------------------------------------------------- reading


def read_corpus(path: str | Path) -> Iterator[Record]:
    """The records of a corpus file, JSON Lines or two plain lines a sample.

    Raises:
        UserError: no such file, a directory, an empty file; and while reading, a line that is not
            UTF-8 or no record, named by file, line number and reason.
    """
    return _records(require_file(path, "corpus"))


def read_problems(path: str | Path) -> list[Record]:
    """The records of a corpus file that can be put to a model: all but rewritings.

    Raises:
        UserError: as `read_corpus`, or there are none.
    """
    problems = [record for record in read_corpus(path) if record.is_problem]
    if not problems:
        raise UserError(f"{path}: {NO_PROBLEM}")
    return problems


def _records(path: Path) -> Iterator[Record]:
    lines = _numbered_lines(path)
    for number, line in lines:
        try:
            if line.startswith("{"):
                record = _from_json(line)
            else:
                _check_plain_problem(line)
                number, solution = next(lines, (number, None))
                record = _from_plain(line, solution)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        yield record


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                # Some editors begin a file with a mark that says that it is UTF-8.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UserError(f"{path}:{number}: not UTF-8 text") from None


def _from_json(line: str) -> Record:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not a JSON object on one line") from None
    missing = [key for key in Record._fields if key not in fields]
    if missing:
        raise ValueError(f"key {missing[0]!r} is missing")
    record = Record(*(fields[key] for key in Record._fields))
    for name, value in zip(Record._fields[:3], record, strict=False):
        if not isinstance(value, str):
            raise ValueError(f"{name!r} is not a string")
        if _HALF_A_CHARACTER.search(value):  # JSON can say so
            raise ValueError(f"{name!r} has half of a character, a lone surrogate")
    return _checked(record)


def _check_plain_problem(line: str) -> None:
    if not line.startswith((problem_text(""), STEP)):
        begins = f"{problem_text('...')!r}, '{STEP} ...'"
        raise ValueError(f"neither a JSON object nor a problem ({begins})")


def _from_plain(problem: str, solution: str | None) -> Record:
    if solution is None:
        raise ValueError("the problem has no solution line after it")
    expression = problem.rpartition(expression_text(""))[2].removeprefix(problem_text(""))
    return _checked(Record(expression, problem, solution, read_answer(solution)))


def _checked(record: Record) -> Record:
    """The record, if its parts agree with each other; that the sums are right is not checked."""
    if record.problem.startswith(STEP):
        ends = record.problem.endswith(f" {expression_text(record.expression)}")
        if record.answer is None and ends and are_next_steps(record.problem, record.solution):
            return record
        raise ValueError(f"not a step, the next ones, {expression_text('...')!r} and no answer")
    if record.problem != problem_text(record.expression):
        raise ValueError(f"the problem is not {problem_text(record.expression)!r}")
    if record.answer is None and are_first_steps(record.solution):
        return record
    if not is_solution(record.solution):
        raise ValueError(f"the solution has no {OPEN} ... {CLOSE}")
    stated = read_answer(record.solution)
    if stated is None:
        raise ValueError(f"the solution does not end with one {result_text('N')!r}")
    if type(record.answer) is not type(stated) or record.answer != stated:
        raise ValueError(f"the answer {record.answer!r} is not the final result {stated!r}")
    return record
