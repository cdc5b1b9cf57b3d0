"""One sample of a corpus: a problem with its solution, and how it was drawn."""

from __future__ import annotations

from typing import NamedTuple

from arithmetic_llm.task.solution import Solution, solve
from arithmetic_llm.task.text import STEP, Answer, begun, one_line, problem_text, sequence_text


class Record(NamedTuple):
    """One line of a corpus; the fields are its JSON keys, in their order.

    A rewriting has one step for its solution and no answer. Its problem is the step before, on one
    line, unless it is the first step of a problem.
    """

    expression: str
    problem: str
    solution: str
    answer: Answer | None

    @property
    def is_problem(self) -> bool:
        """Whether it can be put to a model; a rewriting cannot."""
        return self.answer is not None

    @property
    def sequence(self) -> str:
        """The whole sample as the model has it: ``Evaluate: E <think> ... Final Result: N``.

        In the midst of a solution it begins with a space, as there: the same tokens.
        """
        text = sequence_text(self.problem, self.solution)
        return f" {text}" if self.problem.startswith(STEP) else text


class Sample(NamedTuple):
    """A record and how it was drawn; an invalid expression has no depth and no terms."""

    record: Record
    style: str
    depth: int | None
    terms: int | None


def solved(expression: str) -> Record:
    """The record of an expression, whatever its spelling; that of an invalid one says ERROR."""
    return record_of(expression, solve(expression))


def rewriting(expression: str, solution: Solution, number: int) -> Record:
    """The record of a single step, the ``number``-th (from 1) of an expression's solution.

    The step before it tells its number. Where nothing does, a model learns to guess it, and at
    each step that is far behind the last one it will.
    """
    text = solution.steps[number - 1].text(number)
    if number == 1:
        return Record(expression, problem_text(expression), begun(text), None)
    before = solution.steps[number - 2]
    return Record(before.expression, one_line(before.text(number - 1)), text, None)


def record_of(expression: str, solution: Solution) -> Record:
    """The record of an expression whose solution is known."""
    return Record(expression, problem_text(expression), solution.text, solution.answer)
