"""Splits, exact counts, test sets, corpus files and their readers."""

import hashlib
import itertools
import json
import random
import re
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest

from arithmetic_llm.config import SPLITS, STYLES, TREE_STYLES, CorpusConfig, SampleSpec
from arithmetic_llm.corpus import files as corpus
from arithmetic_llm.corpus.draw import distinct_samples, draw_samples, shuffled
from arithmetic_llm.corpus.files import (
    json_line,
    make_corpus,
    plain_lines,
    read_corpus,
    read_problems,
)
from arithmetic_llm.corpus.record import Record, record_of, rewriting
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.expression import apply, parse
from arithmetic_llm.task.problem import split_of
from arithmetic_llm.task.solution import solve
from arithmetic_llm.task.text import ERROR, one_line

MIXED = SampleSpec(
    max_depth=3,
    invalid_rate=0.1,
    typed_rate=0.1,
    padded_rate=0.2,
    flat_rate=0.1,
    drill_rate=0.2,
)
ALL_DEPTH_1 = [f"{a} {op} {b}" for a, b in itertools.product(range(1, 21), repeat=2) for op in "+-"]
GOLDEN_SHA256 = "f4230fffe200b72d83856872187ff3e3697206d531207fa8a7341fc8376113d8"


PUBLISHED_TEST_SHA256 = "5a04afbad14ce723ba93c80a28fa0f9111084483099c5da30dd09a406b5f35bd"
PUBLISHED_STYLES_SHA256 = "65375747bf2bfec9d309459ccb46265bbd1dcc68f5b11032a23a5113fc1f4aa6"


def file_hash(samples):
    text = "".join(json_line(sample.record) for sample in samples)
    return hashlib.sha256(text.encode()).hexdigest()


def tree_of(sample):
    return parse(sample.record.expression).postfix


# -------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("expression", "split"),
    [
        ("5 + (10 - 3)", "train"),
        ("14 - -2", "train"),
        ("7", "train"),
        ("5 +", "train"),
        ("1 + 1", "validation"),
        ("2 + 7", "validation"),
        ("3 - 9", "test"),
        ("1 + 17", "test"),
    ],
)
def test_a_problem_stays_in_its_split_for_ever(expression, split):
    assert split_of(expression) == split


def test_all_spellings_of_a_tree_are_in_one_split():
    for expression in ALL_DEPTH_1[:200]:
        spellings = [
            expression.replace(" ", ""),
            f"(({expression}))",
            f"({expression[0]}){expression[1:]}",
        ]
        assert {split_of(text) for text in spellings} == {split_of(expression)}
    assert split_of("1 + 2 - (3 - 4)") == split_of("((1 + 2)) - (3 - 4)")
    different = {split_of(f"1 + (2 - {n})") == split_of(f"1 + 2 - {n}") for n in range(300)}
    assert different == {True, False}  # another tree is another problem


def test_nine_in_ten_are_for_training():
    counts = Counter(split_of(f"1 + {n}") for n in range(20_000))
    assert counts["train"] == pytest.approx(18_000, abs=150)
    assert counts["test"] == pytest.approx(1000, abs=100)


def test_any_text_has_a_split():
    assert {split_of(text) for text in ("", "\ud800", "\n", "(" * 50_000)} <= set(SPLITS)


@pytest.mark.parametrize("style", [style for style in STYLES if style != "rewrite"])
@pytest.mark.parametrize("split", SPLITS)
def test_samples_are_of_their_split_and_style(style, split):
    rates = dict.fromkeys((f"{other}_rate" for other in STYLES[1:]), 0.0)
    rates |= {f"{style}_rate": 1.0} if style != "nested" else {}
    for sample in draw_samples(SampleSpec(**rates), 60, seed=1, split=split):
        assert sample.style == style
        assert split_of(sample.record.expression) == split


# ------------------------------------------------------------------------------- drawing


def test_counts_are_exact_in_any_order():
    styles = [sample.style for sample in draw_samples(MIXED, 1000, seed=5)]
    assert Counter(styles) == Counter(MIXED.style_counts(1000))
    assert Counter(styles)["invalid"] == 100
    assert 20 < styles[:300].count("invalid") < 45  # spread all over, not in one place


LONG = SampleSpec(max_depth=3, chain_rate=1.0, chain_numbers=30, typed_rate=0.0, invalid_rate=0.0)


def test_chains_are_long_sums_whose_parentheses_nest_no_deeper_than_in_trees():
    sizes = []
    for sample in draw_samples(LONG, 400, seed=2):
        text = sample.record.expression
        nesting = itertools.accumulate((char == "(") - (char == ")") for char in text)
        assert max(nesting) in (1, 2)  # a tree of depth 2, and the pair around it
        assert parse(text).terms == sample.terms
        assert parse(text).canonical == text
        assert sample.record == record_of(text, solve(text))
        sizes.append(sample.terms)
    assert 3 <= min(sizes) < 6
    assert 30 <= max(sizes) < 30 + 2**2  # the last tree may begin at the last but one
    assert sum(sizes) / len(sizes) == pytest.approx(18, abs=2)


def test_a_chain_of_trees_of_one_level_has_parentheses_too():
    spec = replace(LONG, max_depth=1, chain_numbers=3)
    assert all("(" in s.record.expression for s in draw_samples(spec, 100, seed=1))


STEPS = SampleSpec(max_depth=3, rewrite_rate=1.0, rewrite_depth=5, typed_rate=0.0, invalid_rate=0.0)


@pytest.mark.parametrize("draw", [draw_samples, partial(distinct_samples, split="train")])
@pytest.mark.parametrize("leaves", [(0.3, 0.3), (0.3, 1.0), (0.0, 0.3)])
def test_a_rewriting_is_one_right_step_of_a_deeper_solution(draw, leaves):
    numbers, depths, operations = [], Counter(), Counter()
    for sample in draw(replace(STEPS, rewrite_leaf_probability=leaves), 400, seed=2):
        expression, problem, solution, answer = sample.record
        assert (sample.style, answer) == ("rewrite", None)
        if first := solution.startswith("<think>\n"):
            solution = solution.removeprefix("<think>\n")
        step, line = solution.split("\n")
        number, left, right = re.fullmatch(r"Step (\d+): (.*) = (-?\d+)", step).groups()
        assert eval(left) == int(right)
        if first:
            assert problem == f"Evaluate: {expression}"
        else:
            last, begins = problem.split(" Expression now: ")
            done, left, right = re.fullmatch(r"Step (\d+): (.*) = (-?\d+)", last).groups()
            assert (eval(left), int(done)) == (int(right), int(number) - 1)
            assert begins == expression
        rewritten = line.removeprefix("Expression now: ")
        assert eval(rewritten) == eval(expression)
        assert rewritten.count(" ") == expression.count(" ") - 2  # one operation fewer
        assert solve(expression).steps[0].text(int(number)) == solution  # and the one that is due
        assert first == (number == "1")
        numbers.append(int(number))
        depths[parse(expression).depth] += 1
        operations[expression.count(" ") // 2] += 1
    assert {*depths} == {4, 5}  # deeper than any that is solved
    first = numbers.count(1)  # those alone say that a problem may be so deep
    thin, full = leaves[1] == 1.0, leaves[0] == 0.0
    assert 180 < first < 300 if thin else 80 < first < 200
    assert max(numbers) > 10
    few = operations[4] + operations[5]  # hardly more than it takes to be so deep
    assert few > 150 if thin else few < 100
    many = sum(operations[n] for n in operations if n > 20)  # of 31 at most
    assert many > 40 if full else many < 30
    assert sum(operations[n] for n in operations if n > 9) > 30


def test_a_rewriting_goes_on_for_some_steps_while_it_is_deep():
    """Each is the step that is due, and behind the last the limit is reached or the depth left."""
    lengths = Counter()
    for sample in draw_samples(replace(STEPS, rewrite_steps=3), 200, seed=4):
        expression, problem, solution, _ = sample.record
        text = solution.removeprefix("<think>\n")
        first, count = int(re.match(r"Step (\d+)", text)[1]), text.count("Step ")
        assert (first == 1) == problem.startswith("Evaluate:")
        due = solve(expression).steps[:count]
        assert text == "\n".join(step.text(n) for n, step in enumerate(due, first))
        *begins, after = [parse(text).depth for text in (expression, *(s.expression for s in due))]
        assert min(begins) > 3
        assert count == 3 or after <= 3
        lengths[count] += 1
    assert {*lengths} == {1, 2, 3}
    assert lengths[3] > 50


def test_rewritings_come_from_trees_of_their_split():
    """The expression before a step may be another tree, whatever split that belongs to."""
    checked = 0
    for split in SPLITS:
        for sample in draw_samples(STEPS, 100, seed=3, split=split):
            if sample.record.problem.startswith("Evaluate:"):
                assert split_of(sample.record.expression) == split
                checked += 1
    assert checked > 10


def test_rewritings_are_deeper_than_what_is_solved():
    with pytest.raises(UserError, match="--rewrite-depth 3: is not above --max-depth 3"):
        replace(STEPS, rewrite_depth=3)
    replace(STEPS, rewrite_depth=3, rewrite_rate=0.0)


@pytest.mark.parametrize("draw", [draw_samples, partial(distinct_samples, split="train")])
def test_wide_numbers_are_of_all_lengths_and_of_either_sign(draw):
    spec = SampleSpec(
        wide_rate=0.5, wide_range=(-999, 500), flat_rate=0.3, drill_rate=0.3, invalid_rate=0.1
    )
    samples = [s for s in draw(spec, 2000, seed=4) if s.style not in ("invalid", "drill")]
    numbers = [[n for n in tree_of(s) if isinstance(n, int)] for s in samples]
    wide = [sample for sample in numbers if not all(1 <= n <= 20 for n in sample)]
    assert len(wide) / len(samples) == pytest.approx(0.5, abs=0.05)
    each = list(itertools.chain(*wide))
    assert -999 <= min(each) < -950 < 450 < max(each) <= 500
    lengths = Counter(len(str(abs(n))) for n in each)
    assert lengths[2] > lengths[3] > lengths[1] > 0.1 * len(each)
    assert sum(n < 0 for n in each) / len(each) == pytest.approx(0.52, abs=0.05)
    narrow = list(itertools.chain(*(n for n in numbers if n not in wide)))
    assert {*narrow} == {*range(1, 21)}


WIDE_DRILLS = SampleSpec(drill_rate=1.0, wide_rate=1.0, typed_rate=0.0, invalid_rate=0.0)


def test_wide_drills_have_a_digit_more_than_problems_and_either_sign():
    spec = replace(WIDE_DRILLS, wide_range=(1, 50))
    numbers = [n for s in draw_samples(spec, 500, seed=4) for n in tree_of(s)[:2]]
    assert -509 <= min(numbers) < -400 < 400 < max(numbers) <= 509


def test_wide_numbers_cancel_as_often_as_not():
    spec = WIDE_DRILLS
    trees = [tree_of(sample) for sample in draw_samples(spec, 4000, seed=4)]
    long = [tree for tree in trees if len(str(abs(tree[0]))) == len(str(abs(tree[1]))) == 3]
    for sign in "+-":
        results = [apply(left, sign, right) for left, right, operator in long if operator == sign]
        short = sum(abs(result) < 100 for result in results)
        assert short / len(results) > 0.2  # of numbers drawn evenly 0.1


def test_cancelling_drills_take_away_and_their_results_have_every_length_and_many_zeros():
    samples = [*draw_samples(replace(WIDE_DRILLS, cancel_rate=1.0), 4000, seed=4)]
    trees = [tree_of(sample) for sample in samples]
    assert {sample.style for sample in samples} == {"drill"}
    assert max(abs(n) for left, right, _ in trees for n in (left, right)) in range(9000, 10000)
    results = [apply(left, operator, right) for left, right, operator in trees]
    for (left, right, _), result in zip(trees, results, strict=True):
        assert abs(result) < max(abs(left), abs(right))
    long = [
        result
        for (left, right, _), result in zip(trees, results, strict=True)
        if min(abs(left), abs(right)) > 999
    ]
    lengths = Counter(len(str(abs(result))) for result in long)
    assert min(lengths[digits] for digits in (1, 2, 3)) > 0.15 * len(long)
    assert 0.4 < sum(result < 0 for result in results) / len(results) < 0.6
    later = "".join(str(abs(result))[1:] for result in results)
    assert 0.3 < later.count("0") / len(later) < 0.45  # of digits drawn evenly 0.1
    mixed = draw_samples(replace(WIDE_DRILLS, cancel_rate=0.5), 4000, seed=4)
    assert sum(abs(apply(a, o, b)) >= max(abs(a), abs(b)) for a, b, o in map(tree_of, mixed)) > 600


@pytest.mark.parametrize(
    "wide", [(5, 5), (100, 200), (-7, -3), (0, 0), (-3, 250), (10**60, 10**60 + 5)], ids=str
)
def test_any_range_will_do_for_wide_numbers(wide):
    spec = SampleSpec(max_depth=4, invalid_rate=0.0, wide_rate=1.0, wide_range=wide)
    numbers = {
        n for s in draw_samples(spec, 100, seed=4) for n in tree_of(s) if n not in ("+", "-")
    }
    assert all(wide[0] <= number <= wide[1] for number in numbers)
    assert len(numbers) > min(5, wide[1] - wide[0])
    assert [*draw_samples(replace(spec, drill_rate=1.0, typed_rate=0.0, cancel_rate=1.0), 9, 4)]


def test_without_wide_numbers_nothing_changes():
    plain, none = (
        draw_samples(MIXED, 200, 9),
        draw_samples(replace(MIXED, wide_range=(-5, 5)), 200, 9),
    )
    assert [*plain] == [*none]
    chains = replace(LONG, wide_rate=1.0)
    assert [*draw_samples(chains, 50, 9)] == [*draw_samples(LONG, 50, 9)]


def test_shuffled_is_uniform():
    rng = random.Random(0)
    orders = Counter("".join(shuffled({"a": 2, "b": 1}, rng)) for _ in range(3000))
    assert set(orders) == {"aab", "aba", "baa"}
    assert all(count == pytest.approx(1000, abs=100) for count in orders.values())


def test_records_are_what_the_solver_says():
    for record, style, depth, terms in draw_samples(MIXED, 500, seed=3):
        solution = solve(record.expression)
        assert record.problem == f"Evaluate: {record.expression}"
        assert (record.solution, record.answer) == (solution.text, solution.answer)
        assert (
            (record.answer == ERROR) == (style == "invalid") == (depth is None) == (terms is None)
        )
        if style != "invalid":
            expression = parse(record.expression)
            assert (expression.depth, expression.terms) == (depth, terms)
        if style in TREE_STYLES:
            assert 1 <= depth <= 3


def test_generating_takes_constant_memory():
    samples = draw_samples(MIXED, 100_000, seed=1)
    next(samples)
    tracemalloc.start()
    for _ in itertools.islice(samples, 5000):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_split_without_problems_is_an_error_and_not_an_endless_search():
    spec = SampleSpec(num_range=(3, 3), max_depth=1, invalid_rate=0.0, typed_rate=0.0)
    assert split_of("3 + 3") == split_of("3 - 3") == "train"
    with pytest.raises(UserError, match="test split has no problem of nested style"):
        next(draw_samples(spec, 1, seed=1, split="test"))
    with pytest.raises(UserError, match="test split has no problem of depth 1"):
        distinct_samples(spec, 10, seed=1)


# ------------------------------------------------------------------------------ test sets


def test_test_problems_are_distinct_and_of_the_test_split():
    spec = SampleSpec(max_depth=4, invalid_rate=0.1, typed_rate=0.3, padded_rate=0.2)
    samples = distinct_samples(spec, 1000, seed=42)
    assert len(samples) == 1000
    assert {split_of(sample.record.expression) for sample in samples} == {"test"}
    trees = [tree_of(sample) for sample in samples if sample.style in TREE_STYLES]
    assert len(trees) == len(set(trees)) == 900
    invalid = [sample.record.expression for sample in samples if sample.style == "invalid"]
    assert len(invalid) == len(set(invalid)) == 100


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(
    "settings",
    [
        {"typed_rate": 0.2, "flat_rate": 0.2, "drill_rate": 0.3, "flat_terms": 4},
        {"num_range": (0, 5), "flat_rate": 0.3, "drill_rate": 0.2, "flat_terms": 3},
        {"num_range": (-2, 2), "max_depth": 2, "padded_rate": 0.2, "drill_rate": 0.5},
        {"max_depth": 1, "flat_rate": 0.5, "flat_terms": 3, "num_range": (-9, 9)},
        {"chain_rate": 0.4, "chain_numbers": 5, "num_range": (1, 3), "wide_rate": 0.3},
    ],
)
def test_no_problem_is_in_a_file_twice_in_whatever_styles(settings, split):
    """1 + 2 - 3 is a flat sum and a typed tree, 1 + 2 can also be a drill."""
    spec = SampleSpec(**{"max_depth": 3, "invalid_rate": 0.1} | settings)
    samples = distinct_samples(spec, 400, 7, split)
    assert {s.style for s in samples} == {s for s, n in spec.style_counts(400).items() if n}
    valid = [tree_of(sample) for sample in samples if sample.style != "invalid"]
    invalid = [sample.record.expression for sample in samples if sample.style == "invalid"]
    assert len({*valid, *invalid}) == len(samples)
    assert {split_of(sample.record.expression) for sample in samples} == {split}
    assert samples == distinct_samples(spec, 400, 7, split)


def test_other_styles_take_nothing_from_trees():
    spec = SampleSpec(max_depth=3, flat_rate=0.2, flat_terms=4, drill_rate=0.3, invalid_rate=0.0)
    mixed = distinct_samples(spec, 400, seed=1)
    trees = Counter(s.depth for s in mixed if s.style in TREE_STYLES)
    assert sum(trees.values()) == 200
    assert max(trees.values()) - min(trees.values()) > 0  # depth 1 has about 40 problems
    assert trees[2] - trees[3] in (0, -1)
    assert {s.terms for s in mixed if s.style == "flat"} == {3, 4}  # those of 2 numbers are taken


def test_a_style_whose_problems_are_all_taken_is_left_out():
    spec = SampleSpec(max_depth=1, drill_rate=0.5, invalid_rate=0.0, typed_rate=0.0)
    samples = distinct_samples(spec, 100, seed=1)
    everything = {text for text in ALL_DEPTH_1 if split_of(text) == "test"}
    assert {sample.record.expression for sample in samples} == everything
    assert {sample.style for sample in samples} == {"nested"}
    with pytest.raises(UserError, match="test split has no problem of drill style"):
        distinct_samples(replace(spec, num_range=(3, 3), drill_rate=1.0), 10, seed=1)


def test_test_files_of_trees_stay_as_they_were_published():
    """The quickstart's test file, and what a validation draws; made before styles were compared."""
    recipe = SampleSpec(max_depth=4, invalid_rate=0.0, typed_rate=0.0)
    styles = SampleSpec(max_depth=5)
    assert file_hash(distinct_samples(recipe, 1000, 42)) == PUBLISHED_TEST_SHA256
    assert file_hash(distinct_samples(styles, 400, 42, "validation")) == PUBLISHED_STYLES_SHA256


def test_a_small_depth_is_exhausted_and_the_others_share_the_rest():
    spec = SampleSpec(max_depth=4, invalid_rate=0.0, typed_rate=0.0)
    samples = distinct_samples(spec, 1000, seed=1)
    ones = {sample.record.expression for sample in samples if sample.depth == 1}
    assert ones == {text for text in ALL_DEPTH_1 if split_of(text) == "test"}
    rest = Counter(sample.depth for sample in samples if sample.depth > 1)
    assert sum(rest.values()) == 1000 - len(ones)
    assert max(rest.values()) - min(rest.values()) <= 1


@pytest.mark.parametrize("largest", [20, 80])
def test_all_there_is_and_no_more(largest):
    numbers = range(-largest, largest + 1)
    spec = SampleSpec(num_range=(-largest, largest), max_depth=1, invalid_rate=0.0, typed_rate=0.5)
    samples = distinct_samples(spec, 5000, seed=1)
    everything = [f"{a} {op} {b}" for a, b in itertools.product(numbers, repeat=2) for op in "+-"]
    in_split = {text for text in everything if split_of(text) == "test"}
    assert len(samples) == len(in_split)
    assert {sample.record.expression for sample in samples} == in_split


def test_flat_sums_are_even_over_their_lengths():
    spec = SampleSpec(flat_rate=1.0, flat_terms=6, invalid_rate=0.0, typed_rate=0.0)
    samples = distinct_samples(spec, 300, seed=1)
    counts = Counter(sample.terms for sample in samples)
    assert counts[2] == sum(split_of(text) == "test" for text in ALL_DEPTH_1)
    assert sum(counts.values()) == 300
    assert max(counts[n] for n in range(3, 7)) - min(counts[n] for n in range(3, 7)) <= 1


def test_the_same_seed_makes_the_same_set():
    assert distinct_samples(MIXED, 200, seed=9) == distinct_samples(MIXED, 200, seed=9)
    assert distinct_samples(MIXED, 200, seed=9) != distinct_samples(MIXED, 200, seed=8)


# ------------------------------------------------------------------------------- writing


@pytest.fixture
def config():
    return CorpusConfig(
        num_samples=200, max_depth=3, padded_rate=0.1, flat_rate=0.1, drill_rate=0.1
    )


@pytest.mark.parametrize("as_text", [json_line, plain_lines])
def test_what_is_written_is_read_back(tmp_path, config, as_text, capsys):
    path, config = tmp_path / "new" / "corpus.txt", replace(config, rewrite_rate=0.1)
    make_corpus(config, path, as_text)
    written = [sample.record for sample in draw_samples(config, 200, seed=42)]
    if as_text is plain_lines:
        written = [record._replace(solution=one_line(record.solution)) for record in written]
    assert list(read_corpus(path)) == written
    assert "200 samples, train split, seed 42" in capsys.readouterr().out


def test_json_keys_are_in_the_documented_order(config):
    record = next(draw_samples(config, 1, seed=1)).record
    assert list(json.loads(json_line(record))) == ["expression", "problem", "solution", "answer"]


def test_the_same_seed_makes_the_same_bytes_on_every_machine(tmp_path, config):
    """A changed hash means that every published file changes: only ever on purpose."""
    path = tmp_path / "corpus.txt"
    make_corpus(config, path, plain_lines)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == GOLDEN_SHA256
    assert b"\r" not in path.read_bytes()


def test_the_sidecar_describes_the_file(tmp_path, config):
    path = tmp_path / "corpus.txt"
    make_corpus(config, path, json_line)
    meta = json.loads((tmp_path / "corpus.txt.meta.json").read_text())
    assert meta["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert meta["samples"] == 200
    assert meta["by_style"] == {style: n for style, n in config.style_counts(200).items() if n}
    samples = [*draw_samples(config, 200, seed=42)]
    depths = Counter(str(sample.depth) for sample in samples if sample.style in TREE_STYLES)
    assert meta["by_depth"] == depths
    assert sum(meta["flat_by_terms"].values()) == 20
    assert meta["settings"]["seed"] == 42
    assert meta["settings"]["num_range"] == [1, 20]


def test_a_failed_write_leaves_the_old_file(tmp_path, config, monkeypatch):
    path = tmp_path / "corpus.txt"
    path.write_text("old")
    monkeypatch.setattr(corpus, "draw_samples", lambda *_: (1 / 0 for _ in range(3)))
    with pytest.raises(ZeroDivisionError):
        make_corpus(config, path, json_line)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["corpus.txt"]


def test_fewer_problems_than_asked_for_are_announced(tmp_path, capsys):
    config = CorpusConfig(
        num_samples=100, max_depth=1, invalid_rate=0.0, typed_rate=0.0, split="test"
    )
    make_corpus(config, tmp_path / "corpus.txt", json_line)
    assert "fewer than asked for" in capsys.readouterr().out


# ------------------------------------------------------------------------------- reading

GOOD_JSON = json_line(next(draw_samples(MIXED, 1, seed=1)).record).strip()
GOOD_PLAIN = plain_lines(next(draw_samples(MIXED, 1, seed=1)).record).strip()
MARK = b"\xef\xbb\xbf"  # of UTF-8, which some editors begin a file with
FIELDS = json.loads(GOOD_JSON)
ONE = {
    "expression": "2 - 1",
    "problem": "Evaluate: 2 - 1",
    "solution": solve("2 - 1").text,
    "answer": 1,
}
REWRITING = {
    "expression": "1 - 2",
    "problem": "Step 2: 9 - 8 = 1 Expression now: 1 - 2",
    "solution": "Step 3: 1 - 2 = -1\nExpression now: -1",
    "answer": None,
}
MORE = {
    "expression": "9 - 8 - 2",
    "problem": "Step 1: 3 + 6 = 9 Expression now: 9 - 8 - 2",
    "solution": "Step 2: 9 - 8 = 1\nExpression now: 1 - 2\n" + REWRITING["solution"],
    "answer": None,
}
FIRST = {
    "expression": "4 - 2 - 3 + 1",
    "problem": "Evaluate: 4 - 2 - 3 + 1",
    "solution": "<think>\nStep 1: 4 - 2 = 2\nExpression now: 2 - 3 + 1\n"
    "Step 2: 2 - 3 = -1\nExpression now: -1 + 1",
    "answer": None,
}


@pytest.mark.parametrize("fields", [REWRITING, MORE, FIRST])
def test_rewritings_are_read_in_both_formats(tmp_path, fields):
    record = Record(**fields)
    assert rewriting(*STEP_OF[record]) == record
    for as_text in (json_line, plain_lines):
        (tmp_path / "c.txt").write_text(as_text(record))
        (read,) = read_corpus(tmp_path / "c.txt")
        assert read.sequence == record.sequence
        assert not read.is_problem


STEP_OF = {
    Record(**REWRITING): ("3 + 6 - 8 - 2", solve("3 + 6 - 8 - 2"), 3, 3),
    Record(**MORE): ("3 + 6 - 8 - 2", solve("3 + 6 - 8 - 2"), 2, 3),
    Record(**FIRST): ("4 - 2 - 3 + 1", solve("4 - 2 - 3 + 1"), 1, 2),
}


def test_a_corpus_may_begin_with_a_mark_of_its_encoding(tmp_path):
    for good in (GOOD_JSON, GOOD_PLAIN):
        (tmp_path / "marked.txt").write_bytes(MARK + good.encode() + b"\n")
        (tmp_path / "plain.txt").write_bytes(good.encode() + b"\n")
        marked, plain = ([*read_corpus(tmp_path / f"{name}.txt")] for name in ("marked", "plain"))
        assert marked == plain != []


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (GOOD_JSON + "\nhello\n", 2, "neither a JSON object nor a problem"),
        (GOOD_JSON + "\n\n" + GOOD_JSON, 2, "neither a JSON object nor a problem"),
        (GOOD_JSON[:-5], 1, "not a JSON object"),
        ("{" * 100_000, 1, "not a JSON object"),
        ("[1]", 1, "neither"),
        (json.dumps({**FIELDS, "answer": 10**6}), 1, "is not the final result"),
        (json.dumps({**FIELDS, "answer": str(FIELDS["answer"])}), 1, "is not the final result"),
        (json.dumps({**ONE, "answer": True}), 1, "is not the final result"),
        (json.dumps({**ONE, "answer": 1.0}), 1, "is not the final result"),
        (json.dumps({**FIELDS, "problem": "Evaluate: 1"}), 1, "the problem is not"),
        (json.dumps({**FIELDS, "expression": 5}), 1, "'expression' is not a string"),
        (json.dumps({**FIELDS, "expression": "\ud800 + 3"}), 1, "has half of a character"),
        (json.dumps({**REWRITING, "expression": "2 - 1"}), 1, "not a step, the next"),
        (json.dumps({**REWRITING, "problem": "Evaluate: 1 - 2"}), 1, "no <think>"),
        (json.dumps({**REWRITING, "problem": "Expression now: 1 - 2"}), 1, "the problem is not"),
        (json.dumps({**REWRITING, "answer": -1}), 1, "not a step, the next"),
        *[
            (json.dumps({**REWRITING, "problem": odd}), 1, "not a step, the next")
            for odd in (
                REWRITING["problem"].replace("Step 2", "Step 3"),
                REWRITING["problem"] + " - 3",
                "Step 1: 4 + 5 = 9 Expression now: 9 - 8 - 2 " + REWRITING["problem"],
            )
        ],
        *[
            (json.dumps({**REWRITING, "solution": odd}), 1, "not a step, the next")
            for odd in (
                "Step 3: 1 - 2 = -1",
                REWRITING["solution"].replace("Step 3", "Step 4"),
                REWRITING["solution"] + "\nStep 5: -1 + 0 = -1\nExpression now: -1",
                "garbage " + REWRITING["solution"],
                REWRITING["solution"] + " <eos>",
                "<think>\n" + REWRITING["solution"],
                REWRITING["solution"] + "\n</think>\nFinal Result: -1",
            )
        ],
        *[
            (json.dumps({**FIRST, "solution": odd}), 1, "the solution")
            for odd in (
                FIRST["solution"].replace("Step 2", "Step 3"),
                FIRST["solution"].replace("Step 2", "Step 3").replace("Step 1", "Step 2"),
                FIRST["solution"] + "\nStep 3: -1 + 1 = 0\nExpression now: 0",
                FIRST["solution"] + " <eos>",
                "so " + FIRST["solution"],
                "<think>\nStep 1: 4 - 2 = 2\nExpression now: 2",
            )
        ],
        (json.dumps({**FIRST, "answer": 2}), 1, "the solution"),
        (json.dumps({**ONE, "answer": None}), 1, "is not the final result"),
        (f"{REWRITING['problem']}\n", 1, "no solution line"),
        (f"{REWRITING['problem']}\n{ONE['solution'].replace(chr(10), ' ')}\n", 2, "not a step"),
        (json.dumps({**FIELDS, "solution": "Final Result: 1"}), 1, "no <think>"),
        (json.dumps({k: v for k, v in FIELDS.items() if k != "answer"}), 1, "'answer' is missing"),
        (GOOD_PLAIN + "\nEvaluate: 1 + 1", 3, "no solution line"),
        (GOOD_PLAIN + "\nEvaluate: 1 + 1\n<think> </think>\n", 4, "Final Result"),
        (GOOD_PLAIN + "\nEvaluate: 1 + 1\n" + GOOD_PLAIN, 4, "no <think>"),
        ("Expression now: 1 - 2\n", 1, "neither"),
        ("Step 1\n", 1, "no solution line"),
        (GOOD_JSON + "\n\ufeff" + GOOD_JSON, 2, "neither"),  # at the beginning it may be
        (GOOD_JSON.encode() + b"\n\xff\xfe\n", 2, "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, line, reason):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        list(read_corpus(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_a_directory_and_an_empty_file(tmp_path):
    (tmp_path / "empty").touch()
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "empty"):
        with pytest.raises(UserError, match=str(path)):
            read_corpus(path)


def test_problems_are_all_but_the_rewritings(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(f"{GOOD_JSON}\n{json.dumps(REWRITING)}\n{GOOD_JSON}\n")
    assert len([*read_corpus(path)]) == 3
    assert [json_line(problem) for problem in read_problems(path)] == [GOOD_JSON + "\n"] * 2
    path.write_text(json.dumps(REWRITING) + "\n")
    with pytest.raises(UserError, match="rewritings alone and no problem; lower --rewrite-rate"):
        read_problems(path)


def test_windows_line_ends_are_read(tmp_path):
    (tmp_path / "corpus.txt").write_bytes((GOOD_PLAIN + "\n").replace("\n", "\r\n").encode())
    (record,) = read_corpus(tmp_path / "corpus.txt")
    assert plain_lines(record) == GOOD_PLAIN + "\n"
