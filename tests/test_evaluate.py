"""Judging: figures against the literature and Python's own arithmetic; and that they repeat."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from math import sqrt
from random import Random

import pytest
from conftest import SMALL_WORLD
from helpers import ROOT, call, run
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle, right_answer, with_result

from arithmetic_llm.config import MAX_DEPTH, EvaluationConfig, SampleSpec
from arithmetic_llm.corpus.coverage import Coverage
from arithmetic_llm.corpus.draw import distinct_samples
from arithmetic_llm.corpus.draw import draw_samples as draw
from arithmetic_llm.corpus.files import json_line
from arithmetic_llm.corpus.record import rewriting
from arithmetic_llm.evaluation import evaluate as evaluation
from arithmetic_llm.evaluation.evaluate import evaluate, problems_for, problems_from, save
from arithmetic_llm.evaluation.judge import judge
from arithmetic_llm.evaluation.length import answer_lengths, rooms_to_answer
from arithmetic_llm.evaluation.metrics import evaluation_metrics, wilson_interval
from arithmetic_llm.model.decode import Completion, SamplingParams
from arithmetic_llm.model.tokenizer import END_THINK, EOS, ArithmeticTokenizer
from arithmetic_llm.runtime import UserError, atomic_write_text
from arithmetic_llm.task.problem import problem_from, split_of
from arithmetic_llm.task.solution import solve
from arithmetic_llm.task.text import SPECIAL_TOKENS

SEEN = Coverage(
    styles={"nested": 9}, depths=(1, 2, 3), flat_terms=(), num_range=(1, 20), splits={"train": 9}
)
SPEC = SampleSpec(max_depth=4, invalid_rate=0.1, typed_rate=0.0)
PROBLEMS = problems_from(distinct_samples(SPEC, 80, seed=3))


def judged(tokenizer, answer, problems=PROBLEMS, trained_on=SEEN, **options):
    """The result of an oracle that answers as told."""
    return evaluate(
        Oracle(tokenizer, answer), tokenizer, problems, trained_on=trained_on, **options
    )


# ---------------------------------------------------------------------------------- Wilson


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(correct, samples, low, high):
    assert wilson_interval(correct, samples) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 20_000), st.data())
def test_wilson_bounds_are_where_the_score_test_turns(samples, data):
    correct = data.draw(st.integers(0, samples))
    for bound in wilson_interval(correct, samples):
        # |share - bound| = z standard errors of the bound
        error = 1.959964 * sqrt(bound * (1 - bound) / samples)
        assert abs(correct / samples - bound) == pytest.approx(error, abs=1e-7)


def test_three_errors_in_ten_thousand_prove_999_in_a_thousand_and_four_do_not():
    assert wilson_interval(9_997, 10_000)[0] > 0.999 > wilson_interval(9_996, 10_000)[0]


def test_wilson_of_nothing_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


# ------------------------------------------------------------------------------------ rows


def test_a_perfect_model_is_right_everywhere(tokenizer):
    metrics = judged(tokenizer, right_answer).metrics
    assert metrics["exact_match_accuracy"] == metrics["step_validity_rate"] == 100
    assert metrics["parse_success_rate"] == metrics["exact_trace_rate"] == 100
    assert metrics["correct_samples"] == metrics["total_samples"] == len(PROBLEMS) == 80
    assert metrics["errors"] == metrics["trace_errors"] == {}
    assert [row["depth"] for row in metrics["by_depth"]] == [1, 2, 3, 4]
    assert [row["samples"] for row in metrics["by_depth"]] == [18, 18, 18, 18]
    assert metrics["invalid"]["samples"] == 8


def test_an_error_counts_in_its_own_row_only(tokenizer):
    victim = next(p for p in PROBLEMS if p.depth == 2)

    def answer(expression):
        wrong = expression == victim.expression
        return with_result(expression, 999) if wrong else right_answer(expression)

    metrics = judged(tokenizer, answer).metrics
    assert [row["correct"] for row in metrics["by_depth"]] == [18, 17, 18, 18]
    assert metrics["invalid"]["correct"] == 8
    assert metrics["exact_match_accuracy"] == 100 * 79 / 80
    assert metrics["errors"] == {"wrong_copy": 1}
    assert metrics["step_validity_rate"] == 100  # its steps were right


def test_trained_depths_leave_out_other_depths_and_invalid_expressions(tokenizer):
    def answer(expression):
        depth = problem_from(expression).depth
        return right_answer(expression) if depth in (1, 2, 3) else with_result(expression, 999)

    seen = replace(SEEN, styles={"nested": 9, "invalid": 1})
    metrics = judged(tokenizer, answer, trained_on=seen).metrics
    assert metrics["trained_depths"]["samples"] == metrics["trained_depths"]["correct"] == 54
    assert metrics["exact_match_accuracy"] == 100 * 54 / 80
    assert [row["trained"] for row in metrics["by_depth"]] == [True, True, True, False]
    assert metrics["invalid"]["trained"] is True


def test_on_an_invalid_expression_only_error_is_right(tokenizer):
    problems = [problem_from(text) for text in ("5 +", "6 18", "7 - 2")]
    metrics = judged(tokenizer, lambda e: with_result(e, 5), problems).metrics
    assert metrics["correct_samples"] == 1  # 7 - 2
    metrics = judged(tokenizer, lambda e: with_result(e, "ERROR"), problems).metrics
    assert metrics["correct_samples"] == metrics["invalid"]["correct"] == 2


def test_flat_sums_have_rows_by_terms_and_none_by_depth(tokenizer):
    spec = SampleSpec(flat_rate=1.0, flat_terms=5, invalid_rate=0.0, typed_rate=0.0)
    problems = problems_from(distinct_samples(spec, 40, seed=1))
    metrics = judged(tokenizer, right_answer, problems).metrics
    assert metrics["by_depth"] == []
    assert [row["terms"] for row in metrics["by_terms"]] == [2, 3, 4, 5]
    assert sum(row["samples"] for row in metrics["by_terms"]) == 40


def test_a_flat_sum_is_one_however_it_came_about():
    assert problem_from("1 + 2 + 3", style="typed").terms == 3
    assert problem_from("1+2+3").depth is None
    assert problem_from("1 + 2").depth == 1
    assert problem_from("(1 + 2) + 3").depth == 2


def test_correct_is_what_python_calculates(tokenizer):
    def answer(expression):
        off = Random(expression).choice((0, 0, 1))
        return with_result(expression, problem_value(expression) + off)

    def problem_value(expression):
        return eval(expression)

    valid = [problem for problem in PROBLEMS if problem.depth]
    entries = judged(tokenizer, answer, valid).sample_outputs
    assert len(entries) == len(valid)
    for entry in entries:
        assert entry["ground_truth"] == problem_value(entry["expression"])
        assert entry["correct"] == (entry["predicted"] == problem_value(entry["expression"]))
    assert 0 < sum(entry["correct"] for entry in entries) < len(entries)


# -------------------------------------------------------------------------- what is correct

VALID = st.recursive(
    st.integers(-99, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-"), inner).map(
        "({0[0]} {0[1]} {0[2]})".format
    ),
    max_leaves=6,
)
EXPRESSIONS = VALID | VALID.map("{} +".format)
ORDINARY = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=12)


def python_says(expression):
    """The value of an expression, or ERROR if it has none."""
    try:
        return eval(expression)
    except SyntaxError:
        return "ERROR"


def right_tokens(tokenizer, expression):
    """A right completion but for its ``<eos>``; the result is Python's."""
    return tokenizer.encode(with_result(expression, python_says(expression)))


def judge_tokens(tokenizer, expression, tokens, ended=True):
    """The outcome of a completion that ended by itself, or at the length limit."""
    written = Completion([*tokens, EOS], [], "eos") if ended else Completion(tokens, [], "length")
    return judge(problem_from(expression), written, 10, tokenizer, 1000)


def with_inserted(data, tokens, inserted):
    place = data.draw(st.integers(0, len(tokens)))
    return [*tokens[:place], *inserted, *tokens[place:]]


@given(EXPRESSIONS)
def test_a_right_completion_is_correct(tokenizer, expression):
    outcome = judge_tokens(tokenizer, expression, right_tokens(tokenizer, expression))
    assert outcome.correct
    assert outcome.verdict.trace_correct
    assert outcome.result == outcome.value == python_says(expression)


@given(EXPRESSIONS, st.data())
def test_another_result_is_not_correct(tokenizer, expression, data):
    value = python_says(expression)
    other = data.draw((st.integers(-200, 200) | st.just("ERROR")).filter(lambda n: n != value))
    tokens = tokenizer.encode(with_result(expression, other))
    outcome = judge_tokens(tokenizer, expression, tokens)
    assert (outcome.result, outcome.correct) == (other, False)


@given(EXPRESSIONS, st.sampled_from(range(len(SPECIAL_TOKENS))), st.data())
def test_a_special_token_within_makes_a_completion_unreadable(tokenizer, expression, token, data):
    tokens = with_inserted(data, right_tokens(tokenizer, expression), [token])
    outcome = judge_tokens(tokenizer, expression, tokens)
    assert outcome.result is None
    assert SPECIAL_TOKENS[token] in outcome.text
    if token != END_THINK:  # which may also end a trace too early
        assert outcome.verdict.error == "unparseable"


@given(EXPRESSIONS, st.data())
def test_a_last_eos_is_the_only_one(tokenizer, expression, data):
    tokens = right_tokens(tokenizer, expression)
    after = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=3))
    outcome = judge_tokens(tokenizer, expression, [*tokens, EOS, *after])
    assert (outcome.result, outcome.verdict.error) == (None, "unparseable")


@given(EXPRESSIONS, ORDINARY | st.sampled_from(SPECIAL_TOKENS))
def test_nothing_but_white_space_may_follow_the_result(tokenizer, expression, suffix):
    tokens = right_tokens(tokenizer, expression) + tokenizer.encode(suffix)
    outcome = judge_tokens(tokenizer, expression, tokens)
    assert outcome.correct == suffix.isspace()


@given(EXPRESSIONS, st.integers(-200, 200) | st.none(), st.data())
def test_a_second_final_result_is_one_too_many(tokenizer, expression, other, data):
    second = python_says(expression) if other is None else other
    inserted = tokenizer.encode(f" Final Result: {second}")
    tokens = with_inserted(data, right_tokens(tokenizer, expression), inserted)
    outcome = judge_tokens(tokenizer, expression, tokens)
    assert outcome.result is None
    assert not outcome.correct


@given(EXPRESSIONS)
def test_a_completion_that_was_cut_anywhere_has_no_result(tokenizer, expression):
    tokens = right_tokens(tokenizer, expression)
    for end in range(len(tokens) + 1):
        outcome = judge_tokens(tokenizer, expression, tokens[:end], ended=False)
        assert (outcome.result, outcome.correct) == (None, False)
        assert outcome.verdict.error == "cut_off"


@given(EXPRESSIONS)
def test_a_completion_that_ended_early_is_wrong_and_not_cut_off(tokenizer, expression):
    tokens = right_tokens(tokenizer, expression)
    for end in range(len(tokens)):
        outcome = judge_tokens(tokenizer, expression, tokens[:end])
        assert not outcome.correct
        assert outcome.verdict.error not in (None, "cut_off")


@given(EXPRESSIONS)
def test_a_prompt_is_no_part_of_a_solution(tokenizer, expression):
    prompt, tokens = tokenizer.prompt_ids(expression), right_tokens(tokenizer, expression)
    for repeated in (prompt, prompt[1:], prompt[1:-1], prompt[-1:]):
        outcome = judge_tokens(tokenizer, expression, [*repeated, *tokens])
        assert (outcome.result, outcome.verdict.error) == (None, "unparseable")


# ----------------------------------------------------------------------------- the figures

TRACE = "Step 1: 1 + 2 = 3 Expression now: 3 + 4 Step 2: 3 + 4 = {} Expression now: {}"
ENDING = " </think> Final Result: {}"


def outcome_of(tokenizer, text, expression="(1 + 2) + 4", context=1000, **completion):
    written = Completion(tokens=tokenizer.encode(text), finish_reason="eos")
    for name, value in completion.items():
        setattr(written, name, value)
    return judge(problem_from(expression), written, 10, tokenizer, context)


def test_figures_by_hand(tokenizer):
    right = outcome_of(tokenizer, (TRACE + ENDING).format(7, 7, 7))
    wrong = outcome_of(tokenizer, (TRACE + ENDING).format(8, 8, 8))
    lucky = outcome_of(tokenizer, (TRACE + ENDING).format(8, 8, 7))
    silent = outcome_of(tokenizer, TRACE.format(7, 7), finish_reason="length")
    found = evaluation_metrics([right, wrong, lucky, silent], SEEN)
    assert found["correct_samples"] == 2
    assert found["parseable_samples"] == 3
    assert found["parse_success_rate"] == 75
    assert found["step_validity_rate"] == 62.5  # 2 + 1 + 1 + 1 of 8; a last 7 may go on
    assert found["exact_trace_rate"] == 25
    assert found["cut_off_rate"] == 25
    assert found["errors"] == {"arithmetic": 1, "cut_off": 1}
    assert found["trace_errors"] == {"arithmetic": 2, "cut_off": 1}
    lengths = [len(outcome.text) for outcome in (right, wrong, lucky, silent)]
    assert all(lengths)
    tokens = sum(outcome.tokens for outcome in (right, wrong, lucky, silent))
    assert found["avg_generation_length"] == tokens / 4


def test_no_step_needed_is_no_step_validity(tokenizer):
    refused = outcome_of(tokenizer, right_answer("5 +"), "5 +")
    assert evaluation_metrics([refused], SEEN)["step_validity_rate"] is None
    assert refused.correct


def test_a_text_beyond_the_context_is_marked(tokenizer):
    text = (TRACE + ENDING).format(7, 7, 7)
    fits = 10 + len(tokenizer.encode(text))
    assert not outcome_of(tokenizer, text, context=fits).beyond_context
    assert outcome_of(tokenizer, text, context=fits - 1).beyond_context


def test_a_near_tie_is_counted_with_its_margin(tokenizer):
    text = (TRACE + ENDING).format(7, 7, 7)
    clear, close = (outcome_of(tokenizer, text, margin=m) for m in (0.5, 2e-6))
    found = evaluation_metrics([clear, close], SEEN)["near_ties"]
    assert found["samples"] == 1
    assert found["smallest_margin"] == 2e-6
    assert close.as_dict()["margin"] == 2e-6


@pytest.mark.parametrize(
    ("text", "style", "expected"),
    [
        ("1 + 20", None, True),
        ("1 + 21", None, False),
        ("-1 + 2", None, False),
        ("((1 + 2) - 3) - (4 + 5)", "nested", True),
        ("(((1 + 2) - 3) - 4) + 5", "nested", False),
        ("((1 + 2)) - 3", "padded", False),
        ("1 + 2 + 3", None, False),
        ("1 +", None, False),
    ],
)
def test_covered_means_depth_numbers_and_style(text, style, expected):
    assert SEEN.covers(problem_from(text, style)) == expected


def test_covered_flat_sums_are_trained_as_such_or_as_typed_trees():
    flat = problem_from("1 + 2 + 3 + 4")
    of_four = replace(SEEN, flat_terms=(4,))
    assert of_four.covers(flat)
    assert replace(SEEN, styles={"nested": 1, "typed": 1}).covers(flat)
    assert not of_four.covers(problem_from("1 + 2 + 3 + 4 + 5"))


def test_nothing_known_of_the_training_marks_nothing(tokenizer):
    metrics = judged(tokenizer, right_answer, trained_on=None).metrics
    assert {row["trained"] for row in metrics["by_depth"]} == {None}
    assert metrics["trained_depths"]["samples"] == 0


# ------------------------------------------------------------------- the limit of an answer


def test_the_default_limit_cuts_off_no_right_answer(tokenizer):
    deep = problems_from(distinct_samples(SampleSpec(max_depth=5, invalid_rate=0.1), 50, seed=2))
    assert judged(tokenizer, right_answer, deep).metrics["cut_off_rate"] == 0


def test_the_limit_counts_new_tokens_and_cuts(tokenizer):
    problem = problem_from("((1 + 2) - 3) - (4 + 5)")
    (needed,) = answer_lengths([problem], tokenizer)
    enough = judged(tokenizer, right_answer, [problem], max_new_tokens=needed)
    assert enough.outcomes[0].correct
    assert enough.outcomes[0].tokens == needed
    short = judged(tokenizer, right_answer, [problem], max_new_tokens=needed - 2)
    assert short.metrics["errors"] == {"cut_off": 1}


def test_the_limit_is_four_contexts_at_most(tokenizer):
    deep = problems_from(distinct_samples(SampleSpec(min_depth=6, max_depth=6), 10, seed=2))
    assert max(rooms_to_answer(deep, tokenizer, context=100)) == 400


def test_each_problem_has_the_room_of_its_own_answer(tokenizer):
    """What has gone wrong may write on for ever, and would do so for the longest of all."""
    short, long = problem_from("1 + 2"), problem_from("((1 + 2) - 3) - (4 + (5 - 6))")
    endless = judged(tokenizer, lambda expression: right_answer(long.expression), [short, long])
    (needed,) = answer_lengths([short], tokenizer)
    assert [outcome.tokens for outcome in endless.outcomes] == [
        needed + 32,
        *answer_lengths([long], tokenizer),
    ]
    assert [outcome.cut_off for outcome in endless.outcomes] == [True, False]
    invalid = problem_from("(1 + 2")  # what takes it for a problem should be seen to do so
    solved = judged(tokenizer, lambda expression: right_answer(long.expression), [invalid, long])
    assert not any(outcome.cut_off for outcome in solved.outcomes)
    assert endless.settings["max_gen_length"] == 0  # what was asked for, so that it can be again
    assert endless.settings["longest_room"] == max(rooms_to_answer([short, long], tokenizer, 99))


def test_a_temperature_that_logits_cannot_be_divided_by_is_refused():
    with pytest.raises(UserError, match=r"--temperature 1e-40: give 0, or 0\.01 and above"):
        EvaluationConfig(model_path="m", temperature=1e-40)


def test_an_evaluation_of_nothing_is_refused(tokenizer):
    with pytest.raises(UserError, match="no problem"):
        judged(tokenizer, right_answer, [])


# -------------------------------------------------------------------------- repeatability


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=7)]
)
def test_the_batch_size_changes_no_text(trained_model, tokenizer, sampling):
    problems = problems_from(distinct_samples(SMALL_WORLD, 65, seed=5))

    def outputs(batch_size):
        options = {"trained_on": SEEN, "sampling": sampling, "batch_size": batch_size}
        result = evaluate(trained_model, tokenizer, problems, **options, max_new_tokens=60)
        entries = result.sample_outputs
        return [(e["expression"], e["generated_text"], e["tokens"]) for e in entries]

    alone = outputs(1)
    assert any("Expression now:" in text for _, text, _ in alone)
    assert outputs(7) == alone
    assert outputs(64) == alone


def test_another_seed_samples_other_texts(trained_model, tokenizer):
    problems = problems_from(distinct_samples(SMALL_WORLD, 20, seed=5))
    texts = [
        [
            outcome.text
            for outcome in evaluate(
                trained_model,
                tokenizer,
                problems,
                trained_on=SEEN,
                sampling=SamplingParams(temperature=1.0, seed=seed),
                max_new_tokens=40,
            ).outcomes
        ]
        for seed in (1, 2)
    ]
    assert texts[0] != texts[1]


# ---------------------------------------------------------------------------- the problems


def test_problems_are_of_the_test_split_and_of_the_style_asked_for():
    for style in ("nested", "typed", "padded", "flat"):
        config = EvaluationConfig(num_samples=40, max_depth=3, style=style, invalid_rate=0.2)
        problems, source = problems_for(config)
        assert len(problems) == 40
        assert {split_of(problem.expression) for problem in problems} == {"test"}
        assert sum(problem.row.kind == "invalid" for problem in problems) == 8
        assert {problem.style for problem in problems} == {style, "invalid"}
        assert source["style"] == style


def test_a_test_file_is_used_whole_and_its_train_problems_are_counted(tmp_path):
    train = [sample.record for sample in draw(SPEC, 30, seed=1, split="train")]
    step = rewriting("5 - 4 - 2", solve("5 - 4 - 2"), 2, 2)  # no problem, so passed over
    held_out = [sample.record for sample in distinct_samples(SPEC, 20, seed=1, split="test")]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(map(json_line, [*train, step, *held_out])))
    problems, source = problems_for(EvaluationConfig(test_file=str(path), num_samples=5))
    assert [p.expression for p in problems] == [r.expression for r in train + held_out]
    assert source["in_train_split"] == 30


def test_a_test_file_with_a_problem_beyond_the_sampler_is_refused_at_once(tmp_path):
    """Solving 4,096 numbers takes minutes and gigabytes; 1,024 are a full tree of depth 10."""
    path = tmp_path / "corpus.txt"
    for numbers, fits in ((1024, True), (1025, False)):
        text = " + ".join(["1"] * numbers)
        path.write_text(f"Evaluate: {text}\n<think> </think> Final Result: {numbers}\n")
        config = EvaluationConfig(test_file=str(path))
        if fits:
            assert problems_for(config)[0][0].terms == 1024
        else:
            with pytest.raises(UserError, match=r"corpus\.txt: has a problem of 1,025 numbers"):
                problems_for(config)


# --------------------------------------------------------------------------------- the files

NAMES = ("evaluation_metrics", "evaluation_summary", "sample_outputs")


def test_two_evaluations_in_one_second_do_not_collide(tokenizer, tmp_path):
    result = judged(tokenizer, right_answer, PROBLEMS[:3])
    threads = [
        threading.Thread(target=save, args=(result, f"{number}\n", tmp_path)) for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summaries = [path.read_text() for path in tmp_path.glob("evaluation_summary_*.txt")]
    assert sorted(summaries) == [f"{number}\n" for number in range(8)]
    stamps = [{p.stem[-15:] for p in tmp_path.glob(f"{name}_*")} for name in NAMES]
    assert stamps[0] == stamps[1] == stamps[2]
    assert len(list(tmp_path.iterdir())) == 24


def test_a_full_disk_leaves_no_metrics_and_no_lock(tokenizer, tmp_path, monkeypatch):
    def fail_late(path, text):
        if "summary" in path.name:
            raise OSError(28, "No space left on device")
        atomic_write_text(path, text)

    monkeypatch.setattr(evaluation, "atomic_write_text", fail_late)
    with pytest.raises(OSError, match="No space"):
        save(judged(tokenizer, right_answer, PROBLEMS[:3]), "", tmp_path)
    assert [path.name[:14] for path in tmp_path.iterdir()] == ["sample_outputs"]


# -------------------------------------------------------------------------------- the script

METRICS = {  # DESIGN, section 5
    "exact_match_accuracy": float,
    "parse_success_rate": float,
    "step_validity_rate": float,
    "avg_generation_length": float,
    "total_samples": int,
    "correct_samples": int,
    "parseable_samples": int,
    "by_depth": list,
    "errors": dict,
    "settings": dict,
}
ENTRY = {
    "expression",
    "depth",
    "ground_truth",
    "predicted",
    "generated_text",
    "correct",
    "error",
}


def finished_run(folder, checkpoint):
    """A finished instruction run that holds a checkpoint."""
    models = folder / "models" / "instruction_20260101_120000"
    models.mkdir(parents=True)
    (models / "best_model.pt").write_bytes(checkpoint.read_bytes())
    (models / "training_summary.json").write_text("{}")


def test_the_documented_command_as_it_stands(tiny_checkpoint, tokenizer, tmp_path):
    finished_run(tmp_path, tiny_checkpoint)
    tokenizer.save(tmp_path / "data" / "tokenizer")
    ended = run(
        "run_evaluation.py",
        *("--model-path", "models/instruction_YYYYMMDD_HHMMSS/best_model.pt"),
        *("--tokenizer-path", "data/tokenizer", "--max-gen-length", 40, "--batch-size", 1),
        *("--num-samples", 12, "--max-depth", 4, "--output-dir", "evaluation_results"),
        cwd=tmp_path,
    )
    assert ended.code == 0, ended.err
    assert "instruction_20260101_120000" in ended.out
    assert "warning: --max-gen-length 40 cuts off the right answers" in ended.err
    (metrics,) = (tmp_path / "evaluation_results").glob("evaluation_metrics_*.json")
    (samples,) = (tmp_path / "evaluation_results").glob("sample_outputs_*.json")
    (summary,) = (tmp_path / "evaluation_results").glob("evaluation_summary_*.txt")
    assert "Where the model stands: not there yet" in summary.read_text()
    figures, entries = json.loads(metrics.read_text()), json.loads(samples.read_text())
    assert {name: type(figures[name]) for name in METRICS} == METRICS
    row = {"depth", "samples", "correct", "exact_match_accuracy", "low", "high", "trained"}
    assert all(row <= set(line) for line in figures["by_depth"])
    assert len(entries) == figures["total_samples"] == 12
    assert all(set(entry) >= ENTRY for entry in entries)
    assert figures["settings"]["max_gen_length"] == 40


def test_the_same_seed_gives_the_same_numbers(tiny_checkpoint, tmp_path):
    def numbers(folder, *more):
        flags = "--num-samples 12 --max-depth 3 --max-gen-length 30 --temperature 0.7"
        ended = call(
            "run_evaluation.py",
            *("--model-path", tiny_checkpoint, "--output-dir", tmp_path / folder),
            *flags.split(),
            *more,
        )
        assert ended.code == 0, ended.err
        (path,) = (tmp_path / folder).glob("sample_outputs_*.json")
        for entry in (entries := json.loads(path.read_text())):
            del entry["margin"]  # rounding: the last digits go with the batch size
        return entries

    assert numbers("a") == numbers("b", "--batch-size", 5)
    assert numbers("c") != numbers("d", "--seed", 1)


def test_flags_from_json(tiny_checkpoint, tmp_path):
    settings = {"num_samples": 6, "max_depth": 2, "device": "auto", "max_gen_length": 9}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ended = call(
        "run_evaluation.py",
        *("--model_path", tiny_checkpoint, "--config", tmp_path / "config.json"),
        *("--output-dir", tmp_path / "out", "--num-samples", 4),
    )
    assert ended.code == 0, ended.err
    assert "0 of 4" in ended.out


def refusals(tmp_path, checkpoint):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "bad.jsonl").write_text('{"expression": "1 + 2"\n')
    other = ArithmeticTokenizer.train(["Evaluate: 1 + 2 <think> Step 1: 1 + 2 = 3"], 150)
    other.save(tmp_path / "other")
    model = ("--model-path", checkpoint)
    return [
        ((), "--model-path is required"),
        (("--model-path", tmp_path / "none.pt"), "none.pt"),
        (("--model-path", tmp_path), "is a directory"),
        (("--model-path", tmp_path / "empty.pt"), "empty"),
        (("--model-path", tmp_path / "bad.jsonl"), "not a checkpoint"),
        ((*model, "--tokenizer-path", tmp_path / "other"), "not the tokenizer"),
        ((*model, "--test-file", tmp_path / "bad.jsonl"), "bad.jsonl:1"),
        ((*model, "--output-dir", tmp_path / "bad.jsonl"), "name a directory"),
        ((*model, "--output-dir", tmp_path / "bad.jsonl" / "x"), "name a directory"),
        ((*model, "--num-range", 5, 5, "--max-depth", 1), "depth 1"),
        ((*model, "--min-depth", 3, "--max-depth", 2), "--min-depth 3"),
        ((*model, "--max-depth", 60), f"--max-depth: must be at most {MAX_DEPTH}, not 60"),
        ((*model, "--style", "flat", "--flat-terms", 10**6), "--flat-terms: must be at most"),
        ((*model, "--style", "prose"), "--style"),
        ((*model, "--device", "quantum"), "quantum"),
        ((*model, "--nun-samples", 5), "--num-samples"),
    ]


def test_every_refusal_is_one_line_and_leaves_no_file(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    for flags, reason in refusals(tmp_path, tiny_checkpoint):
        ended = call("run_evaluation.py", "--output-dir", out, *flags)
        assert ended.code == 2, flags
        assert reason in ended.err, (flags, ended.err)
        assert len(ended.error_lines) == len(ended.err.splitlines()) == 1
        assert not out.exists() or not list(out.iterdir())


def test_help_needs_no_torch():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['run_evaluation.py', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
