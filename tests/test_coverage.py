"""What a corpus covers: from its sidecar, or from its text alone; and over two stages."""

import json

import pytest
from helpers import call, records

from arithmetic_llm.corpus import test_set as draw_test_set
from arithmetic_llm.coverage import coverage, merge, survey


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
    told, read = coverage(corpus), coverage(bare)
    assert told.styles["invalid"] == read.styles["invalid"] == 30
    assert told.depths == read.depths == (1, 2, 3)
    # A flat sum of two numbers is, by its text, a tree of depth 1.
    assert {*told.flat_terms} - {2} == {*read.flat_terms} == {3, 4, 5, 6}
    assert told.num_range == read.num_range == (-9, 9)
    assert told.splits == read.splits == {"train": 300}


def test_a_sidecar_of_another_file_is_not_believed(corpus, tmp_path, capsys):
    path = tmp_path / "c.txt"
    lines = corpus.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:50]))
    meta = json.loads((corpus.parent / "c.txt.meta.json").read_text())
    (tmp_path / "c.txt.meta.json").write_text(json.dumps(meta))
    assert sum(coverage(path).splits.values()) == 50
    assert "does not describe" in capsys.readouterr().out


def test_held_out_problems_are_like_those_of_the_corpus(corpus):
    spec = coverage(corpus).held_out_spec()
    samples = draw_test_set(spec, 60, 0, "validation")
    assert {sample.depth for sample in samples} == {1, 2, 3}
    assert {sample.style for sample in samples} == {"nested"}
    assert spec.num_range == (-9, 9)


@pytest.mark.parametrize("style", ["flat", "invalid"])
def test_a_corpus_without_trees_is_judged_on_what_it_has(style):
    rates = {"typed_rate": 0.0, "padded_rate": 0.0, "drill_rate": 0.0}
    rates |= {"flat_rate": 0.0, "invalid_rate": 0.0} | {f"{style}_rate": 1.0}
    drawn = records(100, flat_terms=5, **rates)
    # "1 + 2" is a tree as well
    without_trees = [r for r in drawn if style != "flat" or r.expression.count(" ") > 2]
    spec = survey(without_trees).held_out_spec()
    samples = draw_test_set(spec, 20, 0, "validation")
    assert {sample.style for sample in samples} == {style}


def test_two_stages_have_seen_what_either_has():
    earlier = {
        "styles": {"nested": 3, "drill": 1},
        "depths": [1, 2],
        "flat_terms": [],
        "num_range": [1, 20],
        "splits": {"train": 4},
    }
    later = {
        "styles": {"nested": 2, "flat": 5},
        "depths": [2, 4],
        "flat_terms": [3],
        "num_range": [-5, 9],
        "splits": {"train": 6, "test": 1},
    }
    assert merge(earlier, later) == {
        "styles": {"nested": 5, "drill": 1, "flat": 5},
        "depths": [1, 2, 4],
        "flat_terms": [3],
        "num_range": [-5, 20],
        "splits": {"train": 10, "test": 1},
    }
    assert merge({}, later) == later
