"""The most telling wrong edits, made in every run of the suite; ``make mutants`` makes them all."""

import pytest
from mutant_list import MUTANTS
from mutants import Mutant, copy_of_the_checkout, is_noticed, run_tests, source_of

TELLING = (
    "GRPO: loss with its sign flipped",
    "GRPO: loss without its reference",
    "GRPO: old log-probs taken from the rollout",
    "GRPO: validation sampled instead of greedy",
    "GRPO: advantages without their baseline",
    "loop: no gradient clipping",
    "loop: the schedule is never applied",
    "supervised: the prompt's weight is ignored",
    "supervised: held-out problems from the train split",
    "LoRA: an adapter that is not scaled",
    "decoder: random numbers by place in the batch",
    "verifier: a wrong copy is right",
    "study: seeds are left out of the verdict",
    "study: a stage's hash without its inputs",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the checkout to be edited."""
    return copy_of_the_checkout(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_edit_changes_one_place_of_the_package(mutant):
    assert source_of(mutant).exists()
    assert mutant.old != mutant.new


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60


def test_an_edit_that_changes_nothing_survives_and_is_undone(copy):
    harmless = Mutant("a comment", "nearly the same time", "", "test_rewards.py")
    path = copy / "arithmetic_llm" / "grpo" / "rewards.py"
    before = path.read_text()
    path.write_text(before + "# nearly the same time\n")
    assert not is_noticed(harmless, copy)
    assert path.read_text() == before + "# nearly the same time\n"
    path.write_text(before)


def test_tests_that_cannot_be_run_are_no_verdict(copy):
    with pytest.raises(RuntimeError, match="no_such_file"):
        run_tests("test_no_such_file.py", copy)


@pytest.mark.parametrize("name", TELLING)
def test_a_telling_edit_is_noticed(name, copy):
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    assert is_noticed(mutant, copy)
