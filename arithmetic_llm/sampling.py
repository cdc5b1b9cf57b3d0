"""Random expressions: exact depths, the styles they are written in, and ways to spoil them.

A tree is held in postfix (see `expression.Expression.postfix`). Every function draws from the
``random.Random`` it is given and from nothing else.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from arithmetic_llm.cli import opt
from arithmetic_llm.expression import ExpressionError, Postfix, parse, spell
from arithmetic_llm.runtime import UserError

LEAF_PROBABILITY = 0.3  # that the free side of an operation stops growing, at every level
TREE_STYLES = ("nested", "typed", "padded")
STYLES = (*TREE_STYLES, "flat", "drill", "invalid")


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """What to sample. Each rate is a fraction of all samples; nested expressions are the rest."""

    num_range: tuple[int, int] = opt((1, 20), "smallest and largest number in an expression")
    min_depth: int = opt(1, "least depth of an expression tree", at_least=1)
    max_depth: int = opt(5, "greatest depth of an expression tree", at_least=1, at_most=20)
    invalid_rate: float = opt(0.1, "fraction of invalid expressions", at_least=0.0, at_most=1.0)
    typed_rate: float = opt(
        0.1,
        "fraction written as people type, without needless parentheses: 1 + 2 + 3",
        at_least=0.0,
        at_most=1.0,
    )
    padded_rate: float = opt(
        0.0,
        "fraction with 0 to 2 needless pairs of parentheses around each operation, "
        "at least one in all: ((1 + 2)) - 3",
        at_least=0.0,
        at_most=1.0,
    )
    flat_rate: float = opt(
        0.0,
        "fraction of flat sums without parentheses, 2 to --flat-terms numbers: 7 - 2 + 9 - 1",
        at_least=0.0,
        at_most=1.0,
    )
    drill_rate: float = opt(
        0.0,
        "fraction of one-step drills with operands up to --drill-bound: -57 - 112",
        at_least=0.0,
        at_most=1.0,
    )
    flat_terms: int = opt(20, "most numbers in a flat sum", at_least=2)
    drill_bound: int | None = opt(
        None,
        "largest operand of a drill, either sign; unless given, the largest that a tree of "
        "--max-depth can reach: largest number x 2^(max_depth - 1)",
        at_least=1,
    )

    def __post_init__(self) -> None:
        low, high = self.num_range
        if low > high:
            raise UserError(f"--num-range {low} {high}: the smaller number comes first")
        if self.min_depth > self.max_depth:
            raise UserError(f"--min-depth {self.min_depth}: is above --max-depth {self.max_depth}")
        rates = {style: self.rate(style) for style in STYLES[1:]}
        if sum(rates.values()) > 1 + 1e-9:
            shown = ", ".join(f"{style} {rate:g}" for style, rate in rates.items() if rate)
            raise UserError(f"the rates add up to more than 1 ({shown}); lower one of them")

    def rate(self, style: str) -> float:
        """The fraction of samples of a style other than nested."""
        return getattr(self, f"{style}_rate")

    @property
    def largest_drill(self) -> int:
        """The bound on the operands of drills, derived from the trees unless it is set.

        A side of a tree of depth d is at most d - 1 deep, and each level can double the largest
        number: 20 x 2^3 = 160 for numbers up to 20 at depth 4.
        """
        if self.drill_bound is not None:
            return self.drill_bound
        return max(1, *map(abs, self.num_range)) * 2 ** (self.max_depth - 1)

    def style_counts(self, num_samples: int) -> dict[str, int]:
        """Exact counts that add up to ``num_samples``, each rate rounded to the nearest."""
        counts, left = {}, num_samples
        for style in reversed(STYLES[1:]):  # invalid first: its rate is a promise
            counts[style] = min(left, math.floor(self.rate(style) * num_samples + 0.5))
            left -= counts[style]
        return {"nested": left, **counts}


# --------------------------------------------------------------------------------- trees


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
    """One operation on two numbers of either sign, such as a trace meets on its way.

    Intermediate results crowd around zero, so each operand is uniform within the bound halved a
    random number of times, once for each level of the tree at which it could have arisen.
    """
    operands = [_drill_operand(spec, rng) for _ in range(2)]
    return (*operands, _operator(rng))


def _drill_operand(spec: SampleSpec, rng: Random) -> int:
    bound = max(1, spec.largest_drill >> rng.randrange(spec.max_depth))
    return _number((-bound, bound), rng)


def _number(num_range: tuple[int, int], rng: Random) -> int:
    return rng.randrange(num_range[0], num_range[1] + 1)


def _operator(rng: Random) -> str:
    return "+" if rng.random() < 0.5 else "-"


def count_trees(depth: int, num_range: tuple[int, int]) -> int:
    """How many trees are exactly that deep."""
    up_to = [num_range[1] - num_range[0] + 1]  # trees of depth 0, of depth 0 or 1, ...
    for _ in range(depth):
        up_to.append(up_to[0] + 2 * up_to[-1] ** 2)
    return up_to[depth] - (up_to[depth - 1] if depth else 0)


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


# --------------------------------------------------------------------------- corruptions

# A corruption edits the pieces of a canonical expression; one that finds nothing to edit
# leaves them as they are.
_PIECES = re.compile(r"-?[0-9]+| [+-] |[()]")
_STRAY = "abcxyz*/^%=.,_!?"

Pieces = list[str]


def invalid_expression(spec: SampleSpec, rng: Random) -> str:
    """A nested expression spoilt by one corruption, checked to be invalid."""
    depth = rng.randint(spec.min_depth, spec.max_depth)
    return corrupt(spell(exact_tree(depth, spec.num_range, rng)), rng)


def corrupt(expression: str, rng: Random) -> str:
    """Spoil a canonical expression that holds an operation, so that it does not parse."""
    while True:
        pieces = _PIECES.findall(expression)
        rng.choice(CORRUPTIONS)(pieces, rng)
        text = "".join(pieces).replace("( ", "(").replace(" )", ")").strip()
        if not _is_valid(text):
            return text


def _is_valid(text: str) -> bool:
    try:
        parse(text)
    except ExpressionError:
        return False
    return True


def _pick(pieces: Pieces, rng: Random, wanted: Callable[[str], bool]) -> int | None:
    places = [place for place, piece in enumerate(pieces) if wanted(piece)]
    return rng.choice(places) if places else None


def _is_number(piece: str) -> bool:
    return piece[-1].isdigit()


def _is_operator(piece: str) -> bool:
    return piece[0] == " "


def _is_operand_start(piece: str) -> bool:
    return piece == "(" or _is_number(piece)


def drop_number(pieces: Pieces, rng: Random) -> None:
    """``5 + 3`` -> ``5 +``"""
    pieces[_pick(pieces, rng, _is_number)] = ""


def drop_operator(pieces: Pieces, rng: Random) -> None:
    """``5 + 3`` -> ``5 3``"""
    pieces[_pick(pieces, rng, _is_operator)] = " "


def double_operator(pieces: Pieces, rng: Random) -> None:
    """``5 + 3`` -> ``5 ++ 3``"""
    place = _pick(pieces, rng, _is_operator)
    pieces[place] = f" {pieces[place].strip()}{rng.choice('+-')} "


def loose_sign(pieces: Pieces, rng: Random) -> None:
    """``(5 + 3)`` -> ``-(5 + 3)`` or ``(+5 + 3)``"""
    place = _pick(pieces, rng, _is_operand_start)
    pieces[place] = rng.choice("+-") + pieces[place]


def drop_parenthesis(pieces: Pieces, rng: Random) -> None:
    """``(5 + 3) - 1`` -> ``(5 + 3 - 1``"""
    place = _pick(pieces, rng, "()".__contains__)
    if place is not None:
        del pieces[place]


def extra_parenthesis(pieces: Pieces, rng: Random) -> None:
    """``5 + 3`` -> ``5 + 3)`` or ``5 + (3``"""
    place = _pick(pieces, rng, _is_number)
    pieces[place] = rng.choice(("({}", "{})")).format(pieces[place])


def empty_parentheses(pieces: Pieces, rng: Random) -> None:
    """``5 + 3`` -> ``5 + ()``"""
    pieces[_pick(pieces, rng, _is_number)] = "()"


def leading_zeros(pieces: Pieces, rng: Random) -> None:
    """``5 + 3`` -> ``5 + 003``"""
    place = _pick(pieces, rng, _is_number)
    zeros = "0" * rng.randint(1, 2)
    pieces[place] = re.sub("([0-9]+)", zeros + r"\1", pieces[place])


def stray_character(pieces: Pieces, rng: Random) -> None:
    """``5 + 3`` -> ``5 + 3x`` or ``5 * 3``"""
    stray = rng.choice(_STRAY)
    if rng.random() < 0.5:
        pieces[_pick(pieces, rng, _is_number)] += stray
    else:
        pieces[_pick(pieces, rng, _is_operator)] = f" {stray} "


CORRUPTIONS: tuple[Callable[[Pieces, Random], None], ...] = (
    drop_number,
    drop_operator,
    double_operator,
    loose_sign,
    drop_parenthesis,
    extra_parenthesis,
    empty_parentheses,
    leading_zeros,
    stray_character,
)
