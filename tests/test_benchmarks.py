"""The benchmarks run, each in miniature; how fast anything is here is nobody's business."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
from helpers import ROOT, load_script, records

from arithmetic_llm.model.load import load_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="they read the memory of processes")
SUBJECTS = ("training", "decoding", "evaluation", "grpo", "corpus", "step_time")


@pytest.fixture(scope="module")
def load():
    """A function that loads a benchmark by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield lambda name: load_script(f"benchmarks/{name}.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Where the figures go, and what the benchmarks work on."""
    return tmp_path_factory.mktemp("results")


# -------------------------------------------------------------------------------- in miniature


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject_in_miniature(subject, load, results, capsys):
    arguments = ["--miniature", "--repetitions", "1", "--output-dir", str(results)]
    load(subject).main(arguments)
    found = json.loads((results / f"bench_{subject}.json").read_text())
    assert found["machine"]["versions"]["torch"]
    assert found["rows"]
    printed = capsys.readouterr().out
    for row in found["rows"]:
        assert math.isfinite(row["value"])
        assert row["value"] >= 0
        assert f"| {row['subject']} |" in printed


def test_the_whole_is_run_subject_by_subject_and_ends_with_a_page(load, results, monkeypatch):
    run = load("run")
    assert run.SUBJECTS == SUBJECTS
    asked = []
    monkeypatch.setattr(run, "measure", lambda subject, config: asked.append(subject))
    monkeypatch.setattr(run, "PAGE", results / "page.md")
    monkeypatch.setattr(run, "PICTURE", results / "step_time.png")
    for subject in SUBJECTS:
        as_if_measured(load("common"), results, subject)
    run.PAGE.write_text("before\n<!-- last table -->\nold\n<!-- end -->\nafter\n")
    run.main(["--miniature", "--write-docs", "--output-dir", str(results)])
    assert asked == [*SUBJECTS]
    text = run.PAGE.read_text()
    assert text.startswith("before\n<!-- last table -->\n\nMeasured ")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert text.count("| grpo | 2 s | TRL: 4 s | 2 x | 8 x | no |") == 1
    assert re.search(r"^\| matrix products \| 50 % \| █+ \|$", text, re.MULTILINE)


def as_if_measured(common, results, subject):
    """Write the file of a subject."""
    row = common.Row(subject, "2 s", "TRL: 4 s", 2.0, "x", 8)
    if subject == "step_time":
        row = common.Row("step time: matrix products", "", "", 50.0, "%")
    config = common.BenchConfig(output_dir=str(results))
    common.report(subject, config, lambda _: [row])


def test_the_page_has_a_place_for_the_table():
    text = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert text.index("<!-- last table -->") < text.index("<!-- end -->")


# -------------------------------------------------------------------------------- what is shared


def test_sides_take_turns_and_a_peer_its_best_setting(load):
    common, calls = load("common"), []

    def side(name, rate):
        def measure(brief=False):
            calls.append(name + "?" * brief)
            return rate

        return measure

    peers = {"peer": {"slow": side("slow", 1.0), "fast": side("fast", 2.0)}}
    found = common.compare(side("ours", 5.0), peers, 2)
    assert calls == ["slow?", "fast?", "ours", "fast", "ours", "fast"]
    assert found.settings == {"peer": "fast"}
    assert found.tried == {"peer: slow": 1.0, "peer: fast": 2.0}
    assert found.ratio("peer") == 2.5


def test_the_ratio_is_that_of_the_medians(load):
    found = load("common").Comparison({"ours": [1.0, 9.0, 4.0], "peer": [2.0, 2.0, 99.0]}, {})
    assert found.ratio("peer") == 2.0


@pytest.mark.parametrize(
    ("value", "at_most", "met"),
    [
        (2.0, False, "yes"),
        (3.0, False, "yes"),
        (1.9, False, "no"),
        (2.0, True, "yes"),
        (1.9, True, "yes"),
        (3.0, True, "no"),
    ],
)
def test_a_bar_is_met_from_its_own_side(value, at_most, met, load):
    assert load("common").Row("", "", "", value, bar=2.0, at_most=at_most).met == met
    assert load("common").Row("", "", "", value, at_most=at_most).met == ""


def test_the_memory_is_that_of_the_script_and_not_of_who_runs_it(load, tmp_path):
    common = load("common")
    (tmp_path / "fill.py").write_text("import sys; kept = bytearray(int(sys.argv[1])); print(8)")
    ballast = bytearray(300 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    small, large = (common.run([str(tmp_path / "fill.py"), str(size)]) for size in (1, 100 * 2**20))
    assert small.out.strip() == "8"
    assert small.peak_gib < 0.1
    assert 0 < large.peak_gib - small.peak_gib < 0.15


def test_a_script_that_fails_says_so(load, tmp_path):
    common = load("common")
    (tmp_path / "fail.py").write_text("raise SystemExit('that is why')")
    with pytest.raises(common.UserError, match=r"ended with 1: .*that is why"):
        common.run([str(tmp_path / "fail.py")])


def test_a_package_that_is_missing_is_named(load):
    common = load("common")
    with pytest.raises(common.UserError, match=r"no_such_peer .*requirements-test\.txt"):
        common.need("no_such_peer")


def test_the_speed_of_the_last_tenth_over_the_second(load, tmp_path):
    speeds = [1] * 10 + [8] * 10 + [5] * 70 + [6] * 10
    lines = [{"step": i, "loss": 1.0, "tokens_per_second": s} for i, s in enumerate(speeds)]
    lines.insert(50, {"step": 50, "eval_loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load("whole_quickstart").speed_kept(path) == 0.75


def test_two_processes_that_are_twice_as_fast_have_an_efficiency_of_one(load):
    processes = load("processes")
    rates = {processes.ONE: [90.0, 100.0, 110.0], "two": [150.0, 200.0, 210.0]}
    row = processes.row(rates, "two", 2, 1)
    assert row.value == 2.0
    assert "efficiency 100%" in row.peer
    assert "efficiency 50%" in processes.row(rates, "two", 2, 2).peer


def test_the_speed_of_a_run_is_a_share_of_what_its_products_could_do(
    load, tiny_checkpoint, tmp_path, monkeypatch
):
    """Six operations a token for each weight of a matrix, on a device of 1,000 operations."""
    shutil.copy(tiny_checkpoint, tmp_path / "best_model.pt")
    said = {"stage": "foundational", "tokens_per_second": 50.0, "seconds": 3.0}
    (tmp_path / "training_summary.json").write_text(json.dumps(said))
    (tmp_path / "run.json").write_text('{"device": "cpu"}')
    whole = load("whole_quickstart")
    monkeypatch.setattr(whole, "product_rate", lambda shapes, rows, device: 1000.0)
    model = load_model(tiny_checkpoint).model
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    embedding = model.model.embed_tokens.weight.numel()
    expected = 6 * (weights - embedding) * 50.0 / 1000.0
    assert whole.speed_row(tmp_path).value == pytest.approx(expected)


def test_padding_and_the_first_steps_do_not_count_as_speed(load, tmp_path):
    """Steps of 50 positions each, of which four in five are the corpus's tokens."""
    told = [(1, 1), (1, 1), *[(3, 100), (1, 50)] * 4]  # steps of a line, and their speed
    lines = [
        {"loss": 1.0, "steps": steps, "tokens_per_second": speed, "seconds": 50 / speed}
        for steps, speed in told
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokens = 0.8 * 50 * 18
    assert load("training").rate_of(tmp_path, tokens) == pytest.approx(0.8 * 80)


def test_the_peers_learn_from_the_samples_as_they_are(load, tokenizer):
    training = load("training")
    made = training.TokenisedSamples(records(20), tokenizer, 1024, training.LossWeights(0.5, 3.0))
    inputs, targets, weights = training.padded(made, np.arange(20))
    real = targets != training.PAD
    assert int(real.sum()) == int(made.lengths.sum()) - 20
    last = made.lengths[0] - 1
    assert inputs[0, :last].tolist() == made.ids[:last].tolist()
    assert (weights[~real] == 0).all()
    assert (weights[real] > 0).all()
