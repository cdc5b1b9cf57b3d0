"""How long right answers are, and so how much a model may write."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from arithmetic_llm.config import MAX_DEPTH
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.expression import count_numbers
from arithmetic_llm.task.problem import Problem
from arithmetic_llm.task.solution import solve
from arithmetic_llm.task.text import one_line

MOST_NUMBERS = 2**MAX_DEPTH  # in a problem; a solution grows with the square of them
CONTEXTS_TO_WRITE = 4  # how far beyond the trained context decoding goes by default
MOST_TO_WRITE = 2**14  # but not further: 64 rows of the CPU recipe's then have a cache of 4 GiB


def answer_lengths(problems: Sequence[Problem], tokenizer: ArithmeticTokenizer) -> list[int]:
    """Tokens of a right answer to each problem, ``<eos>`` included."""
    texts = [one_line(solve(problem.expression).text) for problem in problems]
    # The <think> that begins the text belongs to the prompt; the <eos> comes in its place.
    return [len(ids) for ids in tokenizer.encode_batch(texts)]


def rooms_to_answer(
    problems: Sequence[Problem], tokenizer: ArithmeticTokenizer, context: int, limit: int = 0
) -> list[int]:
    """New tokens that a policy may write to each problem: a right answer's and a quarter more.

    At most `CONTEXTS_TO_WRITE` contexts or `MOST_TO_WRITE` tokens, which cuts off no depth whose
    solutions were trained whole: such a sample, prompt and all, fits into a context.

    Args:
        limit: what each may have instead; 0 = none was asked for.
    """
    if limit:
        return [limit] * len(problems)
    most = max(context, min(CONTEXTS_TO_WRITE * context, MOST_TO_WRITE))
    lengths = answer_lengths(problems, tokenizer)
    return [min(length + max(32, length // 4), most) for length in lengths]


def warn_if_too_short(
    limit: int, problems: Sequence[Problem], tokenizer: ArithmeticTokenizer
) -> None:
    """Say so if a length limit cuts off right answers; 0 = no limit was asked for."""
    lengths = answer_lengths(problems, tokenizer) if limit else []
    if longer := sum(length > limit for length in lengths):
        print(
            f"warning: --max-gen-length {limit} cuts off the right answers to {longer:,} of "
            f"{len(problems):,} problems; the longest takes {max(lengths):,} tokens",
            file=sys.stderr,
        )


def check_sizes(problems: Iterable[Problem], path: str) -> None:
    """Refuse what is larger than anything the sampler draws: its solution would fill the memory.

    Raises:
        UserError: a problem of the file has more numbers than a full tree of the greatest depth.
    """
    valid = (problem for problem in problems if problem.row.kind != "invalid")
    largest = max((count_numbers(problem.expression) for problem in valid), default=0)
    if largest > MOST_NUMBERS:
        raise UserError(
            f"{path}: has a problem of {largest:,} numbers, but at most {MOST_NUMBERS:,} can be "
            "solved step by step; leave it out"
        )
