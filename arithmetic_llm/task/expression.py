"""The language of the task: integers, ``+``, ``-`` and parentheses.

    expression := term (("+" | "-") term)*            left-associative
    term       := integer | "(" expression ")"
    integer    := "-"? ("0" | [1-9][0-9]*)            a sign touches its digits

Spaces and tabs may stand between tokens; every other character is an error. The parser is one
left-to-right pass without recursion, so no input is too deep or too long for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

REASONS = (
    "missing operand",
    "missing operator",
    "unbalanced parenthesis",
    "empty parentheses",
    "malformed number",
    "unexpected character",
)
MAX_DIGITS = 1000  # of a number, typed or reached on the way to the value
_TOO_LARGE = 10**MAX_DIGITS

# What may come next depends on what is expected: a sign is part of a number only in an operand.
_OPERAND = re.compile(r"[ \t]*(-?[0-9]+|.|\Z)", re.DOTALL)
_OPERATOR = re.compile(r"[ \t]*(.|\Z)", re.DOTALL)

Postfix = tuple[int | str, ...]
_State = Callable[[], "_State | None"]


class ExpressionError(ValueError):
    """Why a text is no expression.

    ``reason`` is one of `REASONS`, ``column`` the 0-based place to point at (``len(text)`` when
    something is missing at the end) and ``text`` the text itself.
    """

    def __init__(self, reason: str, column: int, text: str, detail: str = ""):
        super().__init__(f"{reason} at column {column}" + (f": {detail}" if detail else ""))
        self.reason = reason
        self.column = column
        self.text = text


@dataclass(frozen=True, slots=True)
class Expression:
    """A valid expression.

    ``canonical``  its text: single spaces around operators, no parentheses around a lone number,
                   every other pair as it was written
    ``postfix``    its tree, numbers as ``int`` and operators as ``str``: ``5 + (10 - 3)`` is
                   ``(5, 10, 3, "-", "+")``; equal for all spellings of one tree
    ``depth``      0 for a number, 1 + that of the deeper side for an operation
    ``value``      the exact result
    """

    canonical: str
    postfix: Postfix
    depth: int
    value: int

    @property
    def operations(self) -> int:
        """Number of reductions that lead to the value."""
        return len(self.postfix) // 2

    @property
    def terms(self) -> int:
        """Number of numbers in the expression."""
        return self.operations + 1

    @property
    def is_flat(self) -> bool:
        """Three numbers or more and no parentheses (two are simply an expression of depth 1)."""
        return self.terms > 2 and "(" not in self.canonical


def parse(text: str) -> Expression:
    """Read an expression.

    Raises:
        ExpressionError: at the first place, from the left, where the text leaves the grammar.
    """
    return _Parser(text).run()


def canonicalise(text: str) -> str:
    """The canonical spelling of an expression. Raises ExpressionError like `parse`."""
    return parse(text).canonical


def apply(left: int, operator: str, right: int) -> int:
    """The result of one operation."""
    return left + right if operator == "+" else left - right


def tree_depth(postfix: Iterable[int | str]) -> int:
    """0 for a number, 1 + that of the deeper side for an operation."""
    stack: list[int] = []
    for symbol in postfix:
        stack.append(0 if isinstance(symbol, int) else 1 + max(stack.pop(), stack.pop()))
    return stack.pop()


def count_numbers(canonical: str) -> int:
    """How many numbers a canonical expression has, each operator between two spaces."""
    return canonical.count(" ") // 2 + 1


def spell(
    postfix: Iterable[int | str],
    wrap_left: Callable[[str], str] = "({})".format,
    wrap_right: Callable[[str], str] = "({})".format,
) -> str:
    """Write a tree as text; the wraps put parentheses around an operation that is an operand.

    The defaults give the nested style, where every inner operation has exactly its own pair.
    """
    stack: list[str] = []
    for symbol in postfix:
        if isinstance(symbol, int):
            stack.append(str(symbol))
            continue
        right, left = stack.pop(), stack.pop()
        left = wrap_left(left) if " " in left else left
        right = wrap_right(right) if " " in right else right
        stack.append(f"{left} {symbol} {right}")
    return stack.pop()


class _Parser:
    """A shift-reduce parser whose two states, `operand` and `operator`, return the next state.

    Both operators bind alike and to the left, so an operation is folded as soon as its right
    operand is complete. That happens in post-order: the folds spell the tree in postfix.
    """

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.pieces: list[str] = []  # canonical text so far
        self.postfix: list[int | str] = []
        self.operands: list[tuple[int, int]] = []  # (value, depth) of what is not yet folded
        self.waiting: list[tuple[str, int]] = []  # operators and "(" with their columns

    def run(self) -> Expression:
        state: _State | None = self.operand
        while state:
            state = state()
        [(value, depth)] = self.operands
        return Expression("".join(self.pieces), tuple(self.postfix), depth, value)

    def operand(self) -> _State:
        """Read a number or an opening parenthesis."""
        token, column = self._next(_OPERAND)
        if "0" <= token[-1:] <= "9":
            self._number(token, column)
            return self.operator
        if token == "(":
            self.pieces.append(token)
            self.waiting.append((token, column))
            return self.operand
        raise self._no_operand(token, column)

    def operator(self) -> _State | None:
        """Read an operator, a closing parenthesis or the end."""
        token, column = self._next(_OPERATOR)
        if token in ("+", "-"):
            self.pieces.append(f" {token} ")
            self.waiting.append((token, column))
            return self.operand
        if token == ")" and self.waiting:
            self._close()
            return self.operator
        if token == "" and not self.waiting:
            return None
        raise self._no_operator(token, column)

    def _next(self, pattern: re.Pattern[str]) -> tuple[str, int]:
        match = pattern.match(self.text, self.position)
        self.position = match.end()
        return match[1], match.start(1)

    def _number(self, token: str, column: int) -> None:
        digits = token.lstrip("-")
        if len(digits) > MAX_DIGITS:
            raise self._error("malformed number", column, f"more than {MAX_DIGITS:,} digits")
        if digits[0] == "0" and digits != "0":
            raise self._error("malformed number", column, "leading zero")
        value = int(token)
        self.pieces.append(str(value))
        self.postfix.append(value)
        self.operands.append((value, 0))
        self._fold()

    def _close(self) -> None:
        self.waiting.pop()
        if self.pieces[-2] == "(":  # a lone number
            del self.pieces[-2]
        else:
            self.pieces.append(")")
        self._fold()

    def _fold(self) -> None:
        """Carry out the operation whose right operand has just been completed, if any."""
        if not self.waiting or self.waiting[-1][0] == "(":
            return
        operator, column = self.waiting.pop()
        right, right_depth = self.operands.pop()
        left, left_depth = self.operands.pop()
        value = apply(left, operator, right)
        if abs(value) >= _TOO_LARGE:
            detail = f"the result has more than {MAX_DIGITS:,} digits"
            raise self._error("malformed number", column, detail)
        self.postfix.append(operator)
        self.operands.append((value, 1 + max(left_depth, right_depth)))

    def _no_operand(self, token: str, column: int) -> ExpressionError:
        if token == ")" and not self.waiting:
            return self._error("unbalanced parenthesis", column, "nothing to close")
        if token == ")" and self.pieces[-1] == "(":
            return self._error("empty parentheses", self.waiting[-1][1])
        if token in ("", "+", "-", ")"):
            return self._error("missing operand", column)
        return self._error("unexpected character", column, repr(token))

    def _no_operator(self, token: str, column: int) -> ExpressionError:
        if token == ")":
            return self._error("unbalanced parenthesis", column, "nothing to close")
        if token == "":
            return self._error("unbalanced parenthesis", self.waiting[-1][1], "never closed")
        if token == "(" or "0" <= token <= "9":
            return self._error("missing operator", column)
        return self._error("unexpected character", column, repr(token))

    def _error(self, reason: str, column: int, detail: str = "") -> ExpressionError:
        return ExpressionError(reason, column, self.text, detail)
