"""Trees, styles, drills and corruptions."""

import random
from collections import Counter

import pytest

from arithmetic_llm.config import TREE_STYLES, SampleSpec
from arithmetic_llm.corpus import corruption
from arithmetic_llm.corpus.draw import draw
from arithmetic_llm.corpus.trees import (
    MANY,
    all_flat_sums,
    all_trees,
    count_flat_sums,
    count_trees,
    exact_tree,
    flat_sum,
    write,
)
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.expression import REASONS, ExpressionError, parse, spell, tree_depth
from arithmetic_llm.task.solution import solve


@pytest.fixture
def rng():
    return random.Random(7)


def numbers_of(tree):
    return [symbol for symbol in tree if isinstance(symbol, int)]


# ---------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("depth", range(8))
def test_depth_is_exact(depth, rng):
    for _ in range(200):
        tree = exact_tree(depth, (1, 20), rng)
        assert tree_depth(tree) == depth
        assert all(parse(write(tree, style, rng)).depth == depth for style in TREE_STYLES)


def test_depths_are_uniform_and_both_sides_grow(rng):
    spec = SampleSpec(min_depth=2, max_depth=5)
    trees = [draw(spec, "nested", rng) for _ in range(4000)]
    assert all(900 < count < 1100 for count in Counter(map(tree_depth, trees)).values())
    texts = [spell(tree) for tree in trees]
    left_number = sum(not text.startswith("(") for text in texts)
    right_number = sum(not text.endswith(")") for text in texts)
    # The free side is a number with probability 0.3 and stands on either side equally often.
    assert left_number == pytest.approx(600, abs=80)
    assert right_number == pytest.approx(600, abs=80)


@pytest.mark.parametrize("num_range", [(1, 20), (-5, 5), (0, 0), (-9, -7)])
def test_every_number_of_the_range_and_no_other(num_range, rng):
    trees = [exact_tree(3, num_range, rng) for _ in range(500)]
    trees += [flat_sum(5, num_range, rng) for _ in range(100)]
    seen = {number for tree in trees for number in numbers_of(tree)}
    assert seen == set(range(num_range[0], num_range[1] + 1))


@pytest.mark.parametrize("depth", range(4))
def test_listing_all_trees(depth):
    trees = list(all_trees(depth, (1, 2)))
    assert len(trees) == len(set(trees)) == count_trees(depth, (1, 2))
    assert {tree_depth(tree) for tree in trees} == {depth}


def test_depth_1_has_800_problems():
    assert count_trees(1, (1, 20)) == 800
    assert count_trees(20, (1, 10**100)) == MANY


def test_listing_all_flat_sums():
    sums = list(all_flat_sums(3, (-1, 1)))
    assert len(sums) == len(set(sums)) == count_flat_sums(3, (-1, 1)) == 27 * 4
    assert all(len(numbers_of(tree)) == 3 and parse(spell(tree)).depth == 2 for tree in sums)


# -------------------------------------------------------------------------------- styles


@pytest.mark.parametrize("style", ["nested", "typed", "padded", "flat", "drill"])
def test_text_means_its_tree(style, rng):
    spec = SampleSpec(num_range=(-20, 20))
    for _ in range(500):
        tree = draw(spec, style, rng)
        expression = parse(write(tree, style, rng))
        assert expression.postfix == tree
        assert expression.canonical == write(tree, style, rng) or style == "padded"


def test_styles_of_one_tree(rng):
    tree = (1, 2, "+", 3, 4, "-", "-")  # (1 + 2) - (3 - 4)
    assert write(tree, "nested", rng) == "(1 + 2) - (3 - 4)"
    assert write(tree, "typed", rng) == "1 + 2 - (3 - 4)"
    padded = {write(tree, "padded", rng) for _ in range(2000)}
    assert len(padded) == 3**3 - 1  # 0 to 2 needless pairs around three operations, not all 0
    assert "(((1 + 2)) - ((3 - 4)))" in padded
    assert "(1 + 2) - (3 - 4)" not in padded


def test_flat_sums_have_2_to_n_numbers(rng):
    trees = [draw(SampleSpec(flat_terms=6), "flat", rng) for _ in range(500)]
    assert {len(numbers_of(tree)) for tree in trees} == {2, 3, 4, 5, 6}
    assert all("(" not in write(tree, "flat", rng) for tree in trees)


# -------------------------------------------------------------------------------- drills


def test_drills_are_single_steps_with_the_numbers_that_traces_meet(rng):
    spec = SampleSpec(max_depth=4)
    drills = [draw(spec, "drill", rng) for _ in range(20_000)]
    assert {tree_depth(tree) for tree in drills} == {1}
    steps = [
        (step.left, step.right)
        for _ in range(2000)
        for step in solve(spell(exact_tree(4, spec.num_range, rng))).steps
    ]
    operands = [number for tree in drills for number in numbers_of(tree)]
    in_traces = [number for step in steps for number in step]
    assert min(operands) < -60
    assert max(operands) > 80
    for low, high in ((-200, -20), (-20, 0), (1, 21), (21, 200)):
        drilled, met = (
            sum(low <= number < high for number in numbers) / len(numbers)
            for numbers in (operands, in_traces)
        )
        assert drilled == pytest.approx(met, rel=0.25)


# ---------------------------------------------------------------------------- the spec


@pytest.mark.parametrize("num_samples", [1, 7, 10, 99, 1000])
@pytest.mark.parametrize("rates", [(0.1, 0.2, 0.08, 0.4, 0.05), (0.5, 0.5, 0, 0, 0), (0,) * 5])
def test_counts_are_exact(num_samples, rates):
    names = ("typed", "padded", "flat", "drill", "invalid")
    spec = SampleSpec(**{f"{name}_rate": rate for name, rate in zip(names, rates, strict=True)})
    counts = spec.style_counts(num_samples)
    assert sum(counts.values()) == num_samples
    assert min(counts.values()) >= 0
    assert abs(counts["invalid"] - spec.invalid_rate * num_samples) <= 0.5


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_range": (5, 1)}, "--num-range 5 1"),
        ({"num_range": (1, 10**101)}, "--num-range"),
        ({"min_depth": 4, "max_depth": 3}, "--min-depth 4"),
        ({"drill_rate": 0.7, "flat_rate": 0.4}, "drill 0.7"),
        ({"max_depth": 11}, "--max-depth: must be at most 10, not 11"),
        ({"min_depth": 0}, "--min-depth: must be at least 1, not 0"),
        ({"flat_terms": 201}, "--flat-terms: must be at most 200, not 201"),
        ({"flat_terms": 1}, "--flat-terms: must be at least 2, not 1"),
        ({"drill_rate": -0.1}, "--drill-rate: must be at least 0"),
        ({"invalid_rate": float("nan")}, "--invalid-rate: must be a finite number"),
    ],
)
def test_impossible_specs_are_refused(wrong, named):
    with pytest.raises(UserError, match=named):
        SampleSpec(**wrong)


# --------------------------------------------------------------------------- corruptions


def reason_of(text):
    try:
        parse(text)
    except ExpressionError as error:
        return error.reason
    return None


def test_every_corruption_is_invalid_and_every_reason_is_met(rng):
    spec = SampleSpec(num_range=(-20, 20))
    texts = [draw(spec, "invalid", rng) for _ in range(3000)]
    counts = Counter(map(reason_of, texts))
    assert set(counts) == set(REASONS)
    assert min(counts.values()) > 100
    assert all(text == " ".join(text.split()) for text in texts)


@pytest.mark.parametrize(
    ("corrupt", "reasons"),
    [
        (corruption.drop_number, {"missing operand"}),
        (corruption.drop_operator, {"missing operator"}),
        (corruption.double_operator, {"missing operand"}),
        (corruption.loose_sign, {"missing operand", None}),  # -5 is a number
        (corruption.signed_parenthesis, {"missing operand"}),
        (corruption.drop_parenthesis, {"unbalanced parenthesis"}),
        (corruption.extra_parenthesis, {"unbalanced parenthesis"}),
        (corruption.empty_parentheses, {"empty parentheses"}),
        (corruption.leading_zeros, {"malformed number"}),
        (corruption.stray_character, {"unexpected character"}),
    ],
)
def test_each_corruption_has_its_reason(corrupt, reasons, rng):
    found = set()
    for _ in range(100):
        pieces = ["(", "5", " + ", "3", ")", " - ", "1"]
        corrupt(pieces, rng)
        found.add(reason_of("".join(pieces)))
    assert found == reasons
