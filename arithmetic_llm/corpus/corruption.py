"""Ways to spoil an expression, so that a model learns to refuse what is none.

A corruption edits the pieces of a canonical expression in place; one that finds nothing to edit
leaves them as they are. Together they lead to every reason that the parser knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from arithmetic_llm.task.expression import ExpressionError, parse

_PIECES = re.compile(r"-?[0-9]+| [+-] |[()]")
_STRAY = "abcxyz*/^%=.,_!?"

Pieces = list[str]


def corrupt(expression: str, rng: Random) -> str:
    """Spoil a canonical expression that holds an operation, so that it does not parse."""
    while True:
        pieces = _PIECES.findall(expression)
        rng.choice(CORRUPTIONS)(pieces, rng)
        text = " ".join("".join(pieces).split()).replace("( ", "(").replace(" )", ")")
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


def signed_parenthesis(pieces: Pieces, rng: Random) -> None:
    """``4 + (5 + 3)`` -> ``4 + -(5 + 3)``, which looks most like something valid"""
    place = _pick(pieces, rng, "(".__eq__)
    if place is not None:
        pieces[place] = rng.choice("+-") + "("


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
    signed_parenthesis,
    drop_parenthesis,
    extra_parenthesis,
    empty_parentheses,
    leading_zeros,
    stray_character,
)
