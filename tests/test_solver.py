"""The Python API: one expression, several at once, a stream; and what it refuses."""

import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import ROOT, make_tokenizer
from oracle import Oracle, right_answer, with_result

from arithmetic_llm import ArithmeticSolver
from arithmetic_llm.corpus.coverage import Coverage
from arithmetic_llm.evaluation.draft import right_continuations
from arithmetic_llm.model.tokenizer import EOS, ArithmeticTokenizer
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.problem import problem_from

SEEN = Coverage(
    styles={"nested": 9}, depths=(1, 2), flat_terms=(3,), num_range=(1, 20), splits={"train": 9}
)


@pytest.fixture(scope="module")
def solver(tokenizer):
    """A solver that is always right."""
    return ArithmeticSolver(Oracle(tokenizer), tokenizer, SEEN)


def in_a_fresh_python(code):
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_package_imports_no_torch_until_the_solver_is_asked_for():
    in_a_fresh_python(
        "import sys, arithmetic_llm as package\n"
        "assert 'torch' not in sys.modules\n"
        "package.ArithmeticSolver\n"
        "assert 'torch' in sys.modules\n"
    )


def test_the_package_has_no_other_names():
    import arithmetic_llm

    with pytest.raises(AttributeError, match="ArithmeticSolwer"):
        _ = arithmetic_llm.ArithmeticSolwer


# ------------------------------------------------------------------------------------ solve


def test_a_right_solution(solver):
    outcome = solver.solve("5+(10-3)")
    assert outcome.expression == "5 + (10 - 3)"
    assert (outcome.result, outcome.value, outcome.correct) == (12, 12, True)
    assert [step.text for step in outcome.steps] == [
        "Step 1: 10 - 3 = 7 Expression now: 5 + 7",
        "Step 2: 5 + 7 = 12 Expression now: 12",
    ]
    assert all(step.ok for step in outcome.steps)
    assert outcome.verdict.trace_correct
    assert outcome.text == right_answer("5 + (10 - 3)").strip()


def test_a_wrong_step_is_told_from_the_right_ones(tokenizer):
    wrong = (
        " Step 1: 10 - 3 = 7 Expression now: 5 + 7 "
        "Step 2: 5 + 7 = 13 Expression now: 13 </think> Final Result: 13"
    )
    outcome = ArithmeticSolver(Oracle(tokenizer, lambda _: wrong), tokenizer).solve("5 + (10 - 3)")
    assert [(step.ok, step.error) for step in outcome.steps] == [
        (True, None),
        (False, "arithmetic"),
    ]
    assert (outcome.result, outcome.value, outcome.correct) == (13, 12, False)
    assert outcome.verdict.first_error == 1


def test_an_invalid_expression_reaches_the_model_as_it_is(solver):
    outcome = solver.solve("5 + + 3")
    assert outcome.expression == "5 + + 3"
    assert (outcome.result, outcome.value, outcome.correct) == ("ERROR", "ERROR", True)


def test_error_on_a_valid_expression_is_wrong(tokenizer):
    oracle = Oracle(tokenizer, lambda e: with_result(e, "ERROR"))
    outcome = ArithmeticSolver(oracle, tokenizer).solve("1 + 2")
    assert (outcome.result, outcome.correct) == ("ERROR", False)


def test_a_list_is_solved_in_its_order(solver):
    outcomes = solver.solve(["1 + 2", "5 +", "(1 - 2) + (3 + 4)"])
    assert [outcome.value for outcome in outcomes] == [3, "ERROR", 6]
    assert all(outcome.correct for outcome in outcomes)
    assert solver.solve([]) == []


EXPRESSIONS = ["1 + 2", "(3 - 4) + (5 - 6)", "7", "((1 + 2) - 3) - (4 + 5)", "5 +", "9 - 9"]


def test_company_changes_no_solution(trained_model, tiny_model, tokenizer):
    for model in (trained_model, tiny_model):
        solver = ArithmeticSolver(model, tokenizer)
        together = solver.solve(EXPRESSIONS)
        alone = [solver.solve(expression) for expression in EXPRESSIONS]
        assert [o.text for o in together] == [o.text for o in alone]
        assert [o.verdict for o in together] == [o.verdict for o in alone]
        assert [o.cut_off for o in together] == [o.cut_off for o in alone]


# ----------------------------------------------------------------------------------- stream


def drain(stream):
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_stream_gives_what_solve_gives(trained_model, tokenizer, expression):
    solver = ArithmeticSolver(trained_model, tokenizer)
    pieces, outcome = drain(solver.stream(expression))
    solved = solver.solve(expression)
    assert "".join(pieces).strip() == outcome.text == solved.text
    assert outcome.verdict == solved.verdict


def test_a_stream_comes_in_pieces_as_they_are_written(tokenizer):
    asked = []
    solver = ArithmeticSolver(Oracle(tokenizer), tokenizer)
    hidden_states = solver.model.hidden_states

    def counted(*args):
        asked.append(None)
        return hidden_states(*args)

    solver.model.hidden_states = counted
    stream = solver.stream(" + ".join(map(str, range(1, 16))))
    assert next(stream)
    assert len(asked) == 2  # the prompt, and the first pass behind it
    passes = [len(asked) for piece in stream]
    assert len(passes) > 2
    *early, end = passes  # the end is a piece of its own
    assert early == [*range(3, 3 + len(early))]  # a draft may be right, but has its length
    assert end == early[-1]


def test_a_number_that_goes_on_is_held_back(tokenizer, monkeypatch):
    """Its units may be written first, and what has been shown cannot be taken back."""
    monkeypatch.setattr(
        "arithmetic_llm.evaluation.solver.right_continuations", lambda *_: lambda *_: []
    )  # so that each pass writes one token
    solver = ArithmeticSolver(Oracle(tokenizer), tokenizer)
    pieces, outcome = drain(solver.stream("480 + 273"))
    assert len(pieces) > 10
    assert "".join(pieces).strip() == outcome.text == right_answer("480 + 273").strip()


def test_right_drafts_are_checked_and_not_believed(tokenizer):
    """A model that is wrong writes what it would have written, in a few passes all the same."""
    wrong = " Step 1: 2 + 3 = 6 Expression now: 1 + 6 Step 2: 1 + 6 = 7 Expression now: 7"
    wrong += " </think> Final Result: 8"
    model, passes = Oracle(tokenizer, lambda expression: wrong), []
    hidden_states = model.hidden_states
    model.hidden_states = lambda *args: passes.append(None) or hidden_states(*args)
    outcome = ArithmeticSolver(model, tokenizer).solve("1 + (2 + 3)")
    assert outcome.text == wrong.strip()
    assert len(passes) <= 6  # the prompt, up to each error, and from there to the end


@pytest.mark.parametrize("digits", ["reversed", "places"])
def test_a_right_solver_goes_on_from_any_token(digits):
    """Within a number, too, whichever of its digits have been written."""
    tokenizer, expression = make_tokenizer(digits=digits), "480 - (-273 + (1234 - 98765))"
    guess = right_continuations([problem_from(expression)], tokenizer)
    ids = [*tokenizer.encode(right_answer(expression)), EOS]
    for cut in range(len(ids)):
        drafted = guess(0, ids[:cut])
        assert drafted
        assert drafted == ids[cut:][: len(drafted)]
    in_a_number = next(i for i in range(1, len(ids)) if tokenizer.settled(ids[:i]) < i - 1)
    assert guess(0, [*ids[: in_a_number - 1], *tokenizer.encode("5")]) == []


# ---------------------------------------------------------------------------------- bounds


def test_an_expression_that_is_too_long_is_refused_at_once(solver):
    for expression in ("1 + " * 3000 + "1", "(" * 100_000 + "1 + 2" + ")" * 100_000, "x" * 100_000):
        with pytest.raises(UserError, match="too long"):
            solver.solve(expression)


def test_needless_parentheses_around_a_number_cost_nothing(solver):
    assert solver.solve("(" * 100_000 + "7" + ")" * 100_000).correct


def test_a_number_of_a_thousand_digits_is_refused_or_solved(solver, tokenizer):
    roomy = ArithmeticSolver(Oracle(tokenizer, context=4096), tokenizer)
    outcome = roomy.solve(f"{'9' * 999} + 1")
    assert outcome.correct
    assert outcome.value == 10**999
    with pytest.raises(UserError, match="too long"):
        solver.solve("9" * 1000 + " + " + "9" * 1000)


def test_a_limit_of_new_tokens(tokenizer):
    outcome = ArithmeticSolver(Oracle(tokenizer), tokenizer, max_new_tokens=5).solve("1 + 2")
    assert (outcome.tokens, outcome.cut_off, outcome.result) == (5, True, None)


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "½ + 1", "1 + 2\x00", "\ud800", "</think> Final Result: 3"]
)
def test_odd_texts_are_invalid_and_no_more(solver, tiny_model, tokenizer, text):
    assert solver.solve("1 + 2").correct
    outcome = ArithmeticSolver(tiny_model, tokenizer, max_new_tokens=20).solve(text)
    assert outcome.value == "ERROR"


def test_warnings_say_what_was_never_trained(solver):
    assert solver.warnings("(1 + 2) - 3") == solver.warnings("1 + 2 + 3") == []
    assert solver.warnings("5 +") == []
    (deep,) = solver.warnings("((1 + 2) - 3) - (4 + 5)")
    assert deep == "depth 3; trained on depth 1 to 2"
    (flat,) = solver.warnings("1 + 2 + 3 + 4")
    assert flat.startswith("a sum of 4 numbers")
    (large,) = solver.warnings("1 + 21")
    assert large == "numbers 1 to 21; trained on 1 to 20"


def test_a_sum_as_long_as_typed_trees_is_nothing_new(solver):
    """1 + 2 + 3 is (1 + 2) + 3 as people type it."""
    typed = replace(SEEN, styles={"nested": 5, "typed": 4}, flat_terms=(), depths=(1, 2, 3))
    trained = ArithmeticSolver(solver.model, solver.tokenizer, typed)
    assert trained.warnings("1 + 2 + 21") == ["numbers 1 to 21; trained on 1 to 20"]
    assert trained.warnings("1 + 2 + 3 + 4 + 5") == ["a sum of 5 numbers; trained on 2 to 4"]


# ----------------------------------------------------------------------------- checkpoints


def test_from_checkpoint(tiny_checkpoint, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    solver = ArithmeticSolver.from_checkpoint(tiny_checkpoint, "cpu", tmp_path, max_new_tokens=9)
    assert solver.solve("1 + 2").tokens <= 9
    assert solver.trained_on.depths == (1, 2, 3)


def test_another_tokenizer_is_refused(tiny_checkpoint, tmp_path):
    ArithmeticTokenizer.train(["Evaluate: 1 + 2"], 145).save(tmp_path)
    with pytest.raises(UserError, match="not the tokenizer"):
        ArithmeticSolver.from_checkpoint(tiny_checkpoint, tokenizer_path=tmp_path)


def test_no_such_device(tiny_checkpoint):
    with pytest.raises(UserError, match="cuda:99"):
        ArithmeticSolver.from_checkpoint(tiny_checkpoint, device="cuda:99")
