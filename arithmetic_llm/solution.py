"""The step-by-step solution of an expression, as a model is to write it.

The operations are carried out in post-order: left operand, right operand, then the node. In
canonical text the next of them is always the leftmost number that opens a group, with the operator
and the number that follow it; so a step is one search and one replacement in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from arithmetic_llm.expression import ExpressionError, apply, parse

ERROR: Literal["ERROR"] = "ERROR"  # the answer to an invalid expression
Answer = int | Literal["ERROR"]

_READY = re.compile(r"(?<![^(])(-?[0-9]+) ([+-]) (-?[0-9]+)")


class Step(NamedTuple):
    """``left operator right = result``, and the whole expression after it."""

    left: int
    operator: str
    right: int
    result: int
    expression: str

    @property
    def equation(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


@dataclass(frozen=True, slots=True)
class Solution:
    """The steps to the answer; ``error`` is the reason why an invalid expression has none."""

    steps: tuple[Step, ...]
    answer: Answer
    error: str | None = None

    @property
    def text(self) -> str:
        """The solution as it is stored, several lines from ``<think>`` to ``Final Result: N``."""
        lines = ["<think>"]
        for number, step in enumerate(self.steps, 1):
            lines.append(f"Step {number}: {step.equation}")
            lines.append(f"Expression now: {step.expression}")
        if self.error:
            lines.append(f"Error: {self.error}")
        lines += ["</think>", f"Final Result: {self.answer}"]
        return "\n".join(lines)


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
    left, operator, right = match.groups()
    return step_at(expression, match.span(), int(left), operator, int(right))


def step_at(
    expression: str, span: tuple[int, int], left: int, operator: str, right: int
) -> Step:
    """Carry out the operation that stands at ``span`` of a canonical expression.

    Parentheses that would be left around the result go; all others stay as they are.
    """
    result = apply(left, operator, right)
    return Step(left, operator, right, result, replace(expression, span, result))


def replace(expression: str, span: tuple[int, int], number: int) -> str:
    """Put a number for ``span`` of a canonical expression, with no parentheses left around it."""
    start, end = span
    while expression[start - 1 : start] == "(" and expression[end : end + 1] == ")":
        start, end = start - 1, end + 1
    return f"{expression[:start]}{number}{expression[end:]}"


def one_line(text: str) -> str:
    """A solution on one line, as the plain-text corpus and the model have it."""
    return text.replace("\n", " ")


def problem_text(expression: str) -> str:
    """The problem as it is put to the model."""
    return f"Evaluate: {expression}"
