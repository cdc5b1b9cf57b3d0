"""Drafts: what a right solver would write, for the decoder to check and never to believe."""

from __future__ import annotations

from collections.abc import Sequence

from arithmetic_llm.model.decode import Guess
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.task.problem import Problem
from arithmetic_llm.task.solution import continuation


def right_continuations(problems: Sequence[Problem], tokenizer: ArithmeticTokenizer) -> Guess:
    """Guesses for `decode`: row i goes on with its own text as a right solver of problem i would.

    They save passes where the model writes just that, and change nothing that it writes.
    """

    def guess(row: int, written: list[int]) -> list[int]:
        settled = tokenizer.settled(written)
        text, begun = tokenizer.decode(written[:settled]), written[settled:]
        ids = tokenizer.encode(continuation(problems[row].expression, text))
        return ids[len(begun) :] if ids[: len(begun)] == begun else []

    return guess
