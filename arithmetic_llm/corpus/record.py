"""One sample of a corpus: a problem with its solution, and how it was drawn."""

from __future__ import annotations

from typing import NamedTuple

from arithmetic_llm.task.solution import Solution, Step, solve
from arithmetic_llm.task.text import Answer, expression_text, problem_text, sequence_text


class Record(NamedTuple):
    """One line of a corpus; the fields are its JSON keys, in their order.

    A rewriting has ``Expression now: E`` for its problem, one step for its solution and no answer.
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

        A rewriting has a space before it, as in the midst of a solution: the same tokens.
        """
        text = sequence_text(self.problem, self.solution)
        return text if self.is_problem else f" {text}"


class Sample(NamedTuple):
    """A record and how it was drawn; an invalid expression has no depth and no terms."""

    record: Record
    style: str
    depth: int | None
    terms: int | None


def solved(expression: str) -> Record:
    """The record of an expression, whatever its spelling; that of an invalid one says ERROR."""
    return record_of(expression, solve(expression))


def rewriting(expression: str, number: int, step: Step) -> Record:
    """The record of a single step, the ``number``-th of a solution, from an expression."""
    return Record(expression, expression_text(expression), step.text(number), None)


def record_of(expression: str, solution: Solution) -> Record:
    """The record of an expression whose solution is known."""
    return Record(expression, problem_text(expression), solution.text, solution.answer)
