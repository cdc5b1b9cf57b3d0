"""Arms that differ and arms that do not, made by hand; and their tables and pictures."""

import csv
import io
import random
from dataclasses import replace

import pytest

from arithmetic_llm.study.figures import (
    depth_grid,
    draw_grid,
    draw_results,
    numeric_axis,
    percent_text,
    series_of,
)
from arithmetic_llm.study.spec import MEASURES, Arm, Criterion, Study
from arithmetic_llm.study.statistics import pooled_spread
from arithmetic_llm.study.table import (
    Evaluated,
    Reached,
    Results,
    by_problems,
    differences,
    is_right,
    row_of,
    spread_of,
)
from arithmetic_llm.study.write import csv_text, page

ALL = Criterion("all", "exact match")


class FakeStage:
    """A stage that is known by a text."""

    inputs: dict = {}  # noqa: RUF012

    def __init__(self, text):
        self.hash = text

    @property
    def folder(self):
        return self

    name = "evaluation_0"


def reached(name, *solved, problems="test", place=None, depths=(1,), stages=""):
    """An arm and what its models solve: a string of 0 and 1 for each seed."""
    runs = []
    for seed, text in enumerate(solved):
        run = Evaluated(seed, FakeStage(f"{stages or name} {seed}"))
        run.__dict__["entries"] = [
            entry(f"{problems} {i}", letter == "1", depths[i % len(depths)])
            for i, letter in enumerate(text)
        ]
        runs.append(run)
    return Reached(Arm(name, {}, place or {}), runs)


def entry(expression, correct, depth=1, **more):
    error = None if correct else "arithmetic"
    found = {"expression": expression, "correct": correct, "depth": depth, "terms": None}
    of_text = {"predicted": 1 if correct else 2, "error": error, "trace_error": error}
    return {**found, "ground_truth": 1, **of_text, **more}


def ones(count, of=100):
    return "1" * count + "0" * (of - count)


def verdict(arm, other):
    (found,) = differences([other, arm], other, ALL)
    return found


def test_arms_that_differ_with_every_seed_are_told_apart():
    found = verdict(
        reached("new", ones(90), ones(91), ones(89)),
        reached("old", ones(70), ones(72), ones(68)),
    )
    assert found.verdict == "better"
    assert found.mean == pytest.approx(0.2)
    assert found.low > 0
    assert (found.better, found.worse, found.models) == (23, 0, (3, 3))


def test_seeds_that_disagree_are_not_told_apart_though_the_problems_are():
    """One seed is 30 points better, one no better, one worse; the problems would be enough."""
    found = verdict(
        reached("new", ones(90), ones(60), ones(55)),
        reached("old", ones(60), ones(60), ones(60)),
    )
    assert (found.better, found.worse) == (30, 5)
    assert found.verdict == "cannot be told apart"
    assert found.low < 0 < found.high


def test_seeds_that_agree_on_a_few_problems_are_not_told_apart():
    """Every seed solves the same two problems more: the same seeds on other problems might not."""
    found = verdict(
        reached("new", *[ones(52)] * 2 + [ones(53)]),
        reached("old", *[ones(50)] * 2 + [ones(51)]),
    )
    assert found.verdict == "cannot be told apart"
    assert found.low < 0 < found.high


def test_one_seed_goes_by_its_problems():
    found = verdict(reached("new", ones(60)), reached("old", ones(50)))
    assert (found.better, found.worse, found.models) == (10, 0, (1, 1))
    assert found.p == pytest.approx(2 / 2**10)
    assert found.verdict == "better"
    again = verdict(reached("new", "01" * 50), reached("old", "10" * 50))
    assert (again.better, again.worse) == (50, 50)
    assert again.verdict == "cannot be told apart"


def test_arms_of_other_problems_are_compared_without_pairs():
    new, old = reached("new", ones(80), problems="a"), reached("old", "10" * 50)
    found = verdict(new, old)
    assert (found.better, found.worse) == (None, None)
    assert found.verdict == "better"
    assert 0.15 < found.low < 0.3 < found.high < 0.45


def test_the_same_runs_are_called_that_and_take_no_part_in_the_correction():
    old = reached("old", ones(50))
    same, new = reached("same", ones(50), stages="old"), reached("new", ones(57))
    found = differences([old, same, new], old, ALL)
    assert [each.verdict for each in found] == ["the same runs", "better"]
    assert found[1].adjusted == found[1].p


def test_several_arms_are_held_to_more():
    """p = 0.016 is enough for one arm, and not for the luckiest of five."""
    old, new = reached("old", ones(50)), reached("new", ones(57))
    others = [reached(f"other {i}", "0" * i + "1" * 50 + "0" * (50 - i)) for i in range(1, 5)]
    assert verdict(new, old).verdict == "better"
    assert differences([old, new, *others], old, ALL)[0].verdict == "cannot be told apart"


def test_a_model_that_several_seeds_share_is_one():
    """Its interval is that of its problems; no seed would have made it another one."""
    start = reached("start", ones(50))
    start.runs.append(Evaluated(1, start.runs[0].stage))
    start.runs[1].__dict__["entries"] = start.runs[0].entries
    new = reached("new", ones(90), ones(80))
    spread = spread_of([start, new], ALL, start)
    assert len(start.models) == 1
    assert start.interval(ALL, spread) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert (spread.freedom, spread.error(2)) == (1, pytest.approx(0.05))
    assert verdict(new, start).models == (2, 1)


def test_seeds_widen_the_interval_of_the_problems_and_never_narrow_it():
    apart, agreed = reached("a", ones(40), ones(60)), reached("b", ones(50), ones(50))
    assert apart.interval(ALL, spread_of([apart], ALL, apart)) == (0.0, 1.0)
    alone = pytest.approx((0.404, 0.596), abs=1e-3)
    assert agreed.interval(ALL, spread_of([agreed], ALL, agreed)) == alone
    both = spread_of([apart, agreed], ALL, apart)
    assert apart.interval(ALL, both) == agreed.interval(ALL, both)  # arms vary alike, it is assumed


def test_only_arms_of_the_same_problems_say_how_models_vary():
    """What is hard varies by many points, and says nothing of what is easy."""
    easy = reached("easy", ones(98), ones(99), ones(99), problems="easy")
    hard, also = reached("hard", ones(30), ones(60)), reached("also", ones(40), ones(50))
    arms = [easy, hard, also]
    assert spread_of(arms, ALL, easy) == pooled_spread([[0.98, 0.99, 0.99]])
    assert spread_of(arms, ALL, hard) == pooled_spread([[0.3, 0.6], [0.4, 0.5]])
    low, high = Results(grid_of_ranks().study, arms, []).interval(easy, ALL)
    assert 0.93 < low < high == 1.0


def test_what_is_easy_makes_no_seed_of_what_is_hard_a_finding():
    """Arms of an easy test, which vary little, beside one of a hard test, all of one mean."""
    draw, told = random.Random(4), 0
    for _ in range(200):
        hard = reached(
            "hard", *[ones(round(draw.gauss(500, 100)), 1000) for _ in range(3)], problems="hard"
        )
        easy = [
            reached(
                f"easy {i}",
                *[ones(round(draw.gauss(500, 5)), 1000) for _ in range(3)],
                problems="easy",
            )
            for i in range(5)
        ]
        told += differences([hard, *easy], hard, ALL)[0].p < 0.05
    assert told <= 20


def test_one_model_beside_three_that_are_no_better_is_told_apart_by_chance_alone():
    """Most problems that either side solves more often fall to one of them: that is no finding."""
    draw, told = random.Random(3), 0
    for _ in range(200):
        chances = [draw.choice((0.1, 0.3)) for _ in range(150)]
        models = ["".join("01"[draw.random() < c] for c in chances) for _ in range(4)]
        start, new = reached("start", models[0]), reached("new", *models[1:])
        p, _, better, worse = by_problems(new, start, ALL, (3, 1))
        assert (better, worse) == (None, None)
        told += p < 0.05
    assert told <= 20


# ------------------------------------------------------------------------------ rows of problems


@pytest.mark.parametrize(
    ("facts", "row"),
    [
        ({"depth": 3}, "depth 3"),
        ({"depth": None, "terms": 7}, "7 terms"),
        ({"depth": None, "ground_truth": "ERROR"}, "invalid"),
    ],
)
def test_the_row_of_a_problem(facts, row):
    assert row_of({**entry("x", True), **facts}) == row


def test_what_counts_as_right():
    by_luck = entry("x", True, trace_error="wrong_copy")
    cut_off = entry("x", False, predicted=None)  # but for that, its first error is in its sums
    garbled = entry("x", False, error="unparseable", trace_error="unparseable")
    marks = {m: [is_right(e, m) for e in (by_luck, cut_off, garbled)] for m in MEASURES}
    assert marks == {
        "exact match": [True, False, False],
        "whole trace": [False, False, False],
        "parse": [True, False, True],
    }


# ------------------------------------------------------------------------------ tables, pictures


def grid_of_ranks():
    arms = [reached("full", ones(80), ones(70), ones(75), depths=(1, 2))]
    for where in ("attention", "both"):
        for rank in (8, 1, 2):
            place = {"lora_rank": rank, "where": where}
            texts = [ones(50 + rank + seed) for seed in range(3)]
            arms.append(reached(f"{where} {rank}", *texts, place=place, depths=(1, 2)))
    rows = ["all", "depth 2"]
    study = Study(name="ranks", question="How much?", seeds=[0, 1, 2], rows=rows)
    return Results(study, arms, ["both 4, seed 1"])


def test_every_seed_is_in_the_table():
    results = grid_of_ranks()
    lines = list(csv.DictReader(io.StringIO(csv_text(results))))
    assert len(lines) == 7 * 3 * 2
    line = lines[6 + 2 * 2]  # the first arm of the grid, its third seed
    assert (line["arm"], line["lora_rank"], line["where"]) == ("attention 8", "8", "attention")
    assert (line["seed"], line["row"], line["right"], line["problems"]) == ("2", "all", "60", "100")
    assert line["percent"] == "60.00"
    assert lines[0]["lora_rank"] == ""


def test_the_page_says_what_is_better_and_what_is_missing():
    text = page(grid_of_ranks(), "python run_study.py x", ["results.png"])
    assert "| full | 3 | 75.0 (65.7 to 82.5) |" in text
    assert (
        "- worse than full: attention 8; attention 1; attention 2; both 8; both 1; both 2" in text
    )
    assert "## Not finished\n\n- both 4, seed 1" in text
    assert "one model each" not in text


def test_an_arm_that_all_are_compared_with_and_that_failed_ends_no_page():
    whole = grid_of_ranks()
    named = Results(replace(whole.study, against="full"), whole.arms[1:], ["full, seed 0"])
    text = page(named, "python run_study.py x", [])
    assert "## all\n\nNothing to compare with: full did not finish." in text
    assert "| attention 8 | 3 |" in text


def test_arms_are_drawn_against_the_number_that_varies():
    results = grid_of_ranks()
    assert numeric_axis(results.arms) == "lora_rank"
    without = reached("no rank", ones(9), place={"lora_rank": None})
    assert numeric_axis([*results.arms, without]) == ""
    series = series_of(results.arms, "lora_rank")
    assert [(each.name, each.x) for each in series] == [
        ("attention", [1, 2, 8]),
        ("both", [1, 2, 8]),
    ]
    axes, *others = draw_results(results).axes
    assert [axes.get_title(), others[0].get_title()] == ["all", "depth 2"]
    heights = [list(line.get_ydata()) for line in axes.get_lines() if len(line.get_ydata()) == 3]
    assert heights[::3] == [pytest.approx([52, 53, 59])] * 2
    assert axes.get_xlabel() == "lora_rank"


def test_arms_without_a_number_are_drawn_one_below_another():
    results = grid_of_ranks()
    few = Results(results.study, results.arms[:3], [])
    axes = draw_results(few).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "full",
        "attention 8",
        "attention 1",
    ]
    means = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "o"]
    assert means == pytest.approx([75, 59, 52])


def test_the_grid_has_a_share_for_every_arm_and_row():
    results = grid_of_ranks()
    rows, shares = depth_grid(results.arms)
    assert rows == ["depth 1", "depth 2"]
    assert shares[0] == pytest.approx([0.76, 0.74], abs=0.01)
    texts = [text.get_text() for text in draw_grid(results).axes[0].texts]
    assert texts[:2] == [f"{100 * share:.0f}" for share in shares[0]]
    assert [*map(percent_text, (-1, 0, 74.5, 99.4, 99.96, 100))] == [
        "-",
        "0",
        "74",
        "99",
        "99.9",
        "100",
    ]
    results.arms.append(reached("deep", ones(4, of=9), depths=(3,)))
    rows, shares = depth_grid(results.arms)
    assert rows == ["depth 1", "depth 2", "depth 3"]
    assert (shares[0][2], shares[-1][:2]) == (None, [None, None])
