"""The verifier: every kind of verdict by hand, and that no mistake escapes it."""

import random
import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import right_answer

from arithmetic_llm.config import STYLES, SampleSpec
from arithmetic_llm.corpus.draw import draw
from arithmetic_llm.corpus.trees import write
from arithmetic_llm.task.expression import canonicalise
from arithmetic_llm.task.solution import solve
from arithmetic_llm.task.text import SPECIAL_TOKENS, one_line
from arithmetic_llm.task.verifier import ErrorKind, check_step, verify

PROBLEM = "(8 - 5) + (4 - 6)"
RIGHT = """
Step 1: 8 - 5 = 3
Expression now: 3 + (4 - 6)
Step 2: 4 - 6 = -2
Expression now: 3 + -2
Step 3: 3 + -2 = 1
Expression now: 1
</think>
Final Result: 1"""


def errors(verdict):
    return [step.error for step in verdict.steps]


# -------------------------------------------------------------------------------- right


@pytest.mark.parametrize(
    "text",
    [
        RIGHT,
        one_line(RIGHT),
        right_answer(PROBLEM),
        RIGHT.replace("now: 1", "now: (1)").replace("\n", "\t\n "),
    ],
)
def test_a_right_solution_in_any_layout(text):
    verdict = verify(PROBLEM, text)
    assert verdict.correct
    assert verdict.parseable
    assert verdict.trace_correct
    assert (verdict.predicted, verdict.answer) == (1, 1)
    assert (verdict.valid_steps, verdict.needed_steps) == (3, 3)
    assert (verdict.first_error, verdict.error, verdict.trace_error) == (None, None, None)
    assert errors(verdict) == [None] * 3
    assert verdict.steps[0].text == "Step 1: 8 - 5 = 3 Expression now: 3 + (4 - 6)"


def test_bare_numbers_and_refusals():
    assert verify("7", "</think> Final Result: 7").trace_correct
    refusal = verify("5 +", "Error: missing operand </think> Final Result: ERROR")
    assert refusal.trace_correct
    assert (refusal.predicted, refusal.answer) == ("ERROR", "ERROR")
    assert (refusal.steps, refusal.needed_steps) == ((), 0)


# --------------------------------------------------------------------------------- wrong


@pytest.mark.parametrize(
    ("old", "new", "kind", "first_error"),
    [
        # step 1: which operation, its result, the rewriting, the form
        ("8 - 5 = 3", "4 - 6 = -2", "wrong_reduction", 0),
        ("8 - 5 = 3", "8 + 5 = 13", "wrong_reduction", 0),
        ("8 - 5 = 3", "8 - 6 = 2", "wrong_reduction", 0),
        ("8 - 5 = 3", "8 - 5 = 4", "arithmetic", 0),
        ("8 - 5 = 3", "8 - 5 = 03", "arithmetic", 0),
        ("now: 3 + (4 - 6)", "now: 3 + (4 - 7)", "wrong_copy", 0),
        ("now: 3 + (4 - 6)", "now: 3 + 4 - 6", "wrong_copy", 0),
        ("now: 3 + (4 - 6)", "now: 3 + ((4 - 6))", "wrong_copy", 0),
        ("now: 3 + (4 - 6)", "now: 3 + (4 - 6", "wrong_copy", 0),
        ("now: 3 + (4 - 6)", "now:", "wrong_copy", 0),
        ("Step 1:", "Step 2:", "unparseable", 0),
        ("Step 1:", "Stop 1:", "unparseable", 0),
        ("8 - 5 = 3", "8 - 5 is 3", "unparseable", 0),
        ("8 - 5 = 3", "8 - 5 =", "unparseable", 0),
        ("Expression now: 3 + (4 - 6)", "", "unparseable", 0),
        ("\nStep 1", "well, \nStep 1", "unparseable", 0),
        ("\nStep 1", "Error: missing operand\nStep 1", "wrong_reduction", 0),
        # later
        ("4 - 6 = -2", "4 - 6 = 2", "arithmetic", 1),
        ("now: 1", "now: -1", "wrong_copy", 2),
        ("now: 1", "now: 1\nStep 4: 1 + 0 = 1\nExpression now: 1", "wrong_reduction", 3),
        # the end
        ("Step 3: 3 + -2 = 1\nExpression now: 1\n", "", "wrong_reduction", 2),
        ("</think>\n", "", "wrong_copy", 2),  # the result has become part of the last expression
        ("Result: 1", "Result: 2", "wrong_copy", 3),
        ("Result: 1", "Result: ERROR", "wrong_copy", 3),
        ("Result: 1", "Result: one", "unparseable", 3),
        ("Result: 1", "Result: 1 Final Result: 1", "unparseable", 3),
        ("Result: 1", "Result: 1 and so on", "unparseable", 3),
        ("Result: 1", "Result: 1 2", "unparseable", 3),
        ("Result: 1", "Result: 1 </think>", "unparseable", 3),
        ("</think>", "</think> </think>", "unparseable", 3),
        # marks that belong to no solution, wherever they stand
        ("\nStep 1", f"Evaluate: {PROBLEM} <think>\nStep 1", "unparseable", 0),
        ("\nStep 1", f"Evaluate: {PROBLEM}\nStep 1", "unparseable", 0),
        ("\nStep 1", "<think>\nStep 1", "unparseable", 0),
        ("\nStep 1", "Error: <pad>\nStep 1", "unparseable", 0),
        ("8 - 5", "8 - <pad>5", "unparseable", 0),
        ("now: 3 + (4 - 6)", "now: 3 + (4<unk> - 6)", "unparseable", 0),
        ("now: 3 + -2", "now: 3 + -2 <bos>", "unparseable", 1),
        ("Result: 1", "Result: <pad>1", "unparseable", 3),
        ("Result: 1", "Result: 1<eos>", "unparseable", 3),
        ("Final Result: 1", "", "unparseable", 3),
    ],
)
def test_the_first_wrong_thing_is_named(old, new, kind, first_error):
    assert RIGHT.count(old) == 1
    text = RIGHT.replace(old, new)
    verdict = verify(PROBLEM, text)
    assert verdict.trace_error == kind
    assert verdict.first_error == first_error
    assert verdict.valid_steps == min(first_error, len(verdict.steps))
    assert not verdict.trace_correct
    assert verdict.error == (None if verdict.correct else kind)
    if kind == "unparseable" and first_error == 3:
        assert not verdict.parseable


@pytest.mark.parametrize("mark", ["<pad>", "<unk>", "<bos>", "<eos>", "<think>", "Evaluate:"])
@pytest.mark.parametrize("place", ["\nStep 1", "Step 2", "5 = 3", "now: 1", "</think>", "Final"])
def test_a_text_with_a_mark_of_no_solution_has_no_result(mark, place):
    assert RIGHT.count(place) == 1
    verdict = verify(PROBLEM, RIGHT.replace(place, f"{mark} {place}"))
    assert (verdict.predicted, verdict.error) == (None, "unparseable")


def test_a_right_result_by_a_wrong_way_is_right():
    verdict = verify(PROBLEM, RIGHT.replace("8 - 5 = 3", "8 - 5 = 4"))
    assert verdict.correct
    assert verdict.error is None
    assert verdict.trace_error == "arithmetic"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Step 1: 5 + 0 = 5 Expression now: 5 </think> Final Result: 5", "wrong_reduction"),
        ("Error: missing operator </think> Final Result: ERROR", "wrong_reduction"),
        ("</think> Final Result: ERROR", "wrong_reduction"),
        ("Oh </think> Final Result: ERROR", "unparseable"),
        ("Error: missing operand </think> Final Result: 5", "wrong_copy"),
        ("Error: missing operand", "unparseable"),
    ],
)
def test_wrong_words_on_an_invalid_expression(text, kind):
    verdict = verify("5 +", text)
    assert verdict.trace_error == kind
    assert verdict.correct == text.endswith("ERROR")


def test_a_valid_expression_refused():
    verdict = verify(PROBLEM, "Error: missing operand </think> Final Result: ERROR")
    assert (verdict.error, verdict.first_error, verdict.predicted) == (
        "wrong_reduction",
        0,
        "ERROR",
    )


# ------------------------------------------------------------------- judged on their merit


def test_steps_after_an_error_are_judged_against_what_the_model_wrote():
    verdict = verify(
        PROBLEM,
        "Step 1: 8 - 5 = 4 Expression now: 4 + (4 - 6) "
        "Step 2: 4 - 6 = -2 Expression now: 4 + -2 "
        "Step 3: 4 + -2 = 3 Expression now: 2 "
        "</think> Final Result: 2",
    )
    assert errors(verdict) == ["arithmetic", None, "arithmetic"]
    assert (verdict.valid_steps, verdict.needed_steps) == (0, 3)
    assert (verdict.error, verdict.predicted, verdict.answer) == ("arithmetic", 2, 1)


def test_an_unreadable_expression_is_replaced_by_what_it_should_have_been():
    verdict = verify(PROBLEM, RIGHT.replace("3 + (4 - 6)", "3 + (4 - "))
    assert errors(verdict) == ["wrong_copy", None, None]


def test_check_step_alone():
    right = check_step("1 + (2 - 3)", "Step 9: 2 - 3 = -1", "Expression now: 1 + -1")
    assert right.ok
    assert right.expression == "1 + -1"
    assert check_step("1 + 1", "Step 2: 1 + 1 = 2", "Expression now: 2", number=2).ok
    assert check_step("1 + 1", "Step 2: 1 + 1 = 2", "Expression now: 2", 1).error == "unparseable"
    assert check_step("2", "Step 1: 2 + 0 = 2", "Expression now: 2").error == "wrong_reduction"
    nothing = check_step(None, "Step 1: 2 + 0 = 2", "Expression now: 2")
    assert (nothing.error, nothing.expression) == ("wrong_reduction", "2")
    assert check_step("1 + 1", "", "").error == "unparseable"


# ------------------------------------------------------------------------------ cut off


def test_a_right_text_cut_off_anywhere_is_cut_off():
    for problem in (PROBLEM, "5 +", "7", "12 + 30"):
        whole = right_answer(problem)
        for end in range(len(whole) + 1):  # at the end only the <eos> is missing
            verdict = verify(problem, whole[:end], cut_off=True)
            assert verdict.trace_error == verdict.error == "cut_off", whole[:end]
            assert verdict.predicted is None


def test_half_a_number_before_the_limit_is_cut_off_not_wrong():
    verdict = verify(
        "7 + 5", "Step 1: 7 + 5 = 12 Expression now: 12 </think> Final Result: 1", True
    )
    assert (verdict.error, verdict.predicted) == ("cut_off", None)


def test_a_mistake_before_the_limit_is_a_mistake():
    wrong = RIGHT.replace("8 - 5 = 3", "8 - 5 = 4").partition("Step 3")[0]
    verdict = verify(PROBLEM, wrong, cut_off=True)
    assert verdict.error == "arithmetic"
    assert errors(verdict)[0] == "arithmetic"
    assert verify(PROBLEM, "banana " * 100, cut_off=True).error == "unparseable"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"{RIGHT} 2", "unparseable"),
        (RIGHT.replace("Result: 1", "Result: 2"), "wrong_copy"),
        (RIGHT.replace("Result: 1", "Result: 12"), "wrong_copy"),
        (RIGHT.partition("Step 3")[0] + "</think>", "wrong_reduction"),
        (RIGHT.partition("Step 3")[0] + "Step 2", "wrong_copy"),  # becomes part of what it follows
        (RIGHT.partition("Step 3")[0] + "Stp", "wrong_copy"),
        (RIGHT.partition("\nStep 3")[0] + "S", "wrong_copy"),
        (RIGHT.partition("</think>")[0] + "<th", "wrong_copy"),
        (RIGHT.partition("</think>")[0] + "<think>", "unparseable"),
    ],
)
def test_an_end_that_could_not_have_become_right_is_wrong(text, kind):
    verdict = verify(PROBLEM, text, cut_off=True)
    assert (verdict.error, verdict.predicted) == (kind, None)


def test_the_end_of_the_text_without_a_limit_is_unparseable():
    assert verify(PROBLEM, RIGHT.partition("Step 3")[0]).error == "unparseable"
    assert verify(PROBLEM, "").error == "unparseable"


# ------------------------------------------------------------------------------ properties


def same_but_for_layout(text):
    """What the verifier takes for the same: white space, and parentheses around lone numbers."""
    text = " ".join(text.split())
    return re.sub(
        r"Expression now:(.*?) ?(?=Step|</think>)",
        lambda match: f"Expression now: {canonicalise(match[1])} ",
        text,
    )


@pytest.mark.parametrize("style", STYLES)
def test_no_mistake_in_one_character_escapes(style):
    rng = random.Random(11)
    spec = SampleSpec(num_range=(-12, 12), max_depth=3, flat_terms=6)
    noticed = 0
    for _ in range(1500):
        problem = draw(spec, style, rng)
        expression = problem if style == "invalid" else write(problem, style, rng)
        right = right_answer(expression)
        place, length = rng.randrange(len(right)), rng.randrange(2)
        wrong = right[:place] + rng.choice("0123456789+-() =:SE/x") + right[place + length :]
        verdict = verify(expression, wrong)
        if verdict.trace_correct:
            assert same_but_for_layout(wrong) == same_but_for_layout(right)
        noticed += not verdict.trace_correct
    assert noticed > 1200


@pytest.mark.parametrize("seed", range(3))
def test_lines_dropped_doubled_and_swapped_are_noticed(seed):
    rng = random.Random(seed)
    for _ in range(300):
        expression = write(draw(SampleSpec(min_depth=2), "nested", rng), "nested", rng)
        lines = solve(expression).text.split("\n")[1:]
        first, second = sorted(rng.sample(range(len(lines)), 2))
        changes = [
            lines[:first] + lines[first + 1 :],
            lines[: first + 1] + lines[first:],
            [*lines[:first], lines[second], *lines[first + 1 : second], lines[first]],
        ]
        for changed in changes[: 2 + (second == len(lines) - 1)]:
            assert not verify(expression, "\n".join(changed)).trace_correct


WORDS = [*RIGHT.split(), *SPECIAL_TOKENS, "Error:", "missing operand", "Evaluate:", "Step", "7:"]
ENDINGS = ["", "</think> Final\nResult: 7", "</think> Final Result: ERROR", "Final Result: 1"]


@settings(max_examples=1000, deadline=None)
@given(
    st.one_of(st.text(), st.sampled_from([PROBLEM, "5 +", "7"])),
    st.one_of(st.text(), st.lists(st.sampled_from(WORDS)).map(" ".join)),
    st.sampled_from(ENDINGS),
    st.booleans(),
)
def test_every_text_gets_a_consistent_verdict(expression, text, ending, cut_off):
    verdict = verify(expression, f"{text} {ending}", cut_off)
    kinds = {None, *get_args(ErrorKind)}
    assert {verdict.trace_error, verdict.error, *errors(verdict)} <= kinds
    assert (verdict.error is None) == verdict.correct
    assert verdict.trace_correct <= verdict.correct <= verdict.parseable
    assert verdict.parseable <= (not cut_off)
    assert verdict.trace_correct == (verdict.first_error is None)
    assert 0 <= verdict.valid_steps <= len(verdict.steps)
    if verdict.trace_correct:
        assert len(verdict.steps) == verdict.valid_steps == verdict.needed_steps


def test_very_long_texts_are_judged():
    assert verify("1 + 1", "Step 1: " * 100_000).error == "unparseable"
    assert verify("1 + 1", "Step 1: 1 + 1 = " + "9" * 100_000).error == "arithmetic"
    assert not verify("(" * 100_000 + "1" + ")" * 100_000, "((" * 100_000).correct
