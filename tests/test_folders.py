"""Run folders: names that collide with none, and the stamp that is the newest finished run."""

import datetime

import pytest

from arithmetic_llm import folders
from arithmetic_llm.folders import FINISHED, new_run_folder, resolve_stamp, step_checkpoints
from arithmetic_llm.runtime import UserError


def finished_run(parent, name):
    (parent / name).mkdir(parents=True)
    (parent / name / FINISHED).write_text("{}")


def test_two_runs_in_one_second_have_two_folders(tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 31, 23, 59, 59)

    monkeypatch.setattr(folders.datetime, "datetime", Clock)
    names = [new_run_folder(tmp_path / "new", "foundational").name for _ in range(3)]
    assert names == [
        "foundational_20260131_235959",
        "foundational_20260201_000000",
        "foundational_20260201_000001",
    ]


def test_a_file_in_place_of_the_output_folder_is_an_error(tmp_path):
    (tmp_path / "models").write_text("")
    with pytest.raises((UserError, OSError)):
        new_run_folder(tmp_path / "models", "foundational")


def test_the_literal_stamp_is_the_newest_finished_run_of_exactly_that_kind(tmp_path, capsys):
    for name in (
        "foundational_20250101_000000",
        "foundational_20250301_000000",
        "foundational_20250201_235959",
        "instruction_20260101_000000",
        "instruction_lora_20270101_000000",
        "foundational_2025_0401",
        "my_foundational_20280101_000000",
    ):
        finished_run(tmp_path, name)
    (tmp_path / "foundational_20290101_000000").mkdir()  # still running, or killed
    for kind, newest in (
        ("foundational", "20250301_000000"),
        ("instruction", "20260101_000000"),
        ("instruction_lora", "20270101_000000"),
    ):
        path = f"{tmp_path}/{kind}_YYYYMMDD_HHMMSS/best_model.pt"
        chosen = f"{tmp_path}/{kind}_{newest}/best_model.pt"
        assert resolve_stamp(path) == chosen
        assert chosen in capsys.readouterr().out  # and it says which


def test_every_stamp_of_a_path_is_resolved(tmp_path):
    run = tmp_path / "instruction_20250101_000000"
    finished_run(tmp_path, run.name)
    finished_run(run, "grpo_20260101_000000")
    path = f"{tmp_path}/instruction_YYYYMMDD_HHMMSS/grpo_YYYYMMDD_HHMMSS/best_model.pt"
    assert resolve_stamp(path) == f"{run}/grpo_20260101_000000/best_model.pt"


def test_other_paths_come_back_as_they_are(capsys):
    assert resolve_stamp("models/foundational_20250101_000000/x.pt") == (
        "models/foundational_20250101_000000/x.pt"
    )
    assert resolve_stamp("") == ""
    assert capsys.readouterr().out == ""


def test_no_finished_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        resolve_stamp(f"{tmp_path}/nowhere/foundational_YYYYMMDD_HHMMSS/best_model.pt")


def test_a_stamped_file_counts_without_a_summary(tmp_path):
    (tmp_path / "metrics_20250101_000000.json").write_text("{}")
    assert resolve_stamp(f"{tmp_path}/metrics_YYYYMMDD_HHMMSS.json").endswith("0101_000000.json")


def test_step_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("step_9", "step_10", "step_2", "step_x", "best"):
        (tmp_path / f"checkpoint_{name}.pt").write_text("")
    assert [path.stem for path in step_checkpoints(tmp_path)] == [
        "checkpoint_step_2",
        "checkpoint_step_9",
        "checkpoint_step_10",
    ]
