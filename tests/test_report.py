"""Reports: what they say, and that they are made from stored metrics as well as from fresh ones."""

import json

import pytest
from oracle import Oracle, right_answer, with_result

from arithmetic_llm.config import SampleSpec
from arithmetic_llm.corpus.coverage import Coverage
from arithmetic_llm.corpus.draw import distinct_samples
from arithmetic_llm.evaluation.evaluate import evaluate, problems_from
from arithmetic_llm.evaluation.metrics import wilson_interval
from arithmetic_llm.evaluation.report import (
    ENOUGH,
    EXCELLENT,
    GOOD,
    stage_table,
    standing,
    summary_text,
)
from arithmetic_llm.task.problem import problem_from

SEEN = Coverage(
    styles={"nested": 9}, depths=(1, 2), flat_terms=(), num_range=(1, 20), splits={"train": 9}
)
PROBLEMS = problems_from(
    distinct_samples(SampleSpec(max_depth=3, invalid_rate=0.1, typed_rate=0.0), 50, seed=3)
)
PROBLEMS.append(problem_from("1 + 2 + 3 + 4 + 5 + 6"))


def right_up_to(depth):
    """An answer that is right only for expressions of at most that depth."""

    def answer(expression):
        known = (problem_from(expression).depth or 99) <= depth
        return right_answer(expression) if known else with_result(expression, 999)

    return answer


@pytest.fixture(scope="module")
def metrics(tokenizer):
    model = Oracle(tokenizer, right_up_to(2))
    return evaluate(model, tokenizer, PROBLEMS, trained_on=SEEN).metrics


def table_rows(text, start):
    return [line.split() for line in text.splitlines() if line.startswith(start)]


def test_summary_has_a_line_for_every_row_and_marks_the_untrained(metrics):
    text = summary_text(metrics)
    assert [row[:3] for row in table_rows(text, "depth ")] == [
        ["depth", "1", "15"],
        ["depth", "2", "15"],
        ["depth", "3", "*"],
    ]
    assert len(table_rows(text, "6 terms *")) == 1
    assert len(table_rows(text, "invalid *")) == 1
    assert "* never solved in training" in text
    assert "trained depths   100.00 %" in text


def test_summary_names_the_errors(metrics):
    assert metrics["errors"] == {"wrong_copy": 21}
    (line,) = table_rows(summary_text(metrics), "  wrong_copy")
    assert line[:2] == ["wrong_copy", "21"]


def test_summary_of_stored_metrics_is_the_same(metrics):
    assert summary_text(json.loads(json.dumps(metrics))) == summary_text(metrics)


def test_summary_is_printable_everywhere(metrics):
    assert summary_text(metrics).isascii()


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (0.0, "not there yet"),
        (59.99, "not there yet"),
        (60.0, "good"),
        (79.99, "good"),
        (80.0, "excellent"),
        (100.0, "excellent"),
    ],
)
def test_standing_in_words(metrics, rate, words):
    trained = {**metrics["trained_depths"], "exact_match_accuracy": 100.0 - rate}
    text = standing({**metrics, "exact_match_accuracy": rate, "trained_depths": trained})
    assert text.startswith(f"{words}, {rate:.1f} % exact match overall")


def of_a_thousand(trained):
    """287 of 1,000 problems are right, all of the trained ones among them."""
    right = {"exact_match_accuracy": 100.0, "low": 42.5, "high": 100.0}
    return {
        **{"exact_match_accuracy": 28.7, "low": 25.98, "high": 31.58, "total_samples": 1000},
        **{"parse_success_rate": 100.0, "trained_depths": {"samples": trained, **right}},
    }


OVERALL = (
    "not there yet, 28.7 % exact match overall (1,000 problems, 95 % interval 26.0 to 31.6 %); "
    "good is from 60 %."
)


@pytest.mark.parametrize("trained", [0, 2, 99, 1000])
def test_standing_is_that_of_all_problems_with_the_interval(trained):
    assert standing(of_a_thousand(trained)) == OVERALL


@pytest.mark.parametrize("trained", [100, 999])
def test_enough_problems_of_trained_depths_have_a_sentence_of_their_own(trained):
    assert standing(of_a_thousand(trained)) == (
        f"{OVERALL} It reaches 100.0 % exact match on trained depths "
        f"({trained} problems, 95 % interval 42.5 to 100.0 %)."
    )


def test_so_many_are_enough_to_tell_good_from_not_there_yet_and_from_excellent():
    widths = [high - low for low, high in (wilson_interval(n, ENOUGH) for n in range(ENOUGH + 1))]
    assert 100 * max(widths) < EXCELLENT - GOOD


def test_standing_complains_of_unreadable_texts(metrics):
    assert "should pass 90 %" in standing({**metrics, "parse_success_rate": 90.0})
    assert "should pass" not in standing({**metrics, "parse_success_rate": 90.1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"in_train_split": 7}}, "7 of the 51 problems belong to the train split"),
        ({"beyond_context": 3}, "3 texts ran beyond the trained context of 1,024 tokens"),
        ({"near_ties": {"samples": 2, "smallest_margin": 1e-6}}, "2 texts hang on a near-tie"),
    ],
)
def test_notes_appear_where_they_are_due(metrics, change, words):
    assert words not in summary_text(metrics)
    changed = {
        name: {**metrics[name], **value} if isinstance(value, dict) else value
        for name, value in change.items()
    }
    assert words in summary_text({**metrics, **changed})


def test_stage_table(metrics):
    text = stage_table([("1 corpus", None, 12.4), ("4.1 its evaluation", metrics, 60.0)])
    lines = text.splitlines()
    heads = ["stage", "exact match", "95 % interval", "parse", "steps", "seconds"]
    places = [lines[0].index(head) for head in heads]
    assert places == sorted(places)
    assert lines[1].split() == ["1", "corpus", "12"]
    assert lines[2].startswith("4.1 its evaluation  depth 1 ")
    assert lines[2].split()[-1] == "60"
    assert [line.split()[1] for line in lines[3:5]] == ["2", "3"]
    assert "depth 3 *" in text
    assert lines[-2].split() == ["all", "stages", "72"]
    assert max(map(len, lines)) <= 100


def test_stage_table_without_an_evaluation():
    assert stage_table([("1 corpus", None, 3.0)]).splitlines()[-1].split()[-1] == "3"
