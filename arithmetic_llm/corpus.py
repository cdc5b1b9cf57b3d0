"""Problems with their solutions: how they are drawn, split, stored and read back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from arithmetic_llm.expression import ExpressionError, Postfix, parse
from arithmetic_llm.runtime import UserError
from arithmetic_llm.sampling import (
    SampleSpec,
    drill,
    exact_tree,
    flat_sum,
    invalid_expression,
    write,
)
from arithmetic_llm.solution import Answer, problem_text, solve, solve_canonical

SPLITS = ("train", "validation", "test")
_MAX_DRAWS = 20_000  # 0.95 to this power is nothing: then the split has no such problem


class Record(NamedTuple):
    """One line of a corpus, in the order of its JSON keys."""

    expression: str
    problem: str
    solution: str
    answer: Answer


class Sample(NamedTuple):
    """A record and what was asked of it; ``depth`` is None where the text is no tree (invalid)."""

    record: Record
    style: str
    depth: int | None
    terms: int | None


# -------------------------------------------------------------------------------- splits


def split_of(expression: str) -> str:
    """Which of `SPLITS` a problem belongs to; all spellings of one tree belong to the same."""
    try:
        return _split_of_key(tree_key(parse(expression).postfix))
    except ExpressionError:
        return _split_of_key(expression)


def tree_key(tree: Postfix) -> str:
    """What a problem's split is decided by: its tree in postfix, ``5 10 3 - +``."""
    return " ".join(map(str, tree))


def _split_of_key(key: str) -> str:
    """90 % train, 5 % validation, 5 % test, by a hash that no machine or version changes."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    percentile = int.from_bytes(digest[:8], "big") % 100
    return "train" if percentile < 90 else "validation" if percentile < 95 else "test"


# ------------------------------------------------------------------------------- drawing


def generate(
    spec: SampleSpec, num_samples: int, seed: int, split: str = "train"
) -> Iterator[Sample]:
    """Draw exactly ``num_samples`` samples of a split, with replacement and in constant memory."""
    rng = Random(seed)
    for style in _shuffled(spec.style_counts(num_samples), rng):
        yield _draw(spec, style, split, rng)


def _shuffled(counts: dict[str, int], rng: Random) -> Iterator[str]:
    """Each key as often as counted, in uniformly random order, without making the list."""
    left = dict(counts)
    for total in range(sum(counts.values()), 0, -1):
        place = rng.randrange(total)
        for key, count in left.items():
            if place < count:
                break
            place -= count
        left[key] -= 1
        yield key


def _draw(spec: SampleSpec, style: str, split: str, rng: Random) -> Sample:
    for _ in range(_MAX_DRAWS):
        if style == "invalid":
            expression = invalid_expression(spec, rng)
            if _split_of_key(expression) == split:
                return _invalid_sample(expression)
            continue
        depth, tree = _draw_tree(spec, style, rng)
        if _split_of_key(tree_key(tree)) == split:
            return _tree_sample(tree, depth, style, rng)
    raise UserError(f"no {style} problem is in the {split} split; widen --num-range or the depths")


def _draw_tree(spec: SampleSpec, style: str, rng: Random) -> tuple[int, Postfix]:
    if style == "flat":
        terms = rng.randint(2, spec.flat_terms)
        return terms - 1, flat_sum(terms, spec.num_range, rng)
    if style == "drill":
        return 1, drill(spec, rng)
    depth = rng.randint(spec.min_depth, spec.max_depth)
    return depth, exact_tree(depth, spec.num_range, rng)


def _tree_sample(tree: Postfix, depth: int, style: str, rng: Random) -> Sample:
    expression = write(tree, style, rng)
    solution = solve_canonical(expression)
    record = Record(expression, problem_text(expression), solution.text, solution.answer)
    return Sample(record, style, depth, len(tree) // 2 + 1)


def _invalid_sample(expression: str) -> Sample:
    solution = solve(expression)
    record = Record(expression, problem_text(expression), solution.text, solution.answer)
    return Sample(record, "invalid", None, None)
