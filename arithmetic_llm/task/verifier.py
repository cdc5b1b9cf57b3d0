"""Judges what a model wrote: the final result, every step, and the first thing that is wrong.

**Correct** means: all that follows the prompt ends by itself with exactly one well-formed final
result, and that is right. ``</think>`` stands in it once at most, to close the trace. A text with
any other special token, or with a problem of its own (``Evaluate:``), has no result; nor has one
that the length limit ended, because its last number might have gone on.

A step is three decisions in a row: which operation to carry out, what its result is, and how the
expression then reads. The first wrong one names the error:

    wrong_reduction   not the next operation; or an operation where none is left, an end where one
                      is, or a wrong word on whether and why the expression is invalid
    arithmetic        the next operation, but another result
    wrong_copy        a right equation, but what stands after "Expression now:", or at last after
                      "Final Result:", does not follow from it
    unparseable       not of the form "Step k: a + b = c Expression now: E" with steps counted
                      from 1, or no closed trace, or anything but one final result behind it
    cut_off           right as far as it goes, but the length limit ended the text

Each step is judged against the model's own previous expression (or, where that cannot be read,
what it should have been), so that steps after a first error are still judged on their merit. The
kind of white space makes no difference, nor do parentheses around a lone number. Every text gets a
verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from arithmetic_llm.task.expression import ExpressionError, canonicalise, parse
from arithmetic_llm.task.solution import Step, next_step
from arithmetic_llm.task.text import (
    CLOSE,
    EQUATION,
    ERROR,
    FINAL_RESULT,
    FOREIGN,
    NEW_EXPRESSION,
    NEXT_STEP,
    REFUSAL,
    Answer,
    one_line,
    one_spaced,
    read_answer,
    refusal_text,
    result_text,
    step_label,
)

ErrorKind = Literal["arithmetic", "wrong_reduction", "wrong_copy", "unparseable", "cut_off"]


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
    """Verdict on a text as a solution.

    ``predicted``     the final result that it ends with, None if it has none
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
        """The text ends with a final result, right or wrong."""
        return self.predicted is not None

    @property
    def correct(self) -> bool:
        """The text ends with the right final result, whatever led to it."""
        return self.predicted == self.answer

    @property
    def valid_steps(self) -> int:
        """Number of right steps, counted up to the first wrong one."""
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
        """Why the text is not correct (the `trace_error`), None if it is."""
        return None if self.correct else self.trace_error


@dataclass(frozen=True, slots=True)
class _Goal:
    """Start of a right solution: an expression, or else the refusal that it consists of."""

    expression: str | None
    refusal: str
    answer: Answer
    operations: int


def verify(expression: str, generated: str, cut_off: bool = False) -> Verdict:
    """Judge the text that a model wrote for a problem.

    Args:
        expression: the problem as the model had it, valid or not.
        generated: all that followed the prompt (which ends with ``<think>``), but for a last
            ``<eos>``.
        cut_off: whether the length limit ended the text, so that no ``<eos>`` did.
    """
    goal = _goal(expression)
    trace, closed, ending = _sections(generated)
    if cut_off and not closed:
        trace = _without_half_a_mark(trace)
    preamble, *steps = NEXT_STEP.split(trace)
    verdicts = _judge_steps(goal, preamble, steps)
    if cut_off and not closed:
        verdicts = _excuse_last(goal, verdicts)
    refused = goal.expression is None and preamble.strip() == goal.refusal
    conclusion = ERROR if refused else _before(goal, verdicts)
    end_error = _ending_error(conclusion, closed, ending, cut_off)
    predicted = None if cut_off or _has_no_result(generated) else read_answer(generated)
    return Verdict(predicted, goal.answer, tuple(verdicts), goal.operations, end_error)


def check_step(
    previous: str | None, step_line: str, expression_line: str, number: int | None = None
) -> StepVerdict:
    """Judge one step.

    Args:
        previous: the canonical expression before it; None if there is no valid one.
        step_line: ``Step k: a + b = c``.
        expression_line: ``Expression now: E``.
        number: the k expected; None accepts any.
    """
    step_line, expression_line = one_spaced(step_line), one_spaced(expression_line)
    expected = next_step(previous) if previous is not None else None
    if expected and expression_line == f"{NEW_EXPRESSION} {expected.expression}":
        written = expected.expression  # known to be canonical: parsing would take most of the time
    else:
        written = _canonical_or_none(expression_line.removeprefix(NEW_EXPRESSION))
    error = _equation_error(expected, step_line, number)
    if error is None and not _is_expression_line(expression_line):
        error = "unparseable"
    if error is None and written != expected.expression:
        error = "wrong_copy"
    leads_to = written or (expected.expression if expected else previous)
    return StepVerdict(f"{step_line} {expression_line}".strip(), error, leads_to)


def _is_expression_line(line: str) -> bool:
    return line.startswith(NEW_EXPRESSION) and not FOREIGN.search(line)


def _equation_error(expected: Step | None, step_line: str, number: int | None) -> ErrorKind | None:
    stated = EQUATION.fullmatch(step_line)
    if stated is None or (number is not None and stated[1] != str(number)):
        return "unparseable"
    if expected is None or stated[2] != expected.operation:
        return "wrong_reduction"
    return None if stated[3] == str(expected.result) else "arithmetic"


def _goal(expression: str) -> _Goal:
    try:
        tree = parse(expression)
    except ExpressionError as error:
        return _Goal(None, refusal_text(error.reason), ERROR, 0)
    return _Goal(tree.canonical, "", tree.value, tree.operations)


def _sections(generated: str) -> tuple[str, bool, str]:
    """The trace, whether it is closed, and what follows it, all words one space apart."""
    trace, closed, ending = generated.partition(CLOSE)
    return one_spaced(trace), bool(closed), one_spaced(ending)


def _has_no_result(generated: str) -> bool:
    """Marks stand in the text that no solution has, whatever it ends with."""
    return FOREIGN.search(generated) is not None or generated.count(CLOSE) > 1


def _without_half_a_mark(trace: str) -> str:
    """A trace without the beginning of ``Step k`` or ``</think>`` that it was cut off in."""
    marks = (step_label(len(NEXT_STEP.split(trace))), CLOSE)
    halves = [mark[:end] for mark in marks for end in range(1, len(mark) + 1)]
    half = next((half for half in halves if f" {trace}".endswith(f" {half}")), "")
    return trace.removesuffix(half)


def _judge_steps(goal: _Goal, preamble: str, steps: list[str]) -> list[StepVerdict]:
    """A verdict on each step; a wrong word before the first of them counts as a step as well."""
    verdicts = []
    preamble = preamble.strip()
    if preamble not in ("", goal.refusal):
        refusal = preamble.startswith(REFUSAL) and not FOREIGN.search(preamble)
        error = "wrong_reduction" if refusal else "unparseable"
        verdicts.append(StepVerdict(preamble, error, goal.expression))
    for number, text in enumerate(steps, 1):
        step_line, mark, expression = text.partition(NEW_EXPRESSION)
        previous = _before(goal, verdicts)
        verdicts.append(check_step(previous, step_line, mark + expression, number))
    return verdicts


def _before(goal: _Goal, verdicts: list[StepVerdict]) -> str | None:
    """The expression that stands after the steps so far."""
    return verdicts[-1].expression if verdicts else goal.expression


def _excuse_last(goal: _Goal, verdicts: list[StepVerdict]) -> list[StepVerdict]:
    """A last step that is the beginning of a right one was cut off, not wrong."""
    if not verdicts or verdicts[-1].ok:
        return verdicts
    *earlier, last = verdicts
    expected = next_step(_before(goal, earlier) or "")
    right = one_line(expected.text(len(verdicts))) if expected else goal.refusal
    return [*earlier, replace(last, error="cut_off")] if right.startswith(last.text) else verdicts


def _ending_error(
    conclusion: str | None, closed: bool, ending: str, cut_off: bool
) -> ErrorKind | None:
    """Error in the end of a text whose trace arrives at ``conclusion``."""
    if not closed:
        return "cut_off" if cut_off else "unparseable"
    if conclusion is None or " " in conclusion:  # an operation is left
        return "wrong_reduction"
    right = result_text(conclusion)
    if cut_off and right.startswith(ending):  # 1 may have become 12
        return "cut_off"
    if ending == right:
        return None
    return "wrong_copy" if _states_result(ending) else "unparseable"


def _states_result(ending: str) -> bool:
    return ending.startswith(FINAL_RESULT) and read_answer(ending) is not None


def _canonical_or_none(text: str) -> str | None:
    try:
        return canonicalise(text)
    except ExpressionError:
        return None
