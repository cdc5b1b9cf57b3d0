"""A problem to put to a model: its text, where it is counted, and the split it belongs to.

All spellings of one tree are one problem and belong to the same split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from arithmetic_llm.task.expression import ExpressionError, Postfix, parse

Drawn = Postfix | str  # what a draw gives: a tree, or the text of an invalid expression


class Row(NamedTuple):
    """Row of a problem: ``("depth", 3)``, ``("terms", 7)`` or ``("invalid", 0)``."""

    kind: str
    number: int


@dataclass(frozen=True)
class Problem:
    """A problem to put to a policy, and the row that it is counted in."""

    expression: str  # canonical if it is valid, else as it stands
    row: Row
    low: int  # its smallest and largest number; both 0 if it is invalid
    high: int
    style: str | None = None  # as it was drawn, if that is known

    @property
    def depth(self) -> int | None:
        """The exact depth of a problem that is counted by depth, else None."""
        return self.row.number if self.row.kind == "depth" else None

    @property
    def terms(self) -> int | None:
        """Number of terms of a flat sum, None for all else."""
        return self.row.number if self.row.kind == "terms" else None


def problem_from(text: str, style: str | None = None) -> Problem:
    """Read a problem; a sum of three or more numbers without parentheses is flat in any style."""
    try:
        tree = parse(text)
    except ExpressionError:
        readable = text.encode("utf-8", "replace").decode()  # no tokenizer takes half a surrogate
        return Problem(readable, Row("invalid", 0), 0, 0, style)
    flat = tree.is_flat or style == "flat"
    row = Row("terms", tree.terms) if flat else Row("depth", tree.depth)
    numbers = [symbol for symbol in tree.postfix if isinstance(symbol, int)]
    return Problem(tree.canonical, row, min(numbers), max(numbers), style)


# --------------------------------------------------------------------------------- splits


def split_of(expression: str) -> str:
    """Which of `SPLITS` an expression belongs to, valid or not."""
    try:
        return split_of_drawn(parse(expression).postfix)
    except ExpressionError:
        return split_of_drawn(expression)


def split_of_drawn(problem: Problem) -> str:
    """90 % train, 5 % validation, 5 % test, by a hash that is the same on every machine.

    Hashed is the tree in postfix, ``5 10 3 - +``, or the raw text of an invalid expression.
    """
    key = problem if isinstance(problem, str) else " ".join(map(str, problem))
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    percentile = int.from_bytes(digest[:8], "big") % 100
    return "train" if percentile < 90 else "validation" if percentile < 95 else "test"
