"""The report of a pipeline, from files as the stages leave them."""

import json
import re
import subprocess
import sys

import pytest
from browser import look_at
from helpers import ROOT, evaluation, load_script, write_run

from arithmetic_llm.config import QuickstartConfig
from arithmetic_llm.evaluation.html_report import (
    WORST,
    StageRecord,
    missing_pictures,
    worst_mistakes,
    write_report,
)
from arithmetic_llm.task.problem import problem_from
from arithmetic_llm.task.verifier import verify

EXPRESSION = "(1 + 2) - (3 + 4)"
RIGHT = [
    "Step 1: 1 + 2 = 3 Expression now: 3 - (3 + 4)",
    "Step 2: 3 + 4 = 7 Expression now: 3 - 7",
    "Step 3: 3 - 7 = -4 Expression now: -4",
    "</think> Final Result: -4",
]
SLIP = [*RIGHT[:1], "Step 2: 3 + 4 = 8 Expression now: 3 - 8"]
SLIP += ["Step 3: 3 - 8 = -5 Expression now: -5", "</think> Final Result: -5"]


def sample(expression, text, cut_off=False):
    """An entry of sample_outputs_*.json."""
    verdict = verify(expression, text, cut_off)
    return {
        "expression": problem_from(expression).expression,
        "ground_truth": verdict.answer,
        "predicted": verdict.predicted,
        "generated_text": text,
        "correct": verdict.correct,
        "cut_off": cut_off,
        "valid_steps": verdict.valid_steps,
        "needed_steps": verdict.needed_steps,
    }


def stages(folder, samples, **settings):
    """A training stage and the evaluation of its model, with such outputs."""
    (folder / "models").mkdir(parents=True)
    run = write_run(folder / "models" / "sft_1")
    said = {
        **{"model_path": f"{run}/best_model.pt", "step": 5, "temperature": 0, "test_file": "t"},
        **{"versions": {"torch": "9.9"}, "device": "cpu", "precision": "float32", "threads": 1},
        **settings,
    }
    wrong = sum(not entry["correct"] for entry in samples)
    metrics = evaluation([50, 60], errors={"arithmetic": wrong} if wrong else {})
    rates = {"parse_success_rate": 99.0, "step_validity_rate": 88.0}
    metrics["by_depth"] = [row | rates for row in metrics["by_depth"]]
    metrics |= {"low": 40.0, "high": 60.0, "exact_match_accuracy": 50.0, **rates}
    metrics |= {"total_samples": len(samples), "correct_samples": len(samples) - wrong}
    metrics |= {"trained_depths": {"samples": 0}, "beyond_context": 0, "settings": said}
    metrics |= {"near_ties": {"samples": 0}}
    file = folder / "evaluation_metrics_1.json"
    file.write_text(json.dumps(metrics))
    (folder / "sample_outputs_1.json").write_text(json.dumps(samples))
    return [
        StageRecord("4 instruction model", "python train.py 'a b'", 12.3, None),
        StageRecord("4.1 its evaluation", "python evaluate.py", 4.5, file),
    ]


def report(folder, samples, **settings):
    """The page of such outputs."""
    output, recipe = folder / "new" / "report.html", folder / "recipe"
    recipe.mkdir()
    (recipe / "lora.json").write_text('{"lora_rank": 77}')
    write_report(stages(folder, samples, **settings), "python all.py", str(recipe), str(output))
    return output


@pytest.fixture
def unillustrated(monkeypatch):
    """Pictures take most of the time, and most tests are not about them."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def test_an_error_is_a_worked_trace_with_the_first_wrong_step_marked(tmp_path, unillustrated):
    seen = look_at(report(tmp_path, [sample(EXPRESSION, " ".join(SLIP))]))
    assert seen.complaints == []
    (trace,) = seen.all("div", "worked")
    assert "the model: -5, exact: -4; 1 of 3 steps right before the first error" in trace.text
    lines = [line for line in seen.all("li") if line.classes]
    assert [(line.classes, line.text.strip()) for line in lines] == [
        (["right"], f"{SLIP[0]} ✓"),
        (["wrong", "first"], f"{SLIP[1]} ✗ wrong result"),
        (["instead"], f"right here: {RIGHT[1]}"),
        (["right"], f"{SLIP[2]} ✓"),
        (["wrong"], f"{SLIP[3]} ✗ it follows from the steps; the exact result is -4"),
    ]


def test_a_report_without_errors(tmp_path):
    page = report(tmp_path, [sample(EXPRESSION, " ".join(RIGHT))]).read_text()
    assert "4 instruction model: 0 wrong of 1</h3>" in page
    assert 'class="worked"' not in page
    assert page.count("<img ") == 2


def test_thousands_of_hopeless_texts_make_a_page_that_can_be_read(tmp_path, unillustrated):
    texts = ["<think>" * 900, "Step 1: " * 400, "", f"{RIGHT[0]} " + "Step 2: 1 " * 400]
    samples = [sample(EXPRESSION, text, cut_off=True) for text in texts]
    page = report(tmp_path, samples * 1000).read_text()
    assert "4,000 wrong of 4,000" in page
    assert page.count('class="worked"') == WORST
    text = re.sub('data:image[^"]*', "", page)
    assert 6_000 < len(text) < 9_000


def test_a_number_that_was_cut_off_is_judged_as_the_evaluation_judges_it(tmp_path, unillustrated):
    """The units come first: what reads 1 might have become 41, and is no error."""
    half = f"{RIGHT[0]} Step 2: 3 + 4 = 1"
    page = report(tmp_path, [sample(EXPRESSION, half, cut_off=True)]).read_text()
    assert "steps right before the first error (cut_off)" in page


def test_the_worst_of_errors_come_first(tmp_path):
    late = " ".join([*RIGHT[:2], "Step 3: 3 - 7 = 4 Expression now: 4 </think> Final Result: 4"])
    short = "Step 1: 1 + 2 = 4 Expression now: 4 </think> Final Result: 4"
    first = f"{RIGHT[0].replace('= 3', '= 5')} </think> Final Result: 5"
    samples = [sample(EXPRESSION, late), sample(EXPRESSION, " ".join(RIGHT))]
    samples += [sample(EXPRESSION, first), sample("1 + 2", short), sample(EXPRESSION, late)]
    found = worst_mistakes(samples)
    assert found == [samples[3], samples[2], samples[0]]


def test_texts_are_no_part_of_the_page(tmp_path, unillustrated):
    """What a user or a model wrote is shown and never run."""
    evil = "1 + <script>alert(1)</script>"
    page = report(tmp_path, [sample(evil, f"{evil} & <b>", cut_off=True)], test_file=evil)
    assert "<script" not in page.read_text()
    seen = look_at(page)
    assert evil in seen.all("code")[0].text
    assert not seen.all("b")


def test_the_report_has_what_is_needed_to_repeat_it(tmp_path, unillustrated):
    told = {"weights_hash": "abc123", "sha256": "def456"}
    page = report(tmp_path, [sample(EXPRESSION, " ".join(RIGHT))], **told).read_text()
    for text in (
        "python all.py",
        "python train.py &#x27;a b&#x27;",
        "python evaluate.py",
        "&quot;lora_rank&quot;: 77}",
    ):
        assert f"{text}\n" in page or f"{text}<" in page
    for text in ("abc123", "def456", "9.9", "cpu, float32, 1 threads", "12", "17"):
        assert f">{text}</td>" in page, text


def test_without_matplotlib_the_report_has_no_pictures_and_says_why(tmp_path, monkeypatch):
    assert missing_pictures() == ""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = report(tmp_path, [sample(EXPRESSION, " ".join(SLIP))]).read_text()
    assert missing_pictures() == "pictures need matplotlib; pip install -r requirements-extras.txt"
    assert "<img " not in page
    assert page.count(missing_pictures()) == 2
    assert 'class="worked"' in page


def test_a_quickstart_without_matplotlib_says_so_in_one_line(
    tmp_path, unillustrated, monkeypatch, capsys
):
    done = stages(tmp_path, [sample(EXPRESSION, " ".join(RIGHT))])
    monkeypatch.chdir(tmp_path)
    values = [(each.name, each.command, each.seconds, each.metrics_file) for each in done]
    load_script("quickstart.py").finish(values, QuickstartConfig(recipe="recipe"))
    said = capsys.readouterr()
    assert said.err == f"note: the report has no pictures: {missing_pictures()}\n"
    assert "in a browser: evaluation_results/report.html\n" in said.out
    assert "<img " not in (tmp_path / "evaluation_results" / "report.html").read_text()


@pytest.mark.parametrize("module", ["html_report", "marks"])
def test_a_report_needs_neither_torch_nor_matplotlib(module):
    code = f"import sys, arithmetic_llm.evaluation.{module}\n"
    code += 'assert not {"torch", "numpy", "matplotlib", "tokenizers"} & sys.modules.keys()'
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
