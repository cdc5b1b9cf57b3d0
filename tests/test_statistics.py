"""Statistics of studies, against scipy, published examples and plain counting."""

import itertools
import random
from math import hypot
from statistics import fmean, variance

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from arithmetic_llm.evaluation.interval import wilson_interval
from arithmetic_llm.study.statistics import (
    difference_interval,
    fisher,
    holm,
    hull,
    mcnemar,
    normal_quantile,
    paired_interval,
    paired_p,
    pooled_spread,
    student_interval,
    student_p,
    t_quantile,
    t_tail,
)

counts = st.integers(0, 60)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 101])
def test_students_t_is_that_of_scipy(freedom):
    for t in (0.0, 0.3, 1.0, -2.5, 4.0, 40.0):
        expected = 2 * stats.t.sf(abs(t), freedom)
        assert t_tail(t, freedom) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_the_normal_quantile_is_that_of_scipy():
    assert normal_quantile() == pytest.approx(stats.norm.ppf(0.975), rel=1e-12)


values = st.lists(st.integers(-300, 300), min_size=2, max_size=6).filter(lambda v: len({*v}) > 1)


@settings(deadline=None)
@given(values)
def test_one_arm_of_several_seeds_as_in_scipy(found):
    spread, theirs = pooled_spread([found, [7]]), stats.ttest_1samp(found, 0.0)
    error = spread.error(len(found))
    ours = student_interval(fmean(found), error, spread.freedom)
    assert ours == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-6, abs=1e-6)
    p = student_p(fmean(found), error, spread.freedom)
    assert p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(values, values)
def test_two_arms_of_several_seeds_as_in_scipy(found, other):
    spread, theirs = pooled_spread([found, other]), stats.ttest_ind(found, other)
    center = fmean(found) - fmean(other)
    error = hypot(spread.error(len(found)), spread.error(len(other)))
    ours = student_interval(center, error, spread.freedom)
    assert ours == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-6, abs=1e-6)
    p = student_p(center, error, spread.freedom)
    assert p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-9)


def test_the_spread_of_many_arms_is_that_of_an_analysis_of_variance():
    groups = [[1.0, 2.0, 4.0], [5.0, 5.5, 9.0], [2.0, 8.0, 3.0]]
    spread = pooled_spread(groups)
    between = 3 * variance(map(fmean, groups))
    assert between / spread.deviation**2 == pytest.approx(stats.f_oneway(*groups).statistic)
    assert spread.freedom == 6


def test_seeds_that_agree_exactly_and_single_models():
    assert student_p(0.0, 0.0, 2) == 1.0
    assert student_p(0.1, 0.0, 2) == 0.0
    assert pooled_spread([[0.5], [0.7]]) is None


@settings(deadline=None)
@given(counts, counts)
def test_mcnemar_is_the_binomial_test_of_scipy(better, worse):
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_counting_every_fall_of_the_coins():
    falls = [sum(fall) for fall in itertools.product((0, 1), repeat=9)]
    assert mcnemar(8, 1) == sum(abs(heads - 4.5) >= 3.5 for heads in falls) / len(falls)


@settings(deadline=None)
@given(counts, counts, counts, counts)
def test_fisher_is_that_of_scipy(right, wrong, other_right, other_wrong):
    if right + wrong and other_right + other_wrong:
        expected = stats.fisher_exact([[right, wrong], [other_right, other_wrong]]).pvalue
        ours = fisher(right, right + wrong, other_right, other_right + other_wrong)
        assert ours == pytest.approx(expected, rel=1e-6)


def test_the_interval_of_two_shares_as_newcombe_published_it():
    """56 of 70 against 48 of 80 (Statistics in Medicine 17, 1998, method 10)."""
    shares = [(right / of, *wilson_interval(right, of)) for right, of in ((56, 70), (48, 80))]
    assert difference_interval(*shares) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_the_paired_interval_holds_the_truth_as_often_as_it_says():
    """Two models of known accuracies, a thousand tests of 60 problems each."""
    draw, held = random.Random(0), 0
    for _ in range(1000):
        cells = draw.choices((1, -1, 0), (0.15, 0.05, 0.8), k=60)
        low, high = paired_interval(cells)
        held += low <= 0.1 <= high
    assert 0.93 <= held / 1000 <= 0.98


def test_the_paired_interval_of_no_difference_has_a_width():
    low, high = paired_interval([0.0] * 20)
    assert low == -high
    assert 0.05 < high < 0.15
    wide, narrow = paired_interval([1, -1] * 50), paired_interval([0.5, -0.5] * 50)
    assert narrow[1] < 0.6 * wide[1]  # several pairs that differ by half: they vary less


def test_the_paired_test_is_that_of_a_normal_mean_and_agrees_with_the_interval():
    draw = random.Random(2)
    for mean in (0.0, 0.02, 0.05, 0.2):
        found = [draw.gauss(mean, 0.3) for _ in range(100)]
        more = [*found, 0.5**0.5, -(0.5**0.5)]  # the two problems more
        z = fmean(more) / (stats.tstd(more, ddof=0) / len(more) ** 0.5)
        assert paired_p(found) == pytest.approx(2 * stats.norm.sf(abs(z)))
        low, high = paired_interval(found)
        assert (paired_p(found) < 0.05) == (not low < 0 < high)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_hull():
    assert hull((0.1, 0.2), (0.15, 0.4)) == (0.1, 0.4)


def test_arms_that_are_alike_are_told_apart_in_one_row_of_twenty_at_most():
    """Five arms beside a sixth, all with the same chance of solving a problem; 200 such studies."""
    draw, told = random.Random(1), 0
    for _ in range(200):
        solved = [[draw.random() < 0.6 for _ in range(80)] for _ in range(6)]
        p_values = [
            mcnemar(
                sum(a > b for a, b in zip(arm, solved[0], strict=True)),
                sum(a < b for a, b in zip(arm, solved[0], strict=True)),
            )
            for arm in solved[1:]
        ]
        told += min(holm(p_values)) <= 0.05
    assert told / 200 <= 0.06
