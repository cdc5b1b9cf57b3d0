"""What a corpus covers: from its sidecar, or from its text alone; and over two stages."""

import json
from dataclasses import replace
from random import Random

import pytest
from helpers import ROOT, call, records

from arithmetic_llm.config import MAX_DEPTH, MAX_FLAT_TERMS
from arithmetic_llm.corpus.coverage import Coverage, coverage_of, from_dict, survey, to_dict
from arithmetic_llm.corpus.draw import distinct_samples as draw_test_set
from arithmetic_llm.corpus.files import json_line, read_corpus
from arithmetic_llm.corpus.record import rewriting, solved
from arithmetic_llm.corpus.trees import exact_tree, write
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.expression import parse
from arithmetic_llm.task.problem import problem_from
from arithmetic_llm.task.solution import solve


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of trees and flat sums; drills would look like trees of depth 1."""
    path = tmp_path_factory.mktemp("corpus") / "c.txt"
    made = call(
        "generate_instruction_corpus_mixed.py",
        *("--num-samples", 300, "--max-depth", 3, "--num-range", -9, 9, "--invalid-rate", 0.1),
        *("--flat-rate", 0.2, "--flat-terms", 6, "--typed-rate", 0, "--output-mixed", path),
    )
    assert made.code == 0
    return path


def test_the_sidecar_and_the_text_tell_the_same(corpus, tmp_path):
    bare = tmp_path / "bare.txt"
    bare.write_bytes(corpus.read_bytes())
    told, read = coverage_of(corpus), coverage_of(bare)
    assert told.styles["invalid"] == read.styles["invalid"] == 30
    assert told.depths == read.depths == (1, 2, 3)
    # A flat sum of two numbers is, by its text, a tree of depth 1.
    assert {*told.flat_terms} - {2} == {*read.flat_terms} == {3, 4, 5, 6}
    assert told.num_range == read.num_range == (-9, 9)
    assert told.splits == read.splits == {"train": 300}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_foundational_corpus_needs_no_sidecar_for_its_held_out_problems(tmp_path, capsys, seed):
    made = call(
        "generate_foundational_plaintext.py",
        *("--num-samples", 3000, "--max-depth", 4, "--invalid-rate", 0.05, "--seed", seed),
        *("--output-txt", tmp_path / "c.txt"),
    )
    assert made.code == 0
    told = coverage_of(tmp_path / "c.txt")
    assert capsys.readouterr().out == ""
    (tmp_path / "c.txt.meta.json").unlink()
    read = coverage_of(tmp_path / "c.txt")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'c.txt.meta.json'}: is missing; ")
    assert (read.num_range, read.depths, read.flat_terms) == ((1, 20), (1, 2, 3, 4), ())
    assert read.num_range == told.num_range
    assert read.depths == told.depths
    assert {*read.styles} == {*told.styles} == {"nested", "typed", "padded", "drill", "invalid"}
    assert read.splits == told.splits
    assert read.held_out_spec() == told.held_out_spec()
    # Only what spells alike is lost: small drills, and typed trees that need all their parentheses.
    assert read.styles["padded"] == told.styles["padded"]
    assert read.styles["invalid"] == told.styles["invalid"]
    assert 0.35 * told.styles["drill"] < read.styles["drill"] < told.styles["drill"]


def test_of_a_recipes_corpus_only_its_two_ranges_are_one_without_a_sidecar(tmp_path):
    made = call(
        "generate_foundational_plaintext.py",
        *("--config", ROOT / "configs" / "cpu" / "foundational_corpus.json"),
        *("--num-samples", 3000, "--output-txt", tmp_path / "c.txt"),
    )
    assert made.code == 0
    told = coverage_of(tmp_path / "c.txt")
    (tmp_path / "c.txt.meta.json").unlink()
    read = coverage_of(tmp_path / "c.txt")
    assert (told.num_range, told.wide_range, read.wide_range) == ((1, 20), (-999, 999), None)
    assert -999 <= read.num_range[0] < -900 < 900 < read.num_range[1] <= 999
    assert (read.depths, read.splits) == (told.depths, told.splits)
    assert {*read.styles} == {*told.styles}


@pytest.mark.parametrize(
    ("texts", "styles", "depths", "flat_terms", "num_range"),
    [
        # Depth 1 alone, and drills alone, which look the same.
        (["1 + 2", "9 - 4"], {"nested": 2}, (1,), (), (1, 9)),
        (["31 - -12", "1 + 2"], {"nested": 2}, (1,), (), (-12, 31)),
        # Beside deeper trees: a drill if beyond their range, unless beyond their results as well.
        (["(1 + 9) - 3", "10 - -2", "2 + 3"], {"nested": 2, "drill": 1}, (1, 2), (), (1, 9)),
        (["(1 + 9) - 3", "19 - 2"], {"nested": 2}, (1, 2), (), (1, 19)),
        (["(1 + 9) - 3", "-18 - 2"], {"nested": 1, "drill": 1}, (2,), (), (1, 9)),
        (["(1 + 9) - 3", "((10 - -2))"], {"nested": 1, "padded": 1}, (1, 2), (), (-2, 10)),
        # Without parentheses: as typed only beside other typed trees, and trees as deep.
        (["1 + 2 + 3", "1 - 2"], {"flat": 2}, (), (2, 3), (1, 3)),
        (["1 + 2 + 3", "(1 - 2) + 3"], {"nested": 1, "flat": 1}, (2,), (3,), (1, 3)),
        (["1 + 2 + 3", "1 - 2 - (3 + 4)"], {"typed": 2}, (2,), (), (1, 4)),
        (["1 + 2 + 3 + 4", "1 - 2 - (3 + 4)"], {"typed": 1, "flat": 1}, (2,), (4,), (1, 4)),
        (["1 + 2 + 3", "2 - -3"], {"flat": 1, "drill": 1}, (), (3,), (1, 3)),
        # By hand: some parentheses kept and some dropped; spaces and lone numbers change nothing.
        (["(1 + 2) + 3 - 4"], {"typed": 1}, (3,), (), (1, 4)),
        (["((1 + 2)) - 3", "(1 - (2 + 3))"], {"padded": 2}, (2,), (), (1, 3)),
        (["(1+2)-(3)", "1-( 2+3 )"], {"nested": 2}, (2,), (), (1, 3)),
        # Deeper than all that is nested: a chain, which is of no depth.
        (["(1 + 2) - 3", "1 - (2 + 3) + 4"], {"nested": 1, "chain": 1}, (2,), (), (1, 4)),
        (["1 - ((2 + 3) - 4)", "1 - (2 + 3) + 4"], {"nested": 1, "typed": 1}, (3,), (), (1, 4)),
        (["7", "12"], {"nested": 2}, (0,), (), (7, 12)),
        (["1 +", "+"], {"invalid": 2}, (), (), (0, 0)),
        ([], {}, (), (), (0, 0)),
    ],
)
def test_what_texts_tell(texts, styles, depths, flat_terms, num_range):
    read = survey(map(solved, texts))
    assert read.styles == styles
    assert (read.depths, read.flat_terms, read.num_range) == (depths, flat_terms, num_range)


@pytest.mark.parametrize("style", ["nested", "typed", "padded"])
def test_styles_are_told_apart_wherever_their_spellings_differ(style):
    rng = Random(3)
    for _ in range(300):
        tree = exact_tree(rng.randint(2, 4), (1, 20), rng)
        texts = {other: write(tree, other, rng) for other in ("nested", "typed", "padded")}
        alone = survey([solved(texts[style])])
        told = "nested" if texts[style] == texts["nested"] else style
        told = "flat" if "(" not in texts[style] else told
        assert alone.styles == {told: 1}


def test_held_out_problems_keep_to_the_limits_of_the_sampler():
    covered = survey(map(solved, ["1 + 2", "(1 - 2) + 3"]))
    assert not covered.exceeds_sampler
    assert replace(covered, flat_terms=(3, 999)).held_out_spec().flat_terms == MAX_FLAT_TERMS
    for depths, limits in (((1, 60), (1, MAX_DEPTH)), ((60,), (MAX_DEPTH,) * 2), ((0,), (1, 1))):
        beyond = replace(covered, depths=depths)
        spec = beyond.held_out_spec()
        assert (spec.min_depth, spec.max_depth) == limits
        assert beyond.exceeds_sampler
    huge = survey([solved(f"1 - {10**300}")])
    assert huge.held_out_spec().num_range == (1, 10**100)
    assert huge.exceeds_sampler


def chain(depth: int) -> str:
    """A left-nested chain of ones and twos."""
    return "(" * (depth - 1) + "1 + 2" + "".join(f") - {1 + n % 2}" for n in range(depth - 1))


def test_a_corpus_deeper_than_the_sampler_trains(workshop, tmp_path):
    assert parse(chain(60)).depth == 60
    texts = [chain(depth) for depth in (1, 2, 3, 60)] * 8
    (tmp_path / "c.jsonl").write_text("".join(json_line(solved(text)) for text in texts))
    ended = call(
        "run_foundational_training.py",
        *("--corpus-path", tmp_path / "c.jsonl", "--tokenizer-path", workshop / "tokenizer"),
        *("--output-dir", tmp_path / "runs", "--max-steps", 2, "--eval-samples", 20),
        *("--d-model", 32, "--nhead", 2, "--num-layers", 1, "--dim-feedforward", 48),
        *("--threads", 1, "--device", "cpu", "--batch-size", 4),
    )
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if "sampler" in line]
    assert line.startswith(f"{tmp_path / 'c.jsonl'}: ")
    assert f"depths 1 to {MAX_DEPTH}" in line


def test_a_sidecar_of_another_file_is_not_believed(corpus, tmp_path, capsys):
    path = tmp_path / "c.txt"
    lines = corpus.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:50]))
    meta = json.loads((corpus.parent / "c.txt.meta.json").read_text())
    (tmp_path / "c.txt.meta.json").write_text(json.dumps(meta))
    assert sum(coverage_of(path).splits.values()) == 50
    assert "does not describe" in capsys.readouterr().out


def test_held_out_problems_are_like_those_of_the_corpus(corpus):
    spec = coverage_of(corpus).held_out_spec()
    samples = draw_test_set(spec, 60, 0, "validation")
    assert {sample.depth for sample in samples} == {1, 2, 3}
    assert {sample.style for sample in samples} == {"nested"}
    assert spec.num_range == (-9, 9)


@pytest.mark.parametrize("style", ["flat", "chain", "invalid"])
def test_a_corpus_without_trees_is_judged_on_what_it_has(style):
    rates = {"typed_rate": 0.0, "padded_rate": 0.0, "drill_rate": 0.0}
    rates |= {"flat_rate": 0.0, "invalid_rate": 0.0} | {f"{style}_rate": 1.0}
    drawn = records(100, flat_terms=5, **rates)
    # "1 + 2" is a tree as well
    without_trees = [r for r in drawn if style != "flat" or r.expression.count(" ") > 2]
    spec = survey(without_trees).held_out_spec()
    if style == "chain":  # by its text it is a typed tree of some depth, unless there are others
        spec = Coverage({"chain": 100}, (), (), (1, 20), {"train": 100}).held_out_spec()
    samples = draw_test_set(spec, 20, 0, "validation")
    assert {sample.style for sample in samples} == {style}


def test_a_corpus_of_chains_is_judged_on_chains_as_long():
    spec = Coverage({"chain": 9}, (), (), (1, 20), {"train": 9}, None, 7).held_out_spec()
    assert (spec.chain_rate, spec.chain_numbers) == (1.0, 7)


EARLIER = Coverage({"nested": 3, "drill": 1}, (1, 2), (), (1, 20), {"train": 4})
LATER = Coverage({"nested": 2, "flat": 5}, (2, 4), (3,), (-5, 9), {"train": 6, "test": 1})


def test_two_stages_have_seen_what_either_has():
    assert EARLIER.merge(LATER) == Coverage(
        styles={"nested": 5, "drill": 1, "flat": 5},
        depths=(1, 2, 4),
        flat_terms=(3,),
        num_range=(-5, 20),
        splits={"train": 10, "test": 1},
    )


def test_a_file_states_a_coverage_in_plain_values():
    said = {
        "styles": {"nested": 2, "flat": 5},
        "depths": [2, 4],
        "flat_terms": [3],
        "num_range": [-5, 9],
        "splits": {"train": 6, "test": 1},
    }
    assert to_dict(LATER) == said
    assert from_dict(said) == LATER
    assert from_dict(to_dict(None)) is None


WIDE = replace(EARLIER, wide_range=(-99, 99))


def test_wide_numbers_are_covered_drawn_and_stated():
    assert from_dict(to_dict(WIDE)) == WIDE
    assert EARLIER.merge(WIDE).wide_range == WIDE.merge(LATER).wide_range == (-99, 99)
    assert WIDE.merge(replace(LATER, wide_range=(-5, 300))).wide_range == (-99, 300)
    for text, seen in (("1 + 20", True), ("-99 - 99", True), ("1 - 100", False)):
        assert WIDE.covers(problem_from(text)) == seen
    assert not EARLIER.covers(problem_from("-99 - 99"))
    assert (WIDE.held_out_spec().wide_rate, WIDE.held_out_spec().wide_range) == (0.5, (-99, 99))
    assert EARLIER.held_out_spec().wide_rate == 0


def test_chains_are_covered_as_long_and_as_nested_as_they_were():
    seen = replace(EARLIER, styles={"nested": 3, "chain": 2}, depths=(1, 2, 3), chain_numbers=6)
    assert from_dict(to_dict(seen)) == seen
    assert EARLIER.merge(seen).chain_numbers == seen.merge(EARLIER).chain_numbers == 6
    for text, covered in (
        ("1 + (2 - 3) + 4 + 5 - 6", True),
        ("1 + (2 - 3) + 4 + 5 - 6 + 7", False),  # seven numbers
        ("1 + (2 - (3 + 4)) + 5", True),
        ("1 + (2 - (3 + (4 - 5)))", False),  # depth 4
        ("1 + 2 + 3 + 4 + 5", False),  # a flat sum
        ("1 + (2 - 3) + 4 + 5 - 21", False),
    ):
        assert seen.covers(problem_from(text)) == covered, text
    assert not replace(seen, chain_numbers=0).covers(problem_from("1 + (2 - 3) + 4 + 5 - 6"))


def test_ranges_with_a_gap_do_not_cover_it():
    apart = replace(EARLIER, wide_range=(1000, 2000))
    expected = {"5 + 6": True, "1000 - 2000": True, "500 + 600": False, "5 + 1000": False}
    assert {text: apart.covers(problem_from(text)) for text in expected} == expected


def test_a_sidecar_tells_of_wide_numbers_and_chains(tmp_path):
    made = call(
        "generate_instruction_corpus_mixed.py",
        *("--num-samples", 100, "--max-depth", 2, "--wide-rate", 0.2, "--wide-range", -50, 70),
        *("--chain-rate", 0.3, "--chain-numbers", 9, "--output-mixed", tmp_path / "c.txt"),
    )
    assert made.code == 0
    told = coverage_of(tmp_path / "c.txt")
    assert (told.num_range, told.wide_range) == ((1, 20), (-50, 70))
    assert (told.styles["chain"], told.chain_numbers) == (30, 9)
    assert told.depths == (1, 2)


def test_rewritings_are_counted_and_cover_nothing(tmp_path):
    path = tmp_path / "c.txt"
    made = call(
        "generate_foundational_plaintext.py",
        *("--num-samples", 100, "--max-depth", 2, "--rewrite-rate", 0.25, "--rewrite-depth", 3),
        *("--drill-rate", 0, "--output-txt", path),
    )
    assert made.code == 0
    told, read = coverage_of(path), survey(read_corpus(path))
    assert told.styles["rewrite"] == read.styles["rewrite"] == 25
    assert told.depths == read.depths == (1, 2)
    assert not told.covers(problem_from("((1 + 2) - 3) + 4"))
    assert told.held_out_spec().rewrite_rate == 0


def test_a_corpus_of_rewritings_alone_is_refused(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(json_line(rewriting("5 - 4 - 2", solve("5 - 4 - 2"), 2, 2)))
    with pytest.raises(UserError, match=r"c\.jsonl: has rewritings alone"):
        coverage_of(path)


def test_a_coverage_is_limited_to_what_some_expression_has():
    """A flat sum of four numbers is no witness of depth 3, nor a tree of one of sums."""
    whole = Coverage({"nested": 5, "flat": 5}, (1, 2, 3), (2, 3, 4, 5), (1, 9), {"train": 10})
    kept = whole.limited_to(["1 + 2 + 3 + 4", "(1 + 2) - 3", "5 - 6", "1 +"])
    assert (kept.depths, kept.flat_terms) == ((1, 2), (2, 4))
    typed = Coverage({"typed": 5}, (1, 2, 3), (), (1, 9), {"train": 5})
    kept = typed.limited_to(["1 + 2 + 3 + 4"])
    assert (kept.depths, kept.sums) == ((), (4,))
