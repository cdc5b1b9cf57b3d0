"""The solver for a person: read an expression, show the solution as it is written, check it."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Generator, Iterator

from arithmetic_llm.evaluation.judge import Outcome
from arithmetic_llm.evaluation.marks import ERROR_WORDS, Marks, marks_for
from arithmetic_llm.evaluation.solver import ArithmeticSolver
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.expression import ExpressionError, parse
from arithmetic_llm.task.text import CLOSE, ERROR, FINAL_RESULT, NEW_EXPRESSION, REFUSAL, STEP
from arithmetic_llm.task.verifier import StepVerdict, verify

PROMPT = "Enter expression: "
RULE = "-" * 60
FAREWELLS = ("exit", "quit", "q")
CARET_WINDOW = 60  # characters of a long invalid expression that are shown


# ----------------------------------------------------------------------------- the dialogue


def run(solver: ArithmeticSolver) -> None:
    """Read expressions and show solutions until ``exit``, end of input or Ctrl-C."""
    _prepare_terminal()
    marks = marks_for(sys.stdout.encoding)
    try:
        for typed in expressions():
            for piece in answer(solver, typed, marks):
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print()


def expressions() -> Iterator[str]:
    """Lines that the user types; piped input is echoed, so that a transcript is whole."""
    while True:
        try:
            typed = input(PROMPT).strip()
        except EOFError:
            print()
            return
        if not sys.stdin.isatty():
            print(typed)
        if typed.lower() in FAREWELLS:
            return
        if typed:
            yield typed


def _prepare_terminal() -> None:
    """Line editing and history where the platform has them; odd bytes never end the dialogue."""
    with contextlib.suppress(ImportError):  # Windows has its own
        import readline  # noqa: F401
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def answer(solver: ArithmeticSolver, typed: str, marks: Marks) -> Iterator[str]:
    """Pieces of all that is shown for one line of input."""
    try:
        expression = parse(typed).canonical
        solver.prompt(expression)
    except ExpressionError as error:
        yield explain(error)
        return
    except UserError as error:
        yield f"\n{error}\n\n"
        return
    yield "".join(f"\nNote: {warning}.\n" for warning in solver.warnings(expression))
    yield from screen(solver, expression, marks)


def explain(error: ExpressionError) -> str:
    """The invalid text, a caret under the place, and what is wrong there.

    All that stands before the place is of the grammar's own characters, so each takes one column.
    """
    text = "".join(c if c.isprintable() else " " for c in error.text)
    start = max(0, error.column - CARET_WINDOW // 2)
    before, after = text[start : error.column], text[error.column : start + CARET_WINDOW]
    left, right = "..." * (start > 0), "..." * (start + CARET_WINDOW < len(text))
    indent = " " * (len(left + before))
    return f"\n  {left}{before}{after}{right}\n  {indent}^\nInvalid expression: {error}\n\n"


# ------------------------------------------------------------------------------- the screen


def screen(solver: ArithmeticSolver, expression: str, marks: Marks) -> Iterator[str]:
    """The solution of a valid expression, as the model writes it, and what it is worth."""
    yield f"\n{RULE}\nSOLUTION:\n{RULE}\n\nReasoning Steps:"
    outcome = yield from Typesetter(expression, marks).set(solver.stream(expression))
    yield f"\n{RULE}\n{comparison(outcome, marks)}\n"
    if outcome.beyond_context:
        yield f"Note: the text is longer than anything trained on ({solver.context:,} tokens).\n"
    yield "\n"


def comparison(outcome: Outcome, marks: Marks) -> str:
    """The model's result against the exact one, in a sentence."""
    if outcome.correct and outcome.verdict.trace_correct:
        return f"{marks.right} Right: the exact result is {outcome.value}."
    if outcome.correct:
        return f"{marks.right} The result is right, {outcome.value}; the way to it is not."
    if outcome.result is None:
        stopped = f", stopped after {outcome.tokens:,} tokens" if outcome.cut_off else ""
        return f"{marks.wrong} No readable result{stopped}; the exact one is {outcome.value}."
    if outcome.result == ERROR:
        return f"{marks.wrong} Wrong: this is a valid expression, its result is {outcome.value}."
    return f"{marks.wrong} Wrong: the exact result is {outcome.value}."


# What can be shown at once: the end of the trace, a whole word that might be a mark, or a piece of
# one that cannot be.
_LINES = {mark.split()[0] for mark in (STEP, NEW_EXPRESSION, REFUSAL, FINAL_RESULT)}
_RESULT = FINAL_RESULT.split()[0]
_STARTS = "".join(sorted({word[0] for word in (*_LINES, CLOSE)}))
_SHOWABLE = re.compile(rf"(\s*)({CLOSE}|[{_STARTS}]\S*(?=\s)|[^\s{_STARTS}]+)")


class Typesetter:
    """Sets the one line that a model writes as the lines of the screen, marking each step.

    A line begins at ``Step``, ``Expression``, ``Error:`` and ``Final``; so a word is held back
    while it might become one of these, and every other character is shown as it comes.
    """

    def __init__(self, expression: str, marks: Marks):
        self.expression, self.marks = expression, marks
        self.held = ""  # written, and not yet shown
        self.shown = ""
        self.steps_marked = 0
        self.new_line_due = True  # whatever the next word is

    def set(self, pieces: Generator[str, None, Outcome]) -> Generator[str, None, Outcome]:
        """The screen's text for a stream of pieces; returns what the stream returns."""
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                yield from self._feed(" ")  # nothing follows: whatever is held is a whole word
                yield self._mark(end.value.steps)
                return end.value
            yield from self._feed(piece)

    def _feed(self, piece: str) -> Iterator[str]:
        self.held += piece
        while match := _SHOWABLE.match(self.held):
            self.held = self.held[match.end() :]
            yield self._place(*match.groups())

    def _place(self, space: str, word: str) -> str:
        """A word as it goes on the screen, after the mark of the step that it ends."""
        ends_step = word in (STEP, _RESULT, CLOSE)
        mark = self._mark(verify(self.expression, self.shown).steps) if ends_step else ""
        self.shown += space + word
        if word == CLOSE:
            self.new_line_due = True
            return mark
        return mark + self._separator(space, word) + word

    def _separator(self, space: str, word: str) -> str:
        due, self.new_line_due = self.new_line_due, False
        if word == _RESULT:
            return "\n\n"
        if due or word in _LINES:
            return "\n  "
        return " " if space else ""

    def _mark(self, steps: tuple[StepVerdict, ...]) -> str:
        """The mark of the last step, unless it has been shown."""
        if len(steps) <= self.steps_marked:
            return ""
        self.steps_marked = len(steps)
        last = steps[-1]
        return (
            f"  {self.marks.right}"
            if last.ok
            else f"  {self.marks.wrong} {ERROR_WORDS[last.error]}"
        )
