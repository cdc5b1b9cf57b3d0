"""The step-by-step solution, its order and its text."""

import random
import re
import time

import pytest

from arithmetic_llm.config import SampleSpec
from arithmetic_llm.corpus.draw import draw
from arithmetic_llm.corpus.trees import write
from arithmetic_llm.task.expression import parse
from arithmetic_llm.task.solution import (
    continuation,
    next_step,
    reductions,
    solve,
    solve_canonical,
)
from arithmetic_llm.task.text import one_line, problem_text, read_answer


def test_the_documented_example():
    assert problem_text("5 + (10 - 3)") == "Evaluate: 5 + (10 - 3)"
    solution = solve("5+(10-3)")
    assert solution.text == (
        "<think>\nStep 1: 10 - 3 = 7\nExpression now: 5 + 7\n"
        "Step 2: 5 + 7 = 12\nExpression now: 12\n</think>\nFinal Result: 12"
    )
    assert one_line(solution.text) == (
        "<think> Step 1: 10 - 3 = 7 Expression now: 5 + 7 "
        "Step 2: 5 + 7 = 12 Expression now: 12 </think> Final Result: 12"
    )
    assert solution.answer == 12


@pytest.mark.parametrize(
    ("text", "expressions"),
    [
        # left operand, right operand, then the node
        ("(1 + 2) - (3 - 4)", ["3 - (3 - 4)", "3 - -1", "4"]),
        ("1 - 2 - 3", ["-1 - 3", "-4"]),
        ("1 + 2 - (3 - 4)", ["3 - (3 - 4)", "3 - -1", "4"]),
        ("1 - (2 - (3 - 4))", ["1 - (2 - -1)", "1 - 3", "-2"]),
        # parentheses of what is not touched stay, those around a finished number go
        ("((1 + 2)) - 3", ["3 - 3", "0"]),
        ("(((1 + 2) - ((3 + 4))))", ["((3 - ((3 + 4))))", "((3 - 7))", "-4"]),
        ("((1 - 2) + 3) - 4", ["(-1 + 3) - 4", "2 - 4", "-2"]),
        ("7", []),
    ],
)
def test_steps_are_in_post_order(text, expressions):
    assert [step.expression for step in solve(text).steps] == expressions


def test_steps_follow_the_postfix():
    """The operators of the steps are those of the tree, in the order in which postfix has them."""
    rng = random.Random(3)
    for style in ("nested", "typed", "padded", "flat"):
        for _ in range(300):
            text = write(draw(SampleSpec(num_range=(-9, 9)), style, rng), style, rng)
            operators = [symbol for symbol in parse(text).postfix if isinstance(symbol, str)]
            assert [step.operator for step in solve(text).steps] == operators
            assert solve(text) == solve_canonical(text)


def test_a_bare_number_has_no_steps():
    assert solve("(-7)").text == "<think>\n</think>\nFinal Result: -7"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("5 +", "missing operand"),
        ("6 18", "missing operator"),
        ("5 + 3abc", "unexpected character"),
    ],
)
def test_an_invalid_expression_is_refused_with_a_reason(text, reason):
    solution = solve(text)
    assert solution.text == f"<think>\nError: {reason}\n</think>\nFinal Result: ERROR"
    assert (solution.answer, solution.steps) == ("ERROR", ())


def test_thousands_of_terms_take_no_recursion_and_little_time():
    started = time.perf_counter()
    solution = solve(" - ".join(["1"] * 3000))
    assert solution.answer == -2998
    assert len(solution.steps) == 2999
    deep = solve("1 + (" * 2000 + "1" + ")" * 2000)
    assert (deep.answer, len(deep.steps)) == (2001, 2000)
    assert time.perf_counter() - started < 5


def test_reductions_are_made_one_at_a_time():
    steps = reductions(" + ".join(["1"] * 100_000))  # all of them would be 20 GB of text
    assert next(steps).operation == "1 + 1"
    assert next(steps).operation == "2 + 1"
    assert next_step("12") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n</think>\nFinal Result: 12", 12),
        ("Final Result: -3", -3),
        ("Final Result: ERROR", "ERROR"),
        ("Final Result:\n 0", 0),
        ("Final\nResult: 5 \n\t", 5),
        ("Final Result: ERROR and more", None),
        ("Final Result: 1 2", None),
        ("Final Result: 12 </think>", None),
        ("Final Result: 12 Final Result: 13", None),
        ("Final Result: 12 Final Result: 12", None),
        ("Final Result: 12Final Result: 12", None),
        ("Final\tResult: 12 Final Result: 12", None),
        ("Final Result: Final Result: 12", None),
        ("Final Result:12", None),
        ("Final Result: 12x", None),
        ("Final Result: 012", None),
        ("Final Result: +12", None),
        ("Final Result: \u0663", None),
        ("Final Result: " + "9" * 5000, None),
        ("Final Result:", None),
        ("", None),
    ],
)
def test_reading_the_answer(text, answer):
    assert read_answer(text) == answer


# ------------------------------------------------------------------------------ what comes next

PROBLEMS = ["5 + (10 - 3)", "((1 + 2)) - (3 - 14)", "1 - 2 - 3 - 4", "-7", "5 +", "6 18"]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_right_solution_goes_on_as_it_does_wherever_it_is_cut(problem):
    text = one_line(solve(problem).text).removeprefix("<think>") + "<eos>"
    for end in range(len(text) - len("<eos>")):
        following = continuation(problem, text[:end])
        assert following
        assert text[end:].startswith(following)


@pytest.mark.parametrize(
    ("written", "following"),
    [
        # by the result that the step states
        (" Step 1: 10 - 3 = 8", " Expression now: 5 + 8 Step 2: 5 + 8 = 13 Expression now: 13"),
        (" Step 1: 10 - 3 = 8 Expression now: 5 +", " 8 Step 2: 5 + 8 = 13 Expression now: 13"),
        # by the last expression that was stated, however it came about
        (" Step 1: 10 - 3 = 7 Expression now: 6 + 7 Step 2:", " 6 + 7 = 13 Expression now: 13"),
        (" Step 1: nonsense Expression now: 6 + 7 Step 2: 6", " + 7 = 13 Expression now: 13"),
        (" Step 1: 5 + 10 = 15 Expression now: 4 </think>", ""),
        # nothing that the solver would have written
        (" Step 2: 10", ""),
        (" Step 1: 5 + 10", ""),
        (" Step 1: 10 - 3 = 7 Expression now: 6 + 7", ""),
        (" Step 1: 10 - 3 = 7 Expression now: 5 + 7 </think>", ""),
        ("Final Result: 12", ""),
        (" Step ", "1: 10 - 3 = 7 Expression now: 5 + 7 Step 2: 5 + 7 = 12 Expression now: 12"),
        # numbers that Python does not read
        (f" Step 1: 10 - 3 = {'9' * 5000}", ""),
        (f" Step 1: 1 Expression now: 1 + {'9' * 5000} Step 2: ", ""),
    ],
)
def test_what_stands_there_decides_how_it_goes_on(written, following):
    found = continuation("5 + (10 - 3)", written)
    assert re.sub(" </think> Final Result: 1[23]<eos>$", "", found) == following
