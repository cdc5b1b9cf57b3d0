"""One sample of a corpus: a problem with its solution, and how it was drawn."""

from __future__ import annotations

from typing import NamedTuple

from arithmetic_llm.task.solution import Solution, solve
from arithmetic_llm.task.text import STEP, Answer, begun, one_line, problem_text, sequence_text


class Record(NamedTuple):
    """One line of a corpus; the fields are its JSON keys, in their order.

    A rewriting has a few steps for its solution and no answer. Its problem is the step before them,
    on one line, unless they are the first of a solution.
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


def rewriting(expression: str, solution: Solution, first: int, last: int) -> Record:
    """The record of the steps ``first`` to ``last`` (from 1) of an expression's solution.

    The step before them tells their numbers. Where nothing does, a model learns to guess, and will
    do so wherever it is far from the last number.
    """
    numbered = enumerate(solution.steps[first - 1 : last], first)
    texts = [step.text(number) for number, step in numbered]
    if first == 1:
        return Record(expression, problem_text(expression), begun(*texts), None)
    before = solution.steps[first - 2]
    problem = one_line(before.text(first - 1))
    return Record(before.expression, problem, "\n".join(texts), None)


def record_of(expression: str, solution: Solution) -> Record:
    """The record of an expression whose solution is known."""
    return Record(expression, problem_text(expression), solution.text, solution.answer)
