"""The parser against Python's own grammar and arithmetic."""

import ast
import random
import re
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arithmetic_llm.config import SampleSpec
from arithmetic_llm.corpus.draw import draw
from arithmetic_llm.corpus.trees import write
from arithmetic_llm.task.expression import (
    MAX_DIGITS,
    REASONS,
    ExpressionError,
    canonicalise,
    parse,
    spell,
    tree_depth,
)
from arithmetic_llm.task.solution import solve
from arithmetic_llm.task.verifier import verify

# ------------------------------------------------------------------------------- the oracle


def python_value(text):
    """The value by Python's arithmetic if the text is in our grammar, decided by Python's parser.

    Python takes more as valid. Each difference is decided exactly, none by loosening:
    """
    if re.search(r"[^0-9+\-() \t]", text):
        return None  # underscores, 0x10, 1e5, 1.5, names, *, commas, comments, newlines, unicode
    text = text.strip(" \t")  # Python forbids indentation, we allow spaces at both ends
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:  # 007, 6 18, 5 +, unbalanced parentheses
        return None
    return _value(tree, text)


def _value(node, text):
    match node:
        case ast.Constant(value=int(number)):
            source = text[node.col_offset : node.end_col_offset]
            return None if source[0] == "0" and source != "0" else number  # 00 is 0 in Python
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as digits):
            touches = digits.col_offset == node.col_offset + 1  # neither - 3 nor -(3)
            value = _value(digits, text)
            return -value if touches and value is not None else None
        case ast.BinOp(op=ast.Add() | ast.Sub(), left=left, right=right):
            left, right = _value(left, text), _value(right, text)
            if left is None or right is None:
                return None
            return left + right if isinstance(node.op, ast.Add) else left - right
    return None  # +3, --3, the call 5(3), the empty tuple ()


def our_value(text):
    try:
        return parse(text).value
    except ExpressionError:
        return None


SOUP = [
    *("0", "1", "7", "12", "007", "00", "-3", "+", "-", "+", "-", "(", ")", "(", ")", " ", "\t"),
    *("_", "1_0", "0x1", "1e5", "1.5", "a", "*", ",", "#", "\n", "\x0c", "\xa0"),
    *("\u0663", "\u00b2", "\uff15", "\u2212"),  # other digits and another minus
]


def spoilt(text, rng):
    """The text with some of its characters replaced, dropped or joined by others."""
    characters = list(text)
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(characters) + 1)
        characters[place : place + rng.randrange(2)] = [rng.choice(["", *SOUP])]
    return "".join(characters)


def respaced(text, rng):
    """The same tokens as a hurried or a careless person spaces them; ``- 3`` stays two tokens."""
    if rng.random() < 0.5:
        return text.replace(" ", "")
    return re.sub(r" ?([()]) ?", rng.choice([r"\1", r" \1", r"\1 \t"]), text)


SHARDS, IN_A_SHARD = 8, 125_000  # a million in all; shards so that they can run side by side


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_million_texts_mean_what_they_mean_to_python(shard):
    rng = random.Random(shard)
    spec = SampleSpec(num_range=(-20, 20), max_depth=3, flat_terms=6)
    styles = ("nested", "typed", "padded", "flat", "drill")
    for number in range(IN_A_SHARD * 4 // 5):
        style = rng.choice(styles)
        text = respaced(write(draw(spec, style, rng), style, rng), rng)
        value = eval(text)  # every expression of ours means the same to Python
        assert our_value(text) == value, text
        if number % 20 == 0:
            check_solution(text, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # "int is not callable"
        for _ in range(IN_A_SHARD // 5):
            text = junk(spec, rng)
            assert our_value(text) == python_value(text), repr(text)


def junk(spec, rng):
    if rng.random() < 0.5:
        return "".join(rng.choices(SOUP, k=rng.randint(0, 8)))
    return spoilt(write(draw(spec, "typed", rng), "typed", rng), rng)


def check_solution(text, value):
    """Every "Expression now" is valid, canonical and equal; the verifier finds no fault."""
    solution = solve(text)
    assert solution.answer == value
    assert len(solution.steps) == parse(text).operations
    for step in solution.steps:
        assert eval(step.expression) == value
        assert eval(step.operation) == step.result
        assert canonicalise(step.expression) == step.expression
    verdict = verify(text, solution.text.removeprefix("<think>"))
    assert verdict.trace_correct
    assert verdict.correct
    assert verdict.predicted == value


# -------------------------------------------------------------------------------- validity


@pytest.mark.parametrize(
    ("text", "canonical", "value", "depth"),
    [
        ("7", "7", 7, 0),
        ("-7", "-7", -7, 0),
        ("14 - -2", "14 - -2", 16, 1),
        ("14--2", "14 - -2", 16, 1),
        ("(-3) + 5", "-3 + 5", 2, 1),
        ("5+(10-3)", "5 + (10 - 3)", 12, 2),
        (" ( ( 4 ) ) ", "4", 4, 0),
        ("((1 + 2)) - 3", "((1 + 2)) - 3", 0, 2),
        ("((1 + (2)))", "((1 + 2))", 3, 1),
        ("1 - 2 - 3", "1 - 2 - 3", -4, 2),
        ("1 - (2 - 3)", "1 - (2 - 3)", 2, 2),
        ("-0 + 5", "0 + 5", 5, 1),
        ("\t1\t+\t1\t", "1 + 1", 2, 1),
    ],
)
def test_valid(text, canonical, value, depth):
    expression = parse(text)
    assert (expression.canonical, expression.value, expression.depth) == (canonical, value, depth)
    assert tree_depth(expression.postfix) == depth


@pytest.mark.parametrize(
    ("text", "reason", "column"),
    [
        ("", "missing operand", 0),
        ("  ", "missing operand", 2),
        ("5 -- 3", "missing operand", 3),
        ("5 ++ 3", "missing operand", 3),
        ("5 - - 3", "missing operand", 4),
        ("+3", "missing operand", 0),
        ("- 3", "missing operand", 0),
        ("-(3)", "missing operand", 0),
        ("5 +", "missing operand", 3),
        ("5 + ", "missing operand", 4),
        ("(5 + )", "missing operand", 5),
        ("(", "missing operand", 1),
        ("6 18", "missing operator", 2),
        ("5 (3)", "missing operator", 2),
        ("(5) 3", "missing operator", 4),
        (")(", "unbalanced parenthesis", 0),
        ("(5 + 3", "unbalanced parenthesis", 0),
        ("1 + (2 - (3 + 4)", "unbalanced parenthesis", 4),
        ("5 + 3)", "unbalanced parenthesis", 5),
        ("()", "empty parentheses", 0),
        ("5 + ( )", "empty parentheses", 4),
        ("5()", "missing operator", 1),
        ("007", "malformed number", 0),
        ("5 + 00", "malformed number", 4),
        ("5 - -07", "malformed number", 4),
        ("5 + 3abc", "unexpected character", 5),
        ("5 * 3", "unexpected character", 2),
        ("x", "unexpected character", 0),
        ("1_000", "unexpected character", 1),
        ("5 +\n3", "unexpected character", 3),
        ("5 + 3\n", "unexpected character", 5),
        ("\u0663 + 1", "unexpected character", 0),
        ("1 + \uff15", "unexpected character", 4),
        ("5 \u2212 3", "unexpected character", 2),
        ("9" * 1001, "malformed number", 0),
        ("1 + -" + "9" * 5000, "malformed number", 4),
        ("9" * 1000 + " + 1", "malformed number", 1001),
    ],
)
def test_invalid(text, reason, column):
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    error = caught.value
    assert (error.reason, error.column, error.text) == (reason, column, text)
    assert str(error).startswith(f"{reason} at column {column}")


def test_every_reason_occurs_above():
    table = next(mark for mark in test_invalid.pytestmark if mark.name == "parametrize").args[1]
    assert {reason for _, reason, _ in table} == set(REASONS)


@settings(max_examples=1000, deadline=None)
@given(st.one_of(st.text(), st.text("0123456789+-() \t"), st.text("017+-() _.\n\ud800")))
@example("\x00")
def test_any_text_gets_an_expression_or_a_clear_error(text):
    outcome = parsed(text)
    if isinstance(outcome, ExpressionError):
        assert outcome.reason in REASONS
        assert 0 <= outcome.column <= len(text)
        assert len(str(outcome).splitlines()) == 1
    else:
        assert canonicalise(outcome.canonical) == outcome.canonical


def parsed(text):
    try:
        return parse(text)
    except ExpressionError as error:
        return error


# ------------------------------------------------------------------------------ no limits


def test_a_hundred_thousand_parentheses():
    deep = "(" * 100_000 + "1 + 1" + ")" * 100_000
    assert parse(deep).canonical == deep
    assert parse("(" * 100_000 + "1" + ")" * 100_000).canonical == "1"
    with pytest.raises(ExpressionError, match="unbalanced parenthesis at column 99999"):
        parse("(" * 100_000 + "1")


def test_a_hundred_thousand_terms_on_either_side():
    flat = parse(" + ".join(["1"] * 100_000))
    assert (flat.value, flat.depth, flat.terms) == (100_000, 99_999, 100_000)
    right = parse("1 - (" * 99_999 + "1" + ")" * 99_999)
    assert (right.value, right.depth, right.terms) == (0, 99_999, 100_000)


def test_the_longest_numbers():
    largest = "9" * MAX_DIGITS
    assert parse(f"{largest} - {largest}").value == 0
    assert parse(f"-{largest}").value == -int(largest)


# --------------------------------------------------------------------------------- spelling


def test_all_spellings_of_a_tree_have_one_postfix():
    tree = (1, 2, "+", 3, 4, "-", "-")
    spellings = ["(1 + 2) - (3 - 4)", "1+2-(3-4)", "((1 + (2)) - ((3 - 4)))"]
    assert [parse(text).postfix for text in spellings] == [tree] * 3
    assert spell(tree) == "(1 + 2) - (3 - 4)"
    assert spell(tree, wrap_left=str) == "1 + 2 - (3 - 4)"


def test_flat():
    assert parse("1 + 2 - 3").is_flat
    assert not parse("1 + 2").is_flat
    assert not parse("(1 + 2) - 3").is_flat
    assert parse("1 + (2) - 3").is_flat
