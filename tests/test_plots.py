"""Pictures of runs and evaluations: the data of each panel, the files, and what is refused."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from helpers import ROOT, RUN_LINES, call, evaluation, row, write_run

from arithmetic_llm.evaluation import panels, plots
from arithmetic_llm.evaluation.panels import MINUTES, STEPS, TOKENS

GRPO = {
    **{"reward": 0.7, "rewards/correct": 0.5, "rewards/format": 0.9, "accuracy": 0.5},
    **{"frac_reward_zero_std": 0.25, "completions/mean_length": 80.0, "kl": 0.01},
    **{"completions/clipped_ratio": 0.125, "entropy": 0.2, "grad_norm": 3.0},
}


def shown(*folders):
    """Panels of some runs by title and axis."""
    groups = panels.grouped([panels.read_run(folder) for folder in folders])
    return {(panel.title, panel.x_label): panel for panel in panels.run_panels(groups)}


# -------------------------------------------------------------------------------- training runs


def test_tokens_and_minutes_are_added_up_from_seconds_a_step(tmp_path):
    found = shown(write_run(tmp_path / "a"))
    (line,) = found["training loss (GRPO: surrogate)", MINUTES].lines
    assert (line.x, line.y) == ([1.0, 3.0], [2.0, 1.0])
    (line,) = found["training loss (GRPO: surrogate)", TOKENS].lines
    assert line.x == pytest.approx([0.06, 0.12])
    (line,) = found["held-out exact match", MINUTES].lines
    assert (line.x, line.y) == ([0.0, 2.0], [0.0, 50.0])  # halfway between two lines
    (line,) = found["held-out loss", TOKENS].lines
    assert line.x == pytest.approx([0.0, 0.09])
    (line,) = found["learning rate", STEPS].lines
    assert (line.x, line.y) == ([10, 20], [0.1, 0.2])
    assert len(found) == 7  # nothing of GRPO's, no gradient norm


def test_a_validation_after_the_last_line_stands_where_that_does(tmp_path):
    lines = [*RUN_LINES, {"step": 25, "eval_exact": 1.0}]
    (line,) = shown(write_run(tmp_path / "a", lines))["held-out exact match", MINUTES].lines
    assert line.x[-1] == 3.0


def test_older_runs_are_shown_against_steps_and_all_others_with_them(tmp_path):
    old = [{k: v for k, v in line.items() if k != "seconds"} for line in RUN_LINES]
    found = shown(write_run(tmp_path / "new"), write_run(tmp_path / "old", old))
    assert {axis for _, axis in found} == {STEPS}
    assert [line.x for line in found["held-out loss", STEPS].lines] == [[0, 15]] * 2


def test_older_grpo_runs_tell_the_seconds_of_their_parts(tmp_path):
    parts = {"seconds_generating": 4.0, "seconds_training": 2.0, "tokens_per_second": 100}
    lines = [{"step": 10, "loss": -0.1, **parts}, {"step": 20, "loss": 0.1, **parts}]
    (line,) = shown(write_run(tmp_path / "a", lines))["training loss (GRPO: surrogate)", MINUTES][4]
    assert line.x == [1.0, 2.0]


def test_grpo_has_its_panels(tmp_path):
    exact = {"eval_exact": 0.5, "eval_reward": 0.6}
    exact |= {"eval_exact_depth_2": 0.75, "eval_exact_depth_10": 0.25, "eval_exact_invalid": 1.0}
    lines = [{"step": 0, **exact}, {**RUN_LINES[1], **GRPO}]
    found = shown(write_run(tmp_path / "a", lines))
    values = {title: {x.part: x.y for x in panel.lines} for (title, _), panel in found.items()}
    assert values["reward by part"] == {"reward": [0.7], "correct": [0.5], "format": [0.9]}
    by_depth = {"depth 2": [75.0], "depth 10": [25.0], "invalid": [100.0]}
    assert values["held-out exact match by depth"] == by_depth
    single = {title: y for title, parts in values.items() for (y,) in parts.values()}
    assert single["dead groups"] == 25
    assert single["length of attempts"] == 80
    assert single["attempts cut off"] == 12.5
    assert single["right attempts"] == 50
    assert single["entropy"] == 0.2
    assert single["KL divergence to the start"] == 0.01
    assert single["gradient before clipping"] == 3
    assert single["held-out reward"] == 0.6


def test_losses_are_on_a_log_scale_unless_one_is_negative(tmp_path):
    title = ("training loss (GRPO: surrogate)", TOKENS)
    assert shown(write_run(tmp_path / "a"))[title].log
    assert not shown(write_run(tmp_path / "b", [{**RUN_LINES[1], "loss": -1.0}]))[title].log


def test_runs_that_differ_only_in_the_seed_are_one_band(tmp_path):
    folders = []
    for seed, loss, folder in ((1, 1.0, "m"), (2, 5.0, "n")):
        lines = [{**RUN_LINES[1], "loss": loss, "seconds": 6.0 * seed}, RUN_LINES[3]]
        lines = lines[: 3 - seed]  # the second run has ended early
        run = write_run(tmp_path / folder, lines, seed=seed, rate=0.1, output_dir=folder)
        folders.append(run)
    folders.append(write_run(tmp_path / "other", rate=0.2, seed=3))
    groups = panels.grouped([panels.read_run(folder) for folder in folders])
    assert [len(group) for group in groups] == [2, 1]
    assert panels.group_names(groups) == [
        "m and others: seeds 1, 2 (mean, min to max)",
        "other",
    ]
    band, line = shown(*folders)["training loss (GRPO: surrogate)", MINUTES].lines
    assert (band.x, band.y, band.low, band.high) == ([1.5], [3.0], [1.0], [5.0])
    assert line.low == line.y == line.high == [2.0, 1.0]


def test_a_length_limit_that_was_measured_is_no_other_setting(tmp_path):
    """GRPO's default, on prompts that the seed has drawn."""
    limits = {"a": 250, "b": 253, "c": 247, "d": 300}
    runs = [
        panels.read_run(write_run(tmp_path / name, seed=ord(name), max_gen_length=limit))
        for name, limit in limits.items()
    ]
    assert [len(group) for group in panels.grouped(runs)] == [3, 1]


@pytest.mark.parametrize("others", [{"seed": 1}, {"seed": 2, "rate": 0.2}, {}])
def test_no_band_of_the_same_seed_of_other_settings_or_of_none(tmp_path, others):
    settings = {"seed": 1, "rate": 0.1}
    first = write_run(tmp_path / "a", **(settings if others else {}))
    second = write_run(tmp_path / "b", **({**settings, **others} if others else {}))
    assert len(panels.grouped([panels.read_run(first), panels.read_run(second)])) == 2


def test_runs_of_the_same_name_are_named_by_their_paths():
    assert panels.short_names(["m/a/run", "m/b/run", "m/c"]) == ["m/a/run", "m/b/run", "c"]


def test_what_is_no_number_is_passed_over(tmp_path):
    values = [None, "1", True, float("nan"), 10**400, [1], 0.5]
    lines = [{**RUN_LINES[1], "step": i, "grad_norm": v} for i, v in enumerate(values)]
    (line,) = shown(write_run(tmp_path / "a", lines))["gradient before clipping", STEPS].lines
    assert (line.x, line.y) == ([6], [0.5])


def test_a_line_that_a_kill_left_unfinished_is_passed_over(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    assert len(panels.read_run(folder).lines) == len(RUN_LINES)


# ---------------------------------------------------------------------------------- evaluations


def evaluations(tmp_path, *metrics):
    files = [tmp_path / f"evaluation_metrics_{i}.json" for i in range(len(metrics))]
    for file, content in zip(files, metrics, strict=True):
        file.write_text(json.dumps(content))
    return [*map(str, files)]


def test_accuracies_of_models_side_by_side(tmp_path):
    more = {"by_terms": [{"terms": 7, **row(30), "trained": False}]}
    more["invalid"] = {**row(20), "trained": None}
    both = evaluation([90, 50]), evaluation([80] * 10, trained=False, **more)
    found = [panels.read_evaluation(file) for file in evaluations(tmp_path, *both)]
    accuracies = panels.accuracies(found)
    depths = [f"depth {depth}" for depth in range(1, 11)]
    assert accuracies.rows == [*depths, "7 terms", "invalid"]
    first, second = accuracies.points
    assert first == [(0, 90, 85, 95, True), (1, 50, 45, 55, True)]
    assert [point.row for point in second] == [*range(12)]
    assert [point.trained for point in second] == [False] * 11 + [True]
    assert second[10][:4] == (10, 30, 25, 35)


def test_errors_are_shares_of_all_problems_the_most_frequent_kind_first(tmp_path):
    both = (
        evaluation([90], errors={"cut_off": 10, "arithmetic": 4}),
        evaluation([90], errors={"arithmetic": 20}, total_samples=100),
    )
    found = [panels.read_evaluation(file) for file in evaluations(tmp_path, *both)]
    assert panels.error_shares(found) == (["arithmetic", "cut_off"], [[2, 5], [20, 0]])


def test_a_model_that_was_evaluated_twice_is_named_with_the_files(tmp_path):
    files = evaluations(tmp_path, evaluation([9]), evaluation([9]), evaluation([9], model="b.pt"))
    assert panels.evaluation_names([*map(panels.read_evaluation, files)], files) == [
        "sft/best_model.pt (evaluation_metrics_0.json)",
        "sft/best_model.pt (evaluation_metrics_1.json)",
        "b.pt",
    ]


def test_a_model_without_a_file_is_named_by_that_of_its_evaluation(tmp_path):
    (file,) = evaluations(tmp_path, evaluation([9], settings={}))
    assert panels.read_evaluation(file).name == "evaluation_metrics_0"


# ------------------------------------------------------------------------------------- pictures


def is_png(path):
    content = path.read_bytes()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")


def texts_of(path):
    """Texts of an SVG."""
    return {"".join(node.itertext()).strip() for node in ElementTree.parse(path).iter()}


@pytest.fixture
def drawn_runs(tmp_path):
    """Two seeds of one run, and another, with the panels of GRPO."""
    lines = [*RUN_LINES[:1], {**RUN_LINES[1], **GRPO}, *RUN_LINES[2:]]
    lower = [{**line, "loss": line["loss"] / 2} if "loss" in line else line for line in lines]
    return [
        write_run(tmp_path / "a", lines, seed=1),
        write_run(tmp_path / "b", lower, seed=2),
        write_run(tmp_path / "c", lines, seed=1, rate=0.5),
    ]


def test_a_picture_of_runs_holds_its_labels(drawn_runs, tmp_path):
    ended = call("plot_runs.py", *drawn_runs, "--output", tmp_path / "new" / "runs.svg")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"picture in {tmp_path / 'new' / 'runs.svg'}\n"
    texts = texts_of(tmp_path / "new" / "runs.svg")
    expected = {TOKENS, MINUTES, STEPS, "nats a token", "% of groups", "dead groups", "c"}
    assert expected | {"a and others: seeds 1, 2 (mean, min to max)", "correct"} <= texts


def test_the_same_picture_is_the_same_file(tmp_path):
    run = write_run(tmp_path / "a")
    for name in ("1.svg", "2.svg"):
        call("plot_runs.py", run, "--output", tmp_path / name, "--width", 5)
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


def test_a_png_is_as_wide_as_told(tmp_path):
    output, run = tmp_path / "runs.PNG", write_run(tmp_path / "a")
    assert call("plot_runs.py", run, "--width", 6, "--output", output).code == 0
    assert is_png(output)
    assert int.from_bytes(output.read_bytes()[16:20], "big") == 6 * 150


def test_names_that_matplotlib_would_hide_or_set_as_formulas_are_shown_as_they_are(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("_first", "$a_b$ and $c")]
    assert call("plot_runs.py", *runs, "--output", tmp_path / "a.svg").err == ""
    assert {"./_first", "$a_b$ and $c"} <= texts_of(tmp_path / "a.svg")


def test_an_older_run_is_told_of(tmp_path):
    old = [{k: v for k, v in line.items() if k != "seconds"} for line in RUN_LINES]
    ended = call("plot_runs.py", write_run(tmp_path / "old", old), "--output", tmp_path / "a.svg")
    assert ended.code == 0
    assert re.fullmatch(rf"note: {tmp_path / 'old'}: .* steps are shown\n", ended.err)


def test_a_picture_of_evaluations_holds_its_labels(tmp_path):
    errors = {"arithmetic": 5, "wrong_copy": 1}
    old = evaluation([90, 50], errors=errors)
    new = evaluation([95, 70, 10], trained=False, model="grpo/final_model.pt")
    files = evaluations(tmp_path, old, new)
    ended = call("plot_evaluation.py", *files, "--output", tmp_path / "models.svg")
    assert (ended.code, ended.err) == (0, "")
    texts = texts_of(tmp_path / "models.svg")
    assert {"A: sft/best_model.pt", "B: grpo/final_model.pt", "depth 3", *errors} <= texts
    assert {plots.UNTRAINED, "% of problems, 95 % interval", "% of problems"} <= texts


def test_many_rows_and_no_errors_are_no_trouble(tmp_path):
    more = {"by_terms": [{"terms": n, **row(50), "trained": True} for n in range(2, 200)]}
    (file,) = evaluations(tmp_path, evaluation([90], **more))
    assert call("plot_evaluation.py", file, "--output", tmp_path / "a.svg").code == 0
    texts = texts_of(tmp_path / "a.svg")
    assert "no errors" in texts
    assert plots.UNTRAINED not in texts
    assert sum(text.endswith(" terms") for text in texts) < 12


def test_error_bars_are_the_interval_and_hollow_is_untrained():
    points = [[panels.Point(0, 90, 80, 95, True)], [panels.Point(0, 50, 45, 60, False)]]
    data = panels.Accuracies(["depth 1"], points), panels.ErrorShares([], [[], []])
    axes = plots.draw_evaluations(*data, ["a", "b"], 12).axes[0]
    bars = [bar.get_segments()[0][:, 1].tolist() for bar in axes.collections]
    assert bars == [[80, 95], [45, 60]]
    dots = [line for line in axes.lines if line.get_marker() in plots.MARKERS]
    assert [dot.get_ydata()[0] for dot in dots] == [90, 50]
    assert [dot.get_markerfacecolor() for dot in dots] == [plots.COLOURS[0], "white"]


@pytest.mark.parametrize(
    ("unit", "ys", "whole"),
    [("% of x", [0, 0], True), ("% of x", [99, 98], False), ("tokens", [5, 5], False)],
)
def test_a_flat_line_of_percents_is_shown_between_0_and_100(unit, ys, whole):
    panel = panels.Panel("t", STEPS, unit, False, [panels.Line(0, "x", [1, 2], ys, ys, ys)])
    (axes,) = plots.draw_runs([panel], ["a"], 12).axes
    assert (axes.get_ylim() == (-3, 103)) is whole


def test_groups_differ_in_colour_and_style_and_parts_in_markers():
    lines = [
        panels.Line(group, part, [1, 2], [3, 4], [2, 4], [4, 5])
        for group in (0, 1)
        for part in ("x", "y")
    ]
    panel = panels.Panel("t", STEPS, "u", False, lines)
    (axes,) = plots.draw_runs([panel], ["a", "b"], 12).axes
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines]
    blue, red = plots.COLOURS[:2]
    assert looks == [(blue, "-", "o"), (blue, "-", "s"), (red, "--", "o"), (red, "--", "s")]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band.tolist()} == {(1, 2), (1, 4), (2, 4), (2, 5)}


# ------------------------------------------------------------------------------- what is refused


def refused(*argv):
    ended = call(*argv)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    return ended.err


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.gz", ".svg"])
def test_a_picture_of_another_kind_is_refused_first(tmp_path, name):
    for script in ("plot_runs.py", "plot_evaluation.py"):
        text = refused(script, "missing", "--output", tmp_path / name)
        assert text == f"error: {tmp_path / name}: the name of a picture ends in .png or .svg\n"


def test_without_runs_or_output_the_line_says_what_is_missing():
    assert refused("plot_runs.py", "x") == "error: --output is required; see --help\n"
    assert "RUN is required" in refused("plot_runs.py", "--output", "a.png")
    assert "METRICS is required" in refused("plot_evaluation.py", "--output", "a.png")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "is no run folder, it has no metrics.jsonl"),
        ([], "no line of a run"),
        ([{"step": 1, "rollouts": []}, {"step": -1, "loss": 1.0}], "no line of a run"),
        ([{"step": 1, "loss": "x"}], "no line of a run"),
    ],
)
def test_a_folder_without_figures_is_refused(tmp_path, lines, message):
    folder = write_run(tmp_path / "a", lines or [])
    if lines is None:
        (tmp_path / "a" / "metrics.jsonl").unlink()
    text = refused("plot_runs.py", folder, "--output", tmp_path / "a.png")
    assert message in text
    assert folder in text
    assert not (tmp_path / "a.png").exists()


def test_seeds_without_a_step_in_common_are_refused(tmp_path):
    runs = [
        write_run(tmp_path / str(seed), [{**RUN_LINES[1], "step": seed}], seed=seed)
        for seed in (1, 2)
    ]
    assert "no step in common" in refused("plot_runs.py", *runs, "--output", tmp_path / "a.png")


@pytest.mark.parametrize(
    "change",
    [
        {"by_depth": None},
        {"by_depth": [{"depth": 1}]},
        {"by_depth": [{"depth": 1, **row(50), "low": "x", "trained": True}]},
        {"by_terms": [5]},
        {"invalid": 5},
        {"errors": {"cut_off": "many"}},
        {"total_samples": None},
        {"settings": 5},
    ],
)
def test_a_file_that_is_no_evaluation_is_refused(tmp_path, change):
    (file,) = evaluations(tmp_path, evaluation([50], **change))
    text = refused("plot_evaluation.py", file, "--output", tmp_path / "a.png")
    assert text.startswith(f"error: {file}: no evaluation_metrics_*.json of an evaluation (")


def test_without_matplotlib_the_line_says_what_to_install(drawn_runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = refused("plot_runs.py", drawn_runs[0], "--output", tmp_path / "a.png")
    assert text == "error: pictures need matplotlib; pip install -r requirements-extras.txt\n"


def test_the_data_of_pictures_need_neither_torch_nor_matplotlib():
    code = """
import sys
import arithmetic_llm.evaluation.panels, arithmetic_llm.evaluation.plots
assert not {"torch", "numpy", "matplotlib", "tokenizers"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
