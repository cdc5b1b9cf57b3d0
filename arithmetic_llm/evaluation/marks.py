"""What the verifier found, for a person: signs, words, and a text cut into what is marked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from arithmetic_llm.task.expression import canonicalise
from arithmetic_llm.task.solution import next_step, solve
from arithmetic_llm.task.text import (
    CLOSE,
    ERROR,
    NEXT_STEP,
    OPEN,
    REFUSAL,
    one_line,
    result_text,
)
from arithmetic_llm.task.verifier import ErrorKind, Verdict

ERROR_WORDS: dict[ErrorKind, str] = {
    "arithmetic": "wrong result",
    "wrong_reduction": "not the next operation",
    "wrong_copy": "wrongly copied",
    "unparseable": "unreadable",
    "cut_off": "cut off",
}


@dataclass(frozen=True)
class Marks:
    """Signs for right and wrong."""

    right: str
    wrong: str


SYMBOLS, PLAIN = Marks("✓", "✗"), Marks("[right]", "[wrong]")


def marks_for(encoding: str | None) -> Marks:
    """Symbols, or words where the encoding has no symbols."""
    try:
        (SYMBOLS.right + SYMBOLS.wrong).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return SYMBOLS


# ------------------------------------------------------------------------- passages of a text


class Passage(NamedTuple):
    """A stretch of a text that stands on lines of its own: a step, or what is before or after."""

    text: str  # the passages of a text, joined, are the text
    mark: str  # a sign, and a word or two if it is wrong; empty where there is nothing to judge
    wrong: bool
    first_wrong: bool  # the first thing that is wrong with the text


def passages(text: str, verdict: Verdict, marks: Marks = SYMBOLS) -> list[Passage]:
    """A text in passages, each with the verifier's mark; the last is what follows the steps."""
    trace, closed, ending = text.partition(CLOSE)
    preamble, *steps = NEXT_STEP.split(trace)
    judged = [preamble, *steps] if len(verdict.steps) > len(steps) else steps
    found = [
        _passage(stretch, step.error, place == verdict.first_error, marks)
        for place, (stretch, step) in enumerate(zip(judged, verdict.steps, strict=True))
    ]
    if judged is steps and preamble:
        refused = preamble.strip().startswith(REFUSAL)
        found.insert(0, Passage(preamble, marks.right if refused else "", False, False))
    return [*found, _end(closed + ending, verdict, marks)]


def _passage(text: str, error: ErrorKind | None, first: bool, marks: Marks) -> Passage:
    mark = f"{marks.wrong} {ERROR_WORDS[error]}" if error else marks.right
    return Passage(text, mark, error is not None, first)


def _end(text: str, verdict: Verdict, marks: Marks) -> Passage:
    """The last passage: right if it states the exact result, whatever led to it.

    Unless it is itself what makes the trace wrong, by words between trace and result.
    """
    first = verdict.first_error == len(verdict.steps)
    if verdict.correct and not first:
        return Passage(text, marks.right, False, False)
    why = ERROR_WORDS[verdict.end_error] if verdict.end_error else "it follows from the steps"
    exact = "" if verdict.correct else f"; the exact result is {verdict.answer}"
    return Passage(text, f"{marks.wrong} {why}{exact}", True, first)


def right_instead(expression: str, verdict: Verdict) -> str:
    """What a right solver would have written in place of the first thing that is wrong."""
    place = verdict.first_error
    if place is None:
        return ""
    if verdict.answer == ERROR:
        return one_line(solve(expression).text).removeprefix(OPEN).strip()
    before = verdict.steps[place - 1].expression if place else canonicalise(expression)
    step = next_step(before)
    return one_line(step.text(place + 1)) if step else result_text(before)
