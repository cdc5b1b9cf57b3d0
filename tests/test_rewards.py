"""Rewards: what they pay for, what they do not, and how they add up."""

import pytest
from oracle import right_answer, with_result

from arithmetic_llm.grpo.rewards import REWARDS, Attempt, parse_rewards, reward, score
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.verifier import verify

PROBLEM = "(5 + 3) - (2 + 9)"
STEPS = [
    "Step 1: 5 + 3 = 8 Expression now: 8 - (2 + 9)",
    "Step 2: 2 + 9 = 11 Expression now: 8 - 11",
    "Step 3: 8 - 11 = -3 Expression now: -3",
]
RIGHT = f"{' '.join(STEPS)} </think> Final Result: -3"


def attempt(text, problem=PROBLEM, tokens=50, cut_off=False):
    return Attempt(verify(problem, text, cut_off), tokens, 100, cut_off)


def pays(name, *args, **options):
    return REWARDS[name](attempt(*args, **options))


def test_the_example_is_what_a_right_solution_looks_like():
    assert right_answer(PROBLEM).split() == RIGHT.split()


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        (RIGHT, 1),
        ("Final Result: -3", 1),  # whatever led to it
        (with_result(PROBLEM, -4), 0),
        (with_result(PROBLEM, "ERROR"), 0),
        (" ".join(STEPS), 0),
        (f"{RIGHT} 4", 0),
        (f"{RIGHT} and so on", 0),
        (f"{RIGHT} Final Result: -3", 0),
        (f"Evaluate: {PROBLEM} <think> {RIGHT}", 0),
        ("", 0),
    ],
)
def test_correct_pays_for_the_final_result(text, worth):
    assert pays("correct", text) == worth


def test_on_an_invalid_expression_only_error_is_correct():
    assert pays("correct", right_answer("5 +"), "5 +") == 1
    assert pays("correct", "Final Result: 5", "5 +") == 0


def test_the_first_digit_of_a_number_that_was_cut_off_earns_nothing():
    weights = {"correct": 1.0, "format": 1.0}
    for problem in ("3 - 2", "7 + 5"):  # 1 is right; 1 is the beginning of 12
        cut_off = attempt(with_result(problem, 1), problem, cut_off=True)
        assert score(cut_off, weights) == (0.0, {"correct": 0.0, "format": 0.0})
    assert score(attempt(with_result("3 - 2", 1), "3 - 2"), weights)[0] == 2.0


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        (RIGHT, 1),
        (STEPS[0], 1 / 3),
        (" ".join(STEPS[:2]), 2 / 3),
        (RIGHT.replace("= 11", "= 12"), 1 / 3),
        (RIGHT.replace("= 8 ", "= 9 "), 0),  # the steps after it are right, and pay nothing
        (RIGHT.replace("8 - (2 + 9)", "8 - (2 + 8)"), 0),
        ("Final Result: -3", 0),
        ("", 0),
    ],
)
def test_step_validity_pays_the_verified_prefix_of_the_needed_steps(text, worth):
    assert pays("step_validity", text) == pytest.approx(worth)


@pytest.mark.parametrize(
    ("honest", "repeated"),  # the step repeated is never the next right one
    [(honest, repeated) for honest in (1, 2, 3) for repeated in (0, 1, 2) if honest != repeated],
)
@pytest.mark.parametrize("times", [1, 2, 40])
def test_padding_with_steps_is_not_rewarded(honest, repeated, times):
    """Steps beyond the right ones pay nothing, were they ever so right in another place."""
    numbers = range(honest + 1, honest + 1 + times)
    padding = [STEPS[repeated].replace(f"Step {repeated + 1}", f"Step {n}") for n in numbers]
    text = " ".join([*STEPS[:honest], *padding])
    assert pays("step_validity", text) == pytest.approx(honest / 3)


def test_padding_between_right_steps_ends_the_pay():
    padded = [STEPS[0], "Step 2: 5 + 3 = 8 Expression now: 8 - (2 + 9)"]
    later = [step.replace("Step 2", "Step 3").replace("Step 3: 8", "Step 4: 8") for step in STEPS]
    assert pays("step_validity", " ".join([*padded, *later[1:]])) == pytest.approx(1 / 3)


def test_without_needed_steps_validity_is_all_or_nothing():
    assert pays("step_validity", right_answer("5 +"), "5 +") == 1
    assert pays("step_validity", "</think> Final Result: ERROR", "5 +") == 0
    assert pays("step_validity", right_answer("7"), "7") == 1
    assert pays("step_validity", RIGHT, "7") == 0


def test_format_pays_for_an_answer_that_can_be_read():
    assert pays("format", RIGHT) == 1
    assert pays("format", with_result(PROBLEM, 12345)) == 1  # right or not
    assert pays("format", "Final Result: dunno") == 0
    assert pays("format", " ".join(STEPS)) == 0
    assert pays("format", f"{RIGHT} 4") == 0
    assert pays("format", RIGHT, cut_off=True) == 0


def test_length_costs_by_the_token():
    assert pays("length", RIGHT, tokens=25) == -0.25
    assert pays("length", RIGHT, tokens=100) == -1


# ------------------------------------------------------------------------------- adding up


def test_a_reward_is_the_weighted_sum_and_each_is_told_apart():
    weights = {"correct": 1.0, "step_validity": 0.5, "length": 0.1}
    total, parts = score(attempt(STEPS[0], tokens=20), weights)
    assert parts == {"correct": 0, "step_validity": pytest.approx(1 / 3), "length": -0.2}
    assert total == pytest.approx(0.5 / 3 - 0.02)


def test_weights_are_read_from_text():
    assert parse_rewards("correct") == {"correct": 1}
    assert parse_rewards(" correct=1, format=0.25 ,length=-2e-3") == {
        "correct": 1,
        "format": 0.25,
        "length": -0.002,
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("corect=1", "no reward 'corect'; there are correct, step_validity, format, length"),
        ("correct=much", "'much' is no weight for correct"),
        ("correct=nan", "'nan' is no weight"),
        ("correct=inf", "'inf' is no weight"),
        ("correct=1,correct=0.2", "'correct' stands there twice"),
        ("", "is empty; choose from correct"),
        (" , ", "is empty"),
    ],
)
def test_a_bad_sum_is_refused(spec, message):
    with pytest.raises(UserError) as caught:
        parse_rewards(spec)
    assert message in str(caught.value)


def test_a_new_reward_is_a_function_that_is_registered(monkeypatch):
    monkeypatch.setattr("arithmetic_llm.grpo.rewards.REWARDS", dict(REWARDS))

    @reward("short")
    def short(attempt):
        return float(attempt.tokens < 30)

    weights = parse_rewards("correct,short=2")
    assert score(attempt(RIGHT, tokens=29), weights) == (3, {"correct": 1, "short": 1})
    assert "short" not in REWARDS
