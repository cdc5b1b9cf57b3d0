"""Judges what a model wrote: the final result, every step, and the first thing that is wrong.

A step is three decisions in a row: which operation to carry out, what its result is, and how the
expression then reads. The first wrong one names the error:

    wrong_reduction   not the next operation; or an operation where none is left, an end where one
                      is, or a wrong word on whether and why the expression is invalid
    arithmetic        the next operation, but another result
    wrong_copy        a right equation, but what stands after "Expression now:", or at last after
                      "Final Result:", does not follow from it
    unparseable       not of the form "Step k: a + b = c Expression now: E" with steps counted
                      from 1, or no closed trace, or no final result just behind it
    cut_off           right as far as it goes, but the length limit ended the text

Each step is judged against the model's own previous expression (or, where that cannot be read,
what it should have been), so that steps after a first error are still judged on their merit. The
kind of white space makes no difference, nor do parentheses around a lone number. Every text gets a
verdict.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from arithmetic_llm.expression import ExpressionError, canonicalise, parse
from arithmetic_llm.solution import (
    ERROR,
    FINAL_RESULT,
    NEW_EXPRESSION,
    Answer,
    Step,
    next_step,
    one_line,
    read_answer,
)

ErrorKind = Literal["arithmetic", "wrong_reduction", "wrong_copy", "unparseable", "cut_off"]

_PROMPT = re.compile(r"\s*(?:Evaluate:.*?)?<think>", re.DOTALL)
_NEXT_STEP = re.compile(r"(?=Step [0-9]+:)")
_EQUATION = re.compile(r"Step ([0-9]+): (-?[0-9]+ [+-] -?[0-9]+) = (-?[0-9]+)")
_RESULT = re.compile(rf"{FINAL_RESULT} \S+")
_HALF_A_MARK = re.compile(r"(?:^| )(?:St?e?p?|Step [0-9]+|</?t?h?i?n?k?)$")  # cut within "Step 2:"


@dataclass(frozen=True, slots=True)
class StepVerdict:
    """One step: its text on one line, what is wrong with it, and where it leads.

    ``expression`` is what the next step is judged against: canonical text, or None where nothing
    readable has been written for an invalid problem.
    """

    text: str
    error: ErrorKind | None
    expression: str | None

    @property
    def ok(self) -> bool:
        """The step is right in all three decisions."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a text is worth as a solution.

    ``predicted``     the final result that it states, None if none can be read
    ``answer``        the exact one, ``"ERROR"`` for an invalid expression
    ``steps``         a verdict on each step that was written
    ``needed_steps``  how many a right solution has
    ``end_error``     what is wrong with what follows the steps
    """

    predicted: Answer | None
    answer: Answer
    steps: tuple[StepVerdict, ...]
    needed_steps: int
    end_error: ErrorKind | None

    @property
    def parseable(self) -> bool:
        """A final result could be read."""
        return self.predicted is not None

    @property
    def correct(self) -> bool:
        """The final result is right, whatever led to it."""
        return self.predicted == self.answer

    @property
    def valid_steps(self) -> int:
        """How many steps are right, counted up to the first wrong one."""
        return next((n for n, step in enumerate(self.steps) if not step.ok), len(self.steps))

    @property
    def trace_error(self) -> ErrorKind | None:
        """The first thing that is wrong with the text, None if nothing is."""
        return next((step.error for step in self.steps if not step.ok), self.end_error)

    @property
    def trace_correct(self) -> bool:
        """Every needed step is there and right, nothing else is there, and the result is right."""
        return self.trace_error is None

    @property
    def first_error(self) -> int | None:
        """The index of the first wrong step, ``len(steps)`` if it is what follows, or None."""
        return None if self.trace_correct else self.valid_steps

    @property
    def error(self) -> ErrorKind | None:
        """Why the final result is wrong (the `trace_error`), None if it is right."""
        return None if self.correct else self.trace_error


@dataclass(frozen=True, slots=True)
class _Problem:
    """What a right solution starts from: an expression, or else the refusal that it consists of."""

    expression: str | None
    refusal: str
    answer: Answer
    operations: int


def verify(expression: str, generated: str, cut_off: bool = False) -> Verdict:
    """Judge the text that a model wrote for a problem.

    Args:
        expression: the problem as the model had it, valid or not.
        generated: what followed the prompt; the prompt or its ``<think>`` may stand before it.
        cut_off: whether the length limit ended the text.
    """
    problem = _read_problem(expression)
    trace, closed, ending = _sections(generated)
    if cut_off and not closed:
        trace = _HALF_A_MARK.sub("", trace)
    preamble, *steps = _NEXT_STEP.split(trace)
    verdicts = _judge_steps(problem, preamble, steps)
    if cut_off and not closed:
        verdicts = _excuse_last(problem, verdicts)
    refused = problem.expression is None and preamble.strip() == problem.refusal
    conclusion = ERROR if refused else _before(problem, verdicts)
    end_error = _ending_error(conclusion, closed, ending, cut_off)
    predicted = read_answer(generated)
    return Verdict(predicted, problem.answer, tuple(verdicts), problem.operations, end_error)


def check_step(
    previous: str | None, step_line: str, expression_line: str, number: int | None = None
) -> StepVerdict:
    """Judge one step.

    Args:
        previous: the canonical expression before it; None if there is no valid one.
        step_line: ``Step k: a + b = c``.
        expression_line: ``Expression now: E``.
        number: what k has to be; None accepts any.
    """
    step_line, expression_line = _one_spaced(step_line), _one_spaced(expression_line)
    expected = next_step(previous) if previous is not None else None
    written = _canonical_or_none(expression_line.removeprefix(NEW_EXPRESSION))
    error = _equation_error(expected, step_line, number)
    if error is None and not expression_line.startswith(NEW_EXPRESSION):
        error = "unparseable"
    if error is None and written != expected.expression:
        error = "wrong_copy"
    leads_to = written or (expected.expression if expected else previous)
    return StepVerdict(f"{step_line} {expression_line}".strip(), error, leads_to)


def _equation_error(expected: Step | None, step_line: str, number: int | None) -> ErrorKind | None:
    stated = _EQUATION.fullmatch(step_line)
    if stated is None or (number is not None and stated[1] != str(number)):
        return "unparseable"
    if expected is None or stated[2] != expected.operation:
        return "wrong_reduction"
    return None if stated[3] == str(expected.result) else "arithmetic"


def _read_problem(expression: str) -> _Problem:
    try:
        problem = parse(expression)
    except ExpressionError as error:
        return _Problem(None, f"Error: {error.reason}", ERROR, 0)
    return _Problem(problem.canonical, "", problem.value, problem.operations)


def _sections(generated: str) -> tuple[str, bool, str]:
    """The trace, whether it is closed, and what follows it, all words one space apart."""
    prompt = _PROMPT.match(generated)
    text = generated[prompt.end() :] if prompt else generated
    trace, closed, ending = text.partition("</think>")
    return _one_spaced(trace), bool(closed), _one_spaced(ending)


def _judge_steps(problem: _Problem, preamble: str, steps: list[str]) -> list[StepVerdict]:
    """A verdict on each step; a wrong word before the first of them counts as a step as well."""
    verdicts = []
    preamble = preamble.strip()
    if preamble not in ("", problem.refusal):
        error = "wrong_reduction" if preamble.startswith("Error:") else "unparseable"
        verdicts.append(StepVerdict(preamble, error, problem.expression))
    for number, text in enumerate(steps, 1):
        step_line, mark, expression = text.partition(NEW_EXPRESSION)
        previous = _before(problem, verdicts)
        verdicts.append(check_step(previous, step_line, mark + expression, number))
    return verdicts


def _before(problem: _Problem, verdicts: list[StepVerdict]) -> str | None:
    """The expression that stands after the steps so far."""
    return verdicts[-1].expression if verdicts else problem.expression


def _excuse_last(problem: _Problem, verdicts: list[StepVerdict]) -> list[StepVerdict]:
    """A last step that is the beginning of a right one was cut off, not wrong."""
    if not verdicts or verdicts[-1].ok:
        return verdicts
    *earlier, last = verdicts
    expected = next_step(_before(problem, earlier) or "")
    right = one_line(expected.text(len(verdicts))) if expected else problem.refusal
    return [*earlier, replace(last, error="cut_off")] if right.startswith(last.text) else verdicts


def _ending_error(
    conclusion: str | None, closed: bool, ending: str, cut_off: bool
) -> ErrorKind | None:
    """What is wrong with the end of a text whose trace arrives at ``conclusion``."""
    if not closed:
        return "cut_off" if cut_off else "unparseable"
    if conclusion is None or " " in conclusion:  # an operation is left
        return "wrong_reduction"
    right = f"{FINAL_RESULT} {conclusion}"
    if ending == right:
        return None
    if cut_off and right.startswith(ending):
        return "cut_off"
    return "wrong_copy" if _states_result(ending) else "unparseable"


def _states_result(ending: str) -> bool:
    return _RESULT.fullmatch(ending) is not None and read_answer(ending) is not None


def _one_spaced(text: str) -> str:
    return " ".join(text.split())


def _canonical_or_none(text: str) -> str | None:
    try:
        return canonicalise(text)
    except ExpressionError:
        return None
