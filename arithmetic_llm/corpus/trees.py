"""Random expressions: trees of exact depth, and the styles they are written in.

A tree is held in postfix (see `task.expression.Expression.postfix`). Every function draws from the
``random.Random`` it is given and from nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from arithmetic_llm.cli import check_fields, opt
from arithmetic_llm.corpus.corruption import corrupt
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.expression import Postfix, apply, spell

LEAF_PROBABILITY = 0.3  # that the free side of an operation stops growing, at every level
TREE_STYLES = ("nested", "typed", "padded")
STYLES = (*TREE_STYLES, "flat", "drill", "invalid")
# A solution grows with the square of the numbers in its expression. At these limits there are some
# 200 numbers, and solutions of 50,000 to 200,000 tokens: more than any context here. Each level of
# depth doubles that. At depth 20 one solution had 32 million tokens and took 12 GB to encode.
MAX_DEPTH = 10
MAX_FLAT_TERMS = 200
LARGEST_NUMBER = 10**100
MANY = 10**15


def _rate(default: float, help: str) -> float:
    return opt(default, help, at_least=0.0, at_most=1.0)


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """What to sample. Each rate is a fraction of all samples; nested expressions are the rest."""

    num_range: tuple[int, int] = opt((1, 20), "smallest and largest number in an expression")
    min_depth: int = opt(1, "least depth of an expression tree", at_least=1)
    max_depth: int = opt(5, "greatest depth of an expression tree", at_least=1, at_most=MAX_DEPTH)
    invalid_rate: float = _rate(0.1, "fraction of invalid expressions, rounded to whole samples")
    typed_rate: float = _rate(
        0.1, "fraction written as people type, without needless parentheses: 1 + 2 + 3"
    )
    padded_rate: float = _rate(
        0.0,
        "fraction with 0 to 2 needless pairs of parentheses around each operation, "
        "at least one in all: ((1 + 2)) - 3",
    )
    flat_rate: float = _rate(
        0.0,
        "fraction of flat sums without parentheses, 2 to --flat-terms numbers: 7 - 2 + 9 - 1",
    )
    drill_rate: float = _rate(
        0.0, "fraction of one-step drills: single steps of trees of --max-depth, as 31 - -12"
    )
    flat_terms: int = opt(20, "most numbers in a flat sum", at_least=2, at_most=MAX_FLAT_TERMS)

    def __post_init__(self) -> None:
        check_fields(self)
        low, high = self.num_range
        if low > high:
            raise UserError(f"--num-range {low} {high}: the smaller number comes first")
        if max(-low, high) > LARGEST_NUMBER:
            raise UserError("--num-range: numbers of up to 100 digits, please")
        if self.min_depth > self.max_depth:
            raise UserError(f"--min-depth {self.min_depth}: is above --max-depth {self.max_depth}")
        rates = {style: self.rate(style) for style in STYLES[1:]}
        if sum(rates.values()) > 1 + 1e-9:
            shown = ", ".join(f"{style} {rate:g}" for style, rate in rates.items() if rate)
            raise UserError(f"the rates add up to more than 1 ({shown}); lower one of them")

    def rate(self, style: str) -> float:
        """The fraction of samples of a style other than nested."""
        return getattr(self, f"{style}_rate")

    def style_counts(self, num_samples: int) -> dict[str, int]:
        """Exact counts that add up to ``num_samples``, each rate rounded to the nearest."""
        counts, left = {}, num_samples
        for style in reversed(STYLES[1:]):  # invalid first: its rate is a promise
            counts[style] = min(left, math.floor(self.rate(style) * num_samples + 0.5))
            left -= counts[style]
        return {"nested": left, **counts}


# -------------------------------------------------------------------------------- problems


def draw(spec: SampleSpec, style: str, rng: Random) -> Postfix | str:
    """A tree to be written in a style; for ``"invalid"``, the text of an invalid expression."""
    if style == "flat":
        return flat_sum(rng.randint(2, spec.flat_terms), spec.num_range, rng)
    if style == "drill":
        return drill(spec, rng)
    tree = exact_tree(rng.randint(spec.min_depth, spec.max_depth), spec.num_range, rng)
    return corrupt(spell(tree), rng) if style == "invalid" else tree


# ---------------------------------------------------------------------------------- trees


def exact_tree(depth: int, num_range: tuple[int, int], rng: Random) -> Postfix:
    """A tree exactly that deep: one side of depth - 1, the other free, swapped at random."""
    if depth == 0:
        return (_number(num_range, rng),)
    sides = [exact_tree(depth - 1, num_range, rng), _free_tree(depth - 1, num_range, rng)]
    if rng.random() < 0.5:
        sides.reverse()
    return (*sides[0], *sides[1], _operator(rng))


def _free_tree(depth: int, num_range: tuple[int, int], rng: Random) -> Postfix:
    """A tree of at most that depth, which stops at a number with `LEAF_PROBABILITY`."""
    if depth == 0 or rng.random() < LEAF_PROBABILITY:
        return (_number(num_range, rng),)
    left = _free_tree(depth - 1, num_range, rng)
    return (*left, *_free_tree(depth - 1, num_range, rng), _operator(rng))


def flat_sum(terms: int, num_range: tuple[int, int], rng: Random) -> Postfix:
    """The tree of ``a + b - c ...`` with that many numbers."""
    tree: list[int | str] = [_number(num_range, rng)]
    for _ in range(terms - 1):
        tree += (_number(num_range, rng), _operator(rng))
    return tuple(tree)


def drill(spec: SampleSpec, rng: Random) -> Postfix:
    """One operation on two numbers, picked among the steps that solve a tree of ``max_depth``.

    So drills have just the numbers, large and negative ones included, that traces meet, as often.
    """
    results: list[int] = []
    steps: list[Postfix] = []
    for symbol in exact_tree(spec.max_depth, spec.num_range, rng):
        if isinstance(symbol, int):
            results.append(symbol)
            continue
        right, left = results.pop(), results.pop()
        steps.append((left, right, symbol))
        results.append(apply(left, symbol, right))
    return rng.choice(steps)


def _number(num_range: tuple[int, int], rng: Random) -> int:
    return rng.randrange(num_range[0], num_range[1] + 1)


def _operator(rng: Random) -> str:
    return "+" if rng.random() < 0.5 else "-"


def count_trees(depth: int, num_range: tuple[int, int]) -> int:
    """How many trees are exactly that deep; `MANY` if there are more."""
    numbers = num_range[1] - num_range[0] + 1
    shallower, up_to = 0, numbers  # trees of less than the depth, and of at most the depth
    for _ in range(depth):
        shallower, up_to = up_to, numbers + 2 * up_to**2
        if up_to > MANY:  # squared at every level: a number too long to work with before long
            return MANY
    return up_to - shallower


def count_flat_sums(terms: int, num_range: tuple[int, int]) -> int:
    """How many flat sums of that many numbers there are."""
    return (num_range[1] - num_range[0] + 1) ** terms * 2 ** (terms - 1)


def all_trees(depth: int, num_range: tuple[int, int]) -> Iterator[Postfix]:
    """Every tree that is exactly that deep, once."""
    if depth == 0:
        yield from ((number,) for number in range(num_range[0], num_range[1] + 1))
        return
    levels = [list(all_trees(level, num_range)) for level in range(depth)]
    shallower = [tree for level in levels[:-1] for tree in level]
    for lefts, rights in (
        (levels[-1], levels[-1]),
        (levels[-1], shallower),
        (shallower, levels[-1]),
    ):
        for left in lefts:
            for right in rights:
                yield from ((*left, *right, operator) for operator in "+-")


def all_flat_sums(terms: int, num_range: tuple[int, int]) -> Iterator[Postfix]:
    """Every flat sum of that many numbers, once."""
    numbers = range(num_range[0], num_range[1] + 1)
    choices = [numbers, *([numbers, "+-"] * (terms - 1))]
    yield from itertools.product(*choices)


# -------------------------------------------------------------------------------- styles


def write(tree: Postfix, style: str, rng: Random) -> str:
    """The tree as text in a style; the text always parses back to the same tree."""
    if style in ("typed", "flat"):
        return spell(tree, wrap_left=str)
    nested = spell(tree)
    return _padded(tree, nested, rng) if style == "padded" else nested


def _padded(tree: Postfix, nested: str, rng: Random) -> str:
    def pad(operation: str, needed: int = 1) -> str:
        pairs = needed + rng.randrange(3)
        return "(" * pairs + operation + ")" * pairs

    text = nested
    while text == nested:
        text = pad(spell(tree, pad, pad), needed=0)
    return text
