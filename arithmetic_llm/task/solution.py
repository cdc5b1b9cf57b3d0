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
from arithmetic_llm.task.text import (
    CLOSE,
    END,
    EQUATION,
    ERROR,
    NEW_EXPRESSION,
    OPEN,
    STEP,
    Answer,
    one_line,
    refusal_text,
    result_text,
    solution_text,
    step_text,
)

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


def next_step(expression: str, stated: int | None = None) -> Step | None:
    """The next operation of a canonical expression, or None if it is a number.

    Args:
        stated: its result, if someone has said that it is another than the right one.
    """
    match = _READY.search(expression)
    if match is None:
        return None
    left, operator, right = int(match[1]), match[2], int(match[3])
    result = apply(left, operator, right) if stated is None else stated
    return Step(left, operator, right, result, _put(expression, match.span(), result))


def _put(expression: str, span: tuple[int, int], number: int) -> str:
    """The expression with a number in place of ``span``, and no parentheses left around it."""
    start, end = span
    while expression[start - 1 : start] == "(" and expression[end : end + 1] == ")":
        start, end = start - 1, end + 1
    return f"{expression[:start]}{number}{expression[end:]}"


# ------------------------------------------------------------------------- what comes next


def continuation(problem: str, written: str) -> str:
    """What a right solver would write next: to the end of the following step, or of the text.

    It makes the best of what stands there. The last expression that was stated counts, right or
    wrong, and so does the result of the step that was begun. Where that cannot be made out, or is
    not what the solver would have written, there is no continuation, which is an empty text.

    Args:
        problem: an expression in canonical text, or an invalid one.
        written: the beginning of a solution on one line, all that follows ``<think>``.

    Returns:
        Text on one line, with ``<eos>`` where the solution ends.
    """
    before, mark, step = written.rpartition(f" {STEP} ")
    if not mark:
        return _rest(one_line(solve(problem).text).removeprefix(OPEN) + END, written)
    _, mark, expression = before.rpartition(f" {NEW_EXPRESSION} ")
    number = before.count(f" {STEP} ") + 1
    try:
        return _rest_of_step(expression if mark else problem, number, f"{STEP} {step}")
    except ValueError:  # more digits than Python reads
        return ""


def _rest_of_step(expression: str, number: int, begun: str) -> str:
    """What is left of a step and the one behind it; by the result that it states, if need be."""
    own = EQUATION.match(begun)
    for stated in (None, int(own[3])) if own else (None,):
        step = next_step(expression, stated)
        if step is None:
            return ""
        text = f"{one_line(step.text(number))} {_following(step.expression, number + 1)}"
        if text.startswith(begun):
            return _rest(text, begun)
    return ""


def _following(expression: str, number: int) -> str:
    """The next step, or the end of the text if none is left."""
    step = next_step(expression)
    return one_line(step.text(number)) if step else f"{CLOSE} {result_text(expression)}{END}"


def _rest(text: str, beginning: str) -> str:
    """A text without its beginning; empty if it begins otherwise."""
    return text[len(beginning) :] if text.startswith(beginning) else ""
