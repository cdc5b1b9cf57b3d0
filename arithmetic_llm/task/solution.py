"""The step-by-step solution of an expression, as a model is to write it.

The operations are carried out in post-order: left operand, right operand, then the node. In
canonical text the next of them is always the leftmost operator with a number on either side, since
an operator that still waits for a group on its left has one inside that group. So a step is one
search and one replacement in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from arithmetic_llm.task.expression import ExpressionError, apply, parse
from arithmetic_llm.task.text import ERROR, Answer, refusal_text, solution_text, step_text

_READY = re.compile(r"(-?[0-9]+) ([+-]) (-?[0-9]+)")


class Step(NamedTuple):
    """``left operator right = result``, and the whole expression after it."""

    left: int
    operator: str
    right: int
    result: int
    expression: str

    @property
    def operation(self) -> str:
        """Operation that is carried out: ``10 - 3``."""
        return f"{self.left} {self.operator} {self.right}"

    def text(self, number: int) -> str:
        """The two lines of a solution that state this step, as its ``number``-th from 1."""
        return step_text(number, self.operation, self.result, self.expression)


@dataclass(frozen=True, slots=True)
class Solution:
    """The steps to the answer; ``error`` is the reason why an invalid expression has none."""

    steps: tuple[Step, ...]
    answer: Answer
    error: str | None = None

    @property
    def text(self) -> str:
        """The solution as it is stored, several lines from ``<think>`` to ``Final Result: N``."""
        trace = [step.text(number) for number, step in enumerate(self.steps, 1)]
        if self.error:
            trace.append(refusal_text(self.error))
        return solution_text(trace, self.answer)


def solve(text: str) -> Solution:
    """Solve an expression as it was typed; an invalid one has the answer ``"ERROR"``."""
    try:
        return solve_canonical(parse(text).canonical)
    except ExpressionError as error:
        return Solution((), ERROR, error.reason)


def solve_canonical(expression: str) -> Solution:
    """Solve a valid expression in canonical text, without checking that it is one."""
    steps = tuple(reductions(expression))
    return Solution(steps, int(steps[-1].expression if steps else expression))


def reductions(expression: str) -> Iterator[Step]:
    """The steps from a canonical expression to its value, made one at a time."""
    while step := next_step(expression):
        yield step
        expression = step.expression


def next_step(expression: str) -> Step | None:
    """The next operation of a canonical expression, or None if it is a number."""
    match = _READY.search(expression)
    if match is None:
        return None
    left, operator, right = int(match[1]), match[2], int(match[3])
    result = apply(left, operator, right)
    return Step(left, operator, right, result, _put(expression, match.span(), result))


def _put(expression: str, span: tuple[int, int], number: int) -> str:
    """The expression with a number in place of ``span``, and no parentheses left around it."""
    start, end = span
    while expression[start - 1 : start] == "(" and expression[end : end + 1] == ")":
        start, end = start - 1, end + 1
    return f"{expression[:start]}{number}{expression[end:]}"
