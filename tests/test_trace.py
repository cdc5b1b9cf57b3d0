"""The page of one solution: its figures are those of transformers, its marks the verifier's."""

import base64
import json
import re
from contextlib import suppress
from html import unescape

import numpy as np
import pytest
import torch
from browser import find_browser, look_at
from helpers import call, make_tokenizer, of_transformers, random_model
from hypothesis import given
from hypothesis import strategies as st
from oracle import right_answer

from arithmetic_llm.config import ModelConfig
from arithmetic_llm.evaluation import trace as tracing
from arithmetic_llm.evaluation.judge import judge
from arithmetic_llm.evaluation.marks import passages, right_instead
from arithmetic_llm.evaluation.solver import ArithmeticSolver
from arithmetic_llm.evaluation.trace import observed, record_trace, trace_of
from arithmetic_llm.evaluation.trace_page import trace_page
from arithmetic_llm.model.decode import Completion
from arithmetic_llm.model.tokenizer import EOS
from arithmetic_llm.model.transformer import ArithmeticModel, initialise
from arithmetic_llm.task.expression import parse
from arithmetic_llm.task.problem import problem_from
from arithmetic_llm.task.verifier import verify

SCRIPT, EXPRESSION = "show_trace.py", "5 + (10 - 3)"
WRONG = (
    " Step 1: 10 - 3 = 8 Expression now: 5 + 8 Step 2: 5 + 8 = 13 Expression now: 13 "
    "</think> Final Result: 13"
)


def show(model, *argv, output):
    return call(SCRIPT, "--model-path", model, *argv, "--output", output)


@pytest.fixture(scope="module")
def shown(tiny_checkpoint, tmp_path_factory):
    """A page of what a model of random weights writes."""
    page = tmp_path_factory.mktemp("shown") / "trace.html"
    ended = show(tiny_checkpoint, EXPRESSION, "--max-gen-length", 40, output=page)
    assert (ended.code, ended.err, ended.out) == (0, "", f"trace in {page}\n")
    assert "its 3 2 7 is 723" in page.read_text()
    return page


@pytest.fixture(scope="module")
def solver(tiny_model, tokenizer):
    return ArithmeticSolver(tiny_model, tokenizer, max_new_tokens=40)


def written_as(solver, expression, text):
    """The trace of a given text, as if the model had written it."""
    prompt = solver.prompt(expression)
    written = [*solver.tokenizer.encode(text), EOS]
    completion = Completion(written, finish_reason="eos")
    problem = problem_from(expression)
    return trace_of(
        solver, prompt, written, judge(problem, completion, len(prompt), solver.tokenizer, 1536)
    )


# ------------------------------------------------------------------------------- the figures


def attributes(page, name):
    return [float(value) for value in re.findall(rf' data-{name}="([^"]+)"', page)]


def gaze_of(page):
    """Kept places and weights (rows, layers * heads, kept) as the page's script reads them."""
    (said,) = re.findall(r'id="gaze">(.*?)</script>', page)
    said = json.loads(said)
    arrays = [
        np.frombuffer(base64.b64decode(said[name]), kind).reshape(-1, said["heads"], said["kept"])
        for name, kind in (("sources", "<u2"), ("weights", np.uint8))
    ]
    return said["start"], *arrays


@torch.no_grad()
def test_the_figures_are_those_of_transformers(shown, solver):
    page = shown.read_text()
    prompt, written, _ = solver.attempt(EXPRESSION)
    ids = [*prompt, *written]
    theirs = of_transformers(solver.model)(torch.tensor([ids[:-1]]), output_attentions=True)
    of_each = theirs.logits[0, len(prompt) - 1 :].softmax(-1)
    own = of_each.gather(-1, torch.tensor(written)[:, None])[:, 0]
    others = of_each.scatter(-1, torch.tensor(written)[:, None], 0)
    np.testing.assert_allclose(attributes(page, "p"), own, atol=2e-5)
    np.testing.assert_allclose(attributes(page, "q"), others.max(-1).values, atol=2e-5)
    named = re.findall(r"<u><span>(.*?)</span>", page)
    token = solver.tokenizer.token
    assert len(set(named)) > 5
    assert [unescape(text) for text in named] == [
        token(place).replace(" ", "·") for place in others.argmax(-1).tolist()
    ]
    start, places, weights = gaze_of(page)
    assert start == len(prompt)
    rows = torch.cat(theirs.attentions, dim=1)[0, :, len(prompt) - 1 :].transpose(0, 1).numpy()
    kept = weights.shape[-1]
    assert kept == tracing.MOST_KEPT
    largest = -np.sort(-rows, axis=-1)[..., :kept]
    np.testing.assert_allclose(weights / 255, largest, atol=0.51 / 255)
    np.testing.assert_allclose(weights / 255, np.take_along_axis(rows, places, -1), atol=0.51 / 255)


@torch.no_grad()
def test_with_a_window_the_places_are_still_those_of_the_text(monkeypatch):
    """Of what lies behind the window not even a slot is read."""
    monkeypatch.setattr(tracing, "CHUNK", 7)
    model, ids = random_model(50, attention_window=5), torch.randint(50, (30,)).tolist()
    _, gaze = tracing.read_closely(model, ids, last=20, kept=5)
    theirs = of_transformers(model)(torch.tensor([ids]), output_attentions=True).attentions
    rows = torch.cat(theirs, dim=1)[0, :, -20:].transpose(0, 1)  # (places, heads, all places)
    sources = gaze.sources.flatten(1, 2).long()
    torch.testing.assert_close(gaze.weights.flatten(1, 2), rows.gather(-1, sources))
    assert (gaze.weights.sum(-1) > 0.999).all()


def test_text_is_read_in_parts_without_a_difference(solver, monkeypatch):
    whole = record_trace(solver, EXPRESSION)
    monkeypatch.setattr(tracing, "CHUNK", 7)
    parts = record_trace(solver, EXPRESSION)
    torch.testing.assert_close(parts.gaze.weights, whole.gaze.weights, atol=1e-5, rtol=0)
    assert [t.text for t in parts.tokens] == [t.text for t in whole.tokens]
    for one, other in zip(parts.tokens, whole.tokens, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_the_page_says_how_much_attention_it_keeps(solver, monkeypatch):
    monkeypatch.setattr(tracing, "MOST_KEPT", 3)
    trace = record_trace(solver, EXPRESSION)
    covered = trace.gaze.weights.sum(-1).mean()
    assert 0.1 < covered < 0.9
    page = trace_page(trace, "m")
    assert f"keeps the 3 largest attention weights,\n{100 * covered:.1f} % of all" in page


def test_a_model_that_was_watched_is_as_it_was(tiny_model):
    ids, seen = torch.tensor([[2, 7, 8, 9]]), []
    before = tiny_model(ids, tiny_model.new_cache(1))
    with suppress(KeyError), observed(tiny_model, lambda layer, w: seen.append((layer, w))):
        assert torch.equal(tiny_model(ids, tiny_model.new_cache(1)), before)
        raise KeyError
    assert [layer for layer, _ in seen] == [0, 1]
    assert seen[0][1].shape == (1, 2, 4, 4)
    tiny_model(ids, tiny_model.new_cache(1))
    assert len(seen) == 2


def test_a_trace_of_depth_4_is_under_two_megabytes(tokenizer):
    """A full tree with the widest operands, in the documented default shape."""
    tree = "17"
    for _ in range(4):
        tree = f"({tree} + {tree})"
    expression = parse(tree).canonical
    torch.manual_seed(0)
    model = initialise(ArithmeticModel(ModelConfig(), tokenizer.vocab_size))
    trace = written_as(ArithmeticSolver(model, tokenizer), expression, right_answer(expression))
    assert trace.outcome.verdict.trace_correct
    assert len(trace.tokens) > 500
    assert 500_000 < len(trace_page(trace, "m").encode()) < 2_000_000


# ---------------------------------------------------------------------------------- the marks


def test_each_step_has_the_mark_of_the_verifier(solver):
    page = trace_page(written_as(solver, EXPRESSION, WRONG), "m")
    kinds = re.findall(r'<div class="line ([^"]*)"', page)
    assert kinds == ["wrong first", "right", "wrong"]
    marks = re.findall(r'<span class="mark">([^<]*)<', page)
    assert marks == ["✗ wrong result", "✓", "✗ it follows from the steps; the exact result is 12"]
    assert "Right here: Step 1: 10 - 3 = 7 Expression now: 5 + 7<" in page
    assert "✗ Wrong: the exact result is 12." in page
    lines = [re.sub("<i>.*?</i>|<u>.*?</u>|<br>", "", line) for line in page.split("\n")]
    (step,) = [line for line in lines if line.startswith('<div class="line right"')]
    # as the tokens are, the units first
    assert re.sub("<.*?>", "", step) == "Step·2:·5·+·8·=·31·Expression·now:·31✓".replace(
        "Step", "·Step"
    )


@pytest.mark.parametrize(
    ("end", "lines", "last"),
    [
        ("", ["wrong first", "wrong"], '<div class="line wrong"><span class="mark">'),  # 3, or 13?
        (" </think>", ["right", "wrong first"], '<div class="line wrong first"><span class="token'),
    ],
)
def test_what_was_cut_off_is_marked_whether_anything_stands_there_or_not(solver, end, lines, last):
    prompt = solver.prompt("1 + 2")
    written = solver.tokenizer.encode(f" Step 1: 1 + 2 = 3 Expression now: 3{end}")
    completion = Completion(written, finish_reason="length")
    outcome = judge(problem_from("1 + 2"), completion, len(prompt), solver.tokenizer, 1536)
    page = trace_page(trace_of(solver, prompt, written, outcome), "m")
    assert re.findall(r'<div class="line ([^"]*)"', page) == lines
    ending = page[page.index(last) :]
    assert '<span class="mark">✗ cut off; the exact' in ending
    assert end or ending.startswith(
        '<div class="line wrong"><span class="mark">✗ cut off; the exact'
    )


def test_a_right_refusal_is_marked_and_the_reason_told(solver):
    expression = "5 + + 3"
    page = trace_page(written_as(solver, expression, right_answer(expression)), "m")
    assert re.search(r"✓ An invalid expression: .+\. The model refuses it\.", page)
    assert re.findall(r'<div class="line ([^"]*)"', page) == ["right", "right"]


def test_an_invalid_expression_is_answered_and_shown(tiny_checkpoint, tmp_path):
    argv = ["1 < <script>", "--max-gen-length", 5]
    assert show(tiny_checkpoint, *argv, output=tmp_path / "a.html").code == 0
    page = (tmp_path / "a.html").read_text()
    assert "✗ An invalid expression:" in page
    assert "<h1>1 &lt; &lt;script&gt;</h1>" in page
    assert page.count("<script") == 2


WORDS = ["Step 1:", " 1 + 2 = 3", " Expression now: 3", "</think>", " Final Result: 3", " ", "St"]
WORDS += ["Step  2:", "Error: missing operand", "<bos>", "x"]


@given(
    st.lists(st.sampled_from(WORDS)).map("".join), st.booleans(), st.sampled_from(["1 + 2", "+"])
)
def test_every_text_is_cut_into_passages_with_the_verifiers_marks(text, cut_off, expression):
    verdict = verify(expression, text, cut_off)
    found = passages(text, verdict)
    assert "".join(passage.text for passage in found) == text
    wrong = [not step.ok for step in verdict.steps]
    marked = [p.wrong for p in found[:-1] if p.mark]
    assert marked[len(marked) - len(wrong) :] == wrong
    assert found[-1].wrong is (found[-1].first_wrong or not verdict.correct)
    firsts = [place for place, passage in enumerate(found) if passage.first_wrong]
    assert len(firsts) == (not verdict.trace_correct)
    assert all(found[place].wrong for place in firsts)
    assert bool(right_instead(expression, verdict)) is not verdict.trace_correct


# --------------------------------------------------------------------------------- in a browser


OVER = 'dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));'


def test_a_browser_shows_the_page_and_where_each_head_looked(shown):
    hand = 'const at = n => document.querySelector(`[data-at="${n}"]`);'
    start, places, weights = gaze_of(shown.read_text())
    row = 5
    seen = look_at(shown, then=f"{hand} at({start + row}).{OVER}")
    assert seen.complaints == []
    assert seen.one(kind="chosen").attributes["data-at"] == str(start + row)
    tokens = seen.all(kind="token")
    assert len(tokens) == start + len(weights)
    letters = [e.text for e in seen.all("b")]
    cells = [e for e in seen.all("td") if "data-head" in e.attributes]
    assert len(cells) == weights.shape[1] == 4
    for head, cell in enumerate(cells):
        wanted = [
            f"{letters[place]} {100 * weight / 255:.0f}\xa0%"
            for place, weight in zip(
                places[row, head, :3], weights[row, head, :3].tolist(), strict=True
            )
        ]
        assert cell.text == "".join(wanted)
    painted = [place for place, t in enumerate(tokens) if "rgba" in t.attributes.get("style", "")]
    assert len(painted) > 5
    assert painted[-1] < start + row  # nothing looks ahead


def test_a_head_can_be_looked_at_alone_and_an_address_names_a_token(shown):
    start, places, weights = gaze_of(shown.read_text())
    hand = f'document.querySelectorAll("#heads td")[2].{OVER}'
    seen = look_at(shown, fragment=str(start + 3), then=hand)
    assert [e.attributes.get("data-at") for e in seen.all(kind="chosen")] == [str(start + 3), None]
    painted = {
        int(t.attributes["data-at"])
        for t in seen.all(kind="token")
        if "attention" in (t.attributes.get("title") or "")
    }
    assert painted == set(places[3, 2][weights[3, 2] > 0].tolist())


def test_without_a_browser_a_developer_may_go_on_but_ci_may_not(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="needs a browser"):
        find_browser()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="needs a browser"):
        find_browser()


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["1 + 2"], "error: --model-path is required; see --help\n"),
        (["--model-path", "missing.pt", "1 + 2"], "missing.pt: no such checkpoint file"),
        (["--model-path", "missing.pt"], "EXPRESSION is required"),
    ],
)
def test_refusals_are_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = call(SCRIPT, *argv)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert message in ended.err
    assert not [*tmp_path.iterdir()]


def test_another_tokenizer_and_a_text_too_long_are_refused(tiny_checkpoint, tmp_path):
    make_tokenizer(150).save(tmp_path / "other")
    for argv in (["1 + 2", "--tokenizer-path", tmp_path / "other"], ["1 + " * 2000 + "1"]):
        ended = show(tiny_checkpoint, *argv, output=tmp_path / "a.html")
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert not (tmp_path / "a.html").exists()


def test_deeper_than_trained_is_noted_on_the_page(tiny_checkpoint, tmp_path):
    deep = "1 + (2 + (3 + (4 + 5)))"
    argv = [deep, "--max-gen-length", 5]
    assert show(tiny_checkpoint, *argv, output=tmp_path / "a.html").code == 0
    assert "<li>Note: depth 4; trained on depth 1 to 3.</li>" in (tmp_path / "a.html").read_text()


def test_an_expression_may_begin_with_a_minus(tiny_checkpoint, tmp_path):
    argv = ["--model-path", tiny_checkpoint, "--max-gen-length", 5]
    for typed in (["-3 + 4"], ["-3+4"], [" -3+4 "]):
        ended = call(SCRIPT, *argv, "--output", tmp_path / "a.html", *typed)
        assert (ended.code, ended.err) == (0, "")
        assert "<h1>-3 + 4</h1>" in (tmp_path / "a.html").read_text()
