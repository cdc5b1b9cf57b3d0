"""Random expressions: trees of exact depth, and the styles they are written in.

A tree is held in postfix (see `task.expression.Expression.postfix`). Every function draws from the
``random.Random`` it is given and from nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from random import Random

from arithmetic_llm.config import LEAF_PROBABILITY
from arithmetic_llm.task.expression import Postfix, apply, spell

MANY = 10**15


# ---------------------------------------------------------------------------------- trees


def exact_tree(
    depth: int, num_range: tuple[int, int], rng: Random, leaf_probability: float = LEAF_PROBABILITY
) -> Postfix:
    """A tree exactly that deep: one side of depth - 1, the other free, swapped at random.

    Args:
        leaf_probability: 1 for the fewest numbers that a tree so deep can have.
    """
    if depth == 0:
        return (_number(num_range, rng),)
    sides = [
        exact_tree(depth - 1, num_range, rng, leaf_probability),
        _free_tree(depth - 1, num_range, rng, leaf_probability),
    ]
    if rng.random() < 0.5:
        sides.reverse()
    return (*sides[0], *sides[1], _operator(rng))


def _free_tree(
    depth: int, num_range: tuple[int, int], rng: Random, leaf_probability: float
) -> Postfix:
    """A tree of at most that depth, which stops at a number with that probability."""
    if depth == 0 or rng.random() < leaf_probability:
        return (_number(num_range, rng),)
    left = _free_tree(depth - 1, num_range, rng, leaf_probability)
    right = _free_tree(depth - 1, num_range, rng, leaf_probability)
    return (*left, *right, _operator(rng))


def flat_sum(terms: int, num_range: tuple[int, int], rng: Random) -> Postfix:
    """The tree of ``a + b - c ...`` with that many numbers."""
    tree: list[int | str] = [_number(num_range, rng)]
    for _ in range(terms - 1):
        tree += (_number(num_range, rng), _operator(rng))
    return tuple(tree)


def chain(numbers: int, depth: int, num_range: tuple[int, int], rng: Random) -> Postfix:
    """The tree of ``a + (b - c) - ...``: at least so many numbers, at least one in parentheses.

    Args:
        depth: of the trees that are added and subtracted, at most; at least 1.
    """
    tree = [*exact_tree(rng.randint(0, depth), num_range, rng)]
    grouped = False
    while len(tree) // 2 + 1 < numbers or not grouped:
        added = exact_tree(rng.randint(0, depth), num_range, rng)
        grouped |= len(added) > 1
        tree += (*added, _operator(rng))
    return tuple(tree)


def widened(tree: Postfix, num_range: tuple[int, int], rng: Random) -> Postfix:
    """The same operations on other numbers, of all lengths that the range has.

    How long they are at most is decided for the tree as a whole; then a length is as likely as it
    is long. In 900 of 999 numbers drawn evenly there would be three digits. Where an operation ends
    with a number, as often the result is drawn so and the number follows from it: or numbers would
    seldom cancel, and results that are shorter than both operands are what is hardest to learn.
    """
    number = _of_all_lengths(num_range, rng)
    wide: list[int | str] = []
    values: list[int] = []  # of what waits for its operation
    for symbol, follower in zip(tree, (*tree[1:], 0), strict=True):
        if isinstance(symbol, str):
            right = values.pop()
            values[-1] = apply(values[-1], symbol, right)
        else:
            symbol = number()
            if isinstance(follower, str) and rng.random() < 0.5:
                needed = _operand(values[-1], follower, symbol)
                symbol = needed if num_range[0] <= needed <= num_range[1] else symbol
            values.append(symbol)
        wide.append(symbol)
    return tuple(wide)


def cancelling(num_range: tuple[int, int], rng: Random) -> Postfix:
    """One operation of two numbers that take away from each other, with a result of any length.

    What is hardest is to see, from the units on, where the result ends and which sign it has: if
    leading digits cancel or are about to, or zeros stand within. So many of its digits are zeros.
    """
    low, high = num_range
    longest = len(str(max(-low, high)))
    while True:
        digits = rng.randint(min(2, longest), longest)
        left, operator = _number_of(digits, num_range, rng), rng.choice("+-")
        result = _with_zeros(_number_of(rng.randint(1, digits), num_range, rng), rng)
        right = _operand(left, operator, result)
        if low <= right <= high and abs(result) < max(abs(left), abs(right)):
            return (left, right, operator)


def _with_zeros(number: int, rng: Random) -> int:
    """The number with a third of its digits, the first one aside, set to zero."""
    first, *others = str(abs(number))
    digits = [first, *(rng.choice((digit, digit, "0")) for digit in others)]
    return int("".join(digits)) * (1 if number >= 0 else -1)


def _operand(left: int, operator: str, result: int) -> int:
    """The second operand with which an operation has that result."""
    return result - left if operator == "+" else left - result


def _of_all_lengths(num_range: tuple[int, int], rng: Random) -> Callable[[], int]:
    """Draws numbers of lengths that the range has, up to one that is drawn first."""
    low, high = num_range
    shortest = len(str(max(low, -high, 0)))
    longest = len(str(max(-low, high)))
    lengths = range(shortest, rng.randint(min(max(shortest, 2), longest), longest) + 1)

    def number() -> int:
        (digits,) = rng.choices(lengths, lengths)
        return _number_of(digits, num_range, rng)

    return number


def _number_of(digits: int, num_range: tuple[int, int], rng: Random) -> int:
    """A number of the range with so many digits, of either sign if there are such."""
    least, most = 10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1
    low, high = num_range
    signs = ((max(low, least), min(high, most)), (max(low, -most), min(high, -least)))
    return rng.randint(*rng.choice([(start, end) for start, end in signs if start <= end]))


def _number(num_range: tuple[int, int], rng: Random) -> int:
    return rng.choice(range(num_range[0], num_range[1] + 1))  # randrange takes twice as long


def _operator(rng: Random) -> str:
    return "+" if rng.random() < 0.5 else "-"


def count_trees(depth: int, num_range: tuple[int, int]) -> int:
    """Count the trees that are exactly that deep; `MANY` if there are more."""
    numbers = num_range[1] - num_range[0] + 1
    shallower, up_to = 0, numbers  # trees of less than the depth, and of at most the depth
    for _ in range(depth):
        shallower, up_to = up_to, numbers + 2 * up_to**2
        if up_to > MANY:  # squared at every level: a number too long to work with before long
            return MANY
    return up_to - shallower


def count_flat_sums(terms: int, num_range: tuple[int, int]) -> int:
    """Count the flat sums of that many numbers."""
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
    if style == "chain":
        return _chained(tree)
    nested = spell(tree)
    return _padded(tree, nested, rng) if style == "padded" else nested


def _chained(tree: Postfix) -> str:
    """The outermost sum without parentheses, and what it adds or subtracts as nested text."""
    added = ""
    while len(tree) > 1:
        start = _right_operand(tree)
        right = spell(tree[start:-1])
        added = f" {tree[-1]} {f'({right})' if ' ' in right else right}{added}"
        tree = tree[:start]
    return f"{tree[0]}{added}"


def _right_operand(tree: Postfix) -> int:
    """Where the right operand of the last operation begins."""
    place, missing = len(tree) - 1, 1
    while missing:
        place -= 1
        missing += 1 if isinstance(tree[place], str) else -1
    return place


def _padded(tree: Postfix, nested: str, rng: Random) -> str:
    def pad(operation: str, needed: int = 1) -> str:
        pairs = needed + rng.randrange(3)
        return "(" * pairs + operation + ")" * pairs

    text = nested
    while text == nested:
        text = pad(spell(tree, pad, pad), needed=0)
    return text
