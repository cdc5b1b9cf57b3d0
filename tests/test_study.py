"""Studies as processes: shared, resumed, failing, killed; and how their files are read."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers import ROOT, call, command, one_thread, run

from arithmetic_llm.cli import read_json
from arithmetic_llm.folders import read_lines
from arithmetic_llm.runtime import Progress, UserError, when_asked_to_stop
from arithmetic_llm.study import runner
from arithmetic_llm.study.plan import plan
from arithmetic_llm.study.runner import expected_seconds
from arithmetic_llm.study.spec import arms_of, read_study, values_of
from arithmetic_llm.study.study import stages_of
from studies import MODEL_ALONE, commands, run_here, write_recipe, write_study

LONG = 1000  # steps of a run that does not end while a busy machine is at something else
needs_locks = pytest.mark.skipif(os.name == "nt", reason="SIGINT and locks of files")


# ------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with a tiny recipe, in which a study of two arms has been run."""
    folder = tmp_path_factory.mktemp("bench")
    recipe = write_recipe(folder / "tiny")
    write_study(folder / "two.json", **two_arms(recipe))
    ended = study(folder, "two.json")
    assert ended.code == 0, ended.err
    return folder


def two_arms(recipe, **keys):
    return {
        "base": str(recipe),
        "stages": {"evaluation": MODEL_ALONE},
        "vary": {"foundational.learning_rate": [0.001, 0.002]},
        "seeds": [1],
        **keys,
    }


def study(folder, name, *more):
    return run("run_study.py", *argv_of(name, *more), cwd=folder)


def argv_of(name, *more):
    return [name, "--stages-dir", "stages", "--output-dir", "results", "--jobs", 2, *more]


def started(folder, name):
    """The process of a study, begun and not waited for."""
    return subprocess.Popen(
        command("run_study.py", *argv_of(name)), cwd=folder, env=one_thread(), stderr=-1, text=True
    )


def metrics_of_a_long_run(folder, before):
    """metrics.jsonl of the run that has just begun, when it tells of a step."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for path in {*folder.glob("stages/foundational_*/*/metrics.jsonl")} - before:
            if any("loss" in line for line in read_lines(path)):
                return path
        time.sleep(0.05)
    raise AssertionError("no run has begun")


def test_what_the_arms_share_is_run_once(bench):
    scripts = [line.split()[2] for line in commands(bench / "stages")]
    assert sorted(scripts) == [
        "generate_corpus.py",
        "generate_foundational_plaintext.py",
        "run_evaluation.py",
        "run_evaluation.py",
        "run_foundational_training.py",
        "run_foundational_training.py",
        "train_tokenizer.py",
    ]
    rates = {
        read_json(path)["learning_rate"] for path in bench.glob("stages/*/*/training_config.json")
    }
    assert rates == {0.001, 0.002}


def test_a_finished_study_runs_nothing_and_says_the_same(bench):
    before = commands(bench / "stages")
    files = [bench / "results" / "two" / name for name in ("results.md", "results.csv")]
    contents = [path.read_bytes() for path in files]
    ended = study(bench, "two.json")
    assert ended.code == 0
    assert "7 stages, 7 of them done" in ended.out
    assert commands(bench / "stages") == before
    assert [path.read_bytes() for path in files] == contents


def test_the_results_are_those_of_the_evaluations(bench):
    folder = bench / "results" / "two"
    lines = list(csv.DictReader((folder / "results.csv").open()))
    assert [line["arm"] for line in lines] == ["learning_rate 0.001", "learning_rate 0.002"]
    for line in lines:
        (file,) = (bench / "stages" / line["evaluation"]).glob("evaluation_metrics_*.json")
        metrics = read_json(file)
        assert int(line["problems"]) == metrics["total_samples"] == 24
        assert int(line["right"]) == metrics["correct_samples"]
        assert float(line["high"]) == pytest.approx(metrics["high"], abs=0.01)
        assert metrics["settings"]["model_path"].startswith("stages/foundational_")
    page = (folder / "results.md").read_text()
    assert "cannot be told apart from learning_rate 0.001: learning_rate 0.002" in page
    assert "says nothing of what other seeds would give" in page
    for picture in ("results.png", "grid.png"):
        assert f"({picture})" in page
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_an_arm_that_fails_is_reported_and_ends_no_other(bench):
    keys = two_arms(bench / "tiny", vary={})
    keys["arms"] = {
        "wild": {"foundational.learning_rate": 1e30},
        "tame": {"foundational.learning_rate": 0.002},
    }
    write_study(bench / "wild.json", **keys)
    before = len(commands(bench / "stages"))
    ended = study(bench, "wild.json")
    assert ended.code == 1
    assert len(commands(bench / "stages")) == before + 1  # the tame arm is there from the first
    failed = [line for line in ended.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert "foundational: error: " in failed[0]
    assert "exit code 2" in failed[0]
    assert "not finished: wild, seed 1" in ended.err
    page = (bench / "results" / "wild" / "results.md").read_text()
    assert "- wild, seed 1" in page
    assert "| tame |" in page


@needs_locks
def test_ctrl_c_saves_and_the_same_command_goes_on(bench):
    process, metrics = started_in_training(bench, "long.json", 0.003)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read().endswith("interrupted\n")
    (saved,) = metrics.parent.glob("checkpoint_step_*.pt")
    assert not (metrics.parent / "training_summary.json").exists()
    ended = study(bench, "long.json")
    assert ended.code == 0, ended.err
    log = (metrics.parents[1] / "log.txt").read_text()
    step = saved.stem.removeprefix("checkpoint_step_")
    assert log.count("$ python") == 2
    assert f"--resume {metrics.parent.relative_to(bench)}" in log
    assert f"at step {step}\n" in log
    assert read_json(metrics.parent / "training_summary.json")["steps"] == LONG


@needs_locks
def test_after_a_kill_the_process_that_is_left_is_waited_for(bench):
    """Killed without a chance to say anything; its training goes on, and is not begun twice."""
    process, metrics = started_in_training(bench, "killed.json", 0.004)
    process.kill()
    process.wait()
    process.stderr.close()
    ended = study(bench, "killed.json")
    assert ended.code == 0, ended.err
    assert (metrics.parents[1] / "log.txt").read_text().count("$ python") == 1
    assert read_json(metrics.parent / "training_summary.json")["steps"] == LONG


def started_in_training(bench, name, rate):
    """The process of a study whose only arm is training, and the metrics.jsonl of that run."""
    write_study(bench / name, **long_arm(bench / "tiny", rate))
    before = {*bench.glob("stages/*/*/metrics.jsonl")}
    process = started(bench, name)
    return process, metrics_of_a_long_run(bench, before)


def long_arm(recipe, rate):
    """A study of one arm that trains for some seconds."""
    steps = {"learning_rate": rate, "max_steps": LONG, "log_every": 5, "eval_every": LONG}
    stages = {"foundational": {**steps, "save_every": LONG}, "evaluation": MODEL_ALONE}
    return two_arms(recipe, vary={}, stages=stages)


@needs_locks
def test_a_process_that_will_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "SECONDS_TO_SAVE", 0.2)
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print('deaf', flush=True)"
    argv = [sys.executable, "-c", f"{deaf}; time.sleep(60)"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    process.stdout.readline()
    with open(tmp_path / "lock", "ab") as lock:
        at_work = runner.Running(None, process, lock)
        with Progress(1, "x") as bar:
            runner.Runner([], 1, bar, {}, 0, running=[at_work]).interrupt()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


@needs_locks
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_term_and_a_closed_terminal_interrupt(name):
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(KeyboardInterrupt), when_asked_to_stop(runner.interrupt):
        signal.raise_signal(getattr(signal, name))
    assert signal.getsignal(getattr(signal, name)) is before


@needs_locks
def test_in_the_background_ctrl_c_counts_and_under_nohup_a_closed_terminal_does_not():
    for name in ("SIGINT", "SIGHUP"):
        before = signal.signal(getattr(signal, name), signal.SIG_IGN)
        try:
            interrupts = pytest.raises(KeyboardInterrupt) if name == "SIGINT" else nullcontext()
            with interrupts, when_asked_to_stop(runner.interrupt):
                signal.raise_signal(getattr(signal, name))
        finally:
            signal.signal(getattr(signal, name), before)


def test_a_run_that_was_finished_and_not_marked_is_not_run_again(bench, monkeypatch):
    monkeypatch.delattr(runner, "launch")
    configs = bench.glob("stages/foundational_*/*/training_config.json")
    (run,) = [path.parent for path in configs if read_json(path)["learning_rate"] == 0.001]
    mark = run.parent / "done.json"
    mark.unlink()
    ended = call_in(bench, "two.json")
    assert ended.code == 0, ended.err
    assert "7 stages, 6 of them done" in ended.out
    assert mark.is_file()


def test_the_bar_tells_what_is_at_work_and_the_time_left(bench, monkeypatch):
    run_here(monkeypatch)
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_SHOWS", 0.0)
    write_study(bench / "more.json", **two_arms(bench / "tiny", seeds=[1, 2]))
    ended = call_in(bench, "more.json")
    assert ended.code == 0, ended.err
    lines = re.findall(r"^more: (\d+)/(\d+) s of work, now .*?, (\w+) left$", ended.err, re.M)
    done, total, left = zip(*lines, strict=True)
    assert int(done[0]) > 0  # what was there before
    assert sorted(map(int, done)) == [*map(int, done)]
    assert (int(done[-1]), left[-1]) == (int(total[-1]), "0s")


def test_without_matplotlib_there_are_results_without_pictures(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_study(bench / "plain.json", **two_arms(bench / "tiny"))
    ended = call_in(bench, "plain.json")
    assert ended.code == 0
    assert "no pictures: pictures need matplotlib; pip install -r requirements-extras.txt" in (
        ended.err.splitlines()
    )
    assert "png" not in (bench / "results" / "plain" / "results.md").read_text()


# ---------------------------------------------------------------------------------- the commands


def planned(tmp_path, **keys):
    recipe = tmp_path / "tiny"
    if not recipe.exists():
        write_recipe(recipe)
    path = write_study(tmp_path / "s.json", **{"base": str(recipe), **keys})
    return plan(read_study(str(path)), tmp_path / "stages")


def by_name(trials, name):
    return [stage for stage in stages_of(trials) if stage.name == name]


def test_seeds_and_arms_make_stages_only_where_they_matter(tmp_path):
    keys = {
        "arms": {"full": {"evaluation.model_path": "{instruction}"}},
        "vary": {"lora.lora_rank": {"from": 1, "to": 4, "times": 2}},
        "stages": {"evaluation": {"model_path": "{lora}"}},
        "seeds": [5, 6],
    }
    trials = planned(tmp_path, seeded=["lora"], **keys)
    assert [trial.arm.name for trial in trials[::2]] == [
        "full",
        "lora_rank 1",
        "lora_rank 2",
        "lora_rank 4",
    ]
    count = {name: len(by_name(trials, name)) for name in ("foundational", "lora", "evaluation")}
    assert count == {"foundational": 1, "lora": 6, "evaluation": 7}
    assert trials[0].evaluation is trials[1].evaluation  # full tuning has no seed of its own
    assert len(by_name(planned(tmp_path, **keys), "foundational")) == 2


def test_what_is_said_and_what_the_recipe_says_is_the_same_stage(tmp_path):
    trials = planned(tmp_path, arms={"a": {}, "b": {"foundational.max_steps": 3}}, seeds=[1])
    assert trials[0].evaluation is trials[1].evaluation


def test_a_stage_is_another_one_if_anything_that_goes_into_it_is(tmp_path):
    first = planned(tmp_path, seeds=[1])[0].evaluation
    recipe = tmp_path / "tiny" / "foundational_corpus.json"
    recipe.write_text(json.dumps({**read_json(recipe), "num_samples": 301}))
    second = planned(tmp_path, seeds=[1])[0].evaluation
    assert first.hash != second.hash
    assert first.inputs["test_file"].hash == second.inputs["test_file"].hash


def test_every_stage_stands_behind_what_it_needs(tmp_path):
    stages = stages_of(planned(tmp_path, seeds=[1, 2]))
    for place, stage in enumerate(stages):
        assert all(each in stages[:place] for each in stage.inputs.values())


def test_joined_corpora_and_stages_of_a_kind(tmp_path):
    stages = {
        "easy": {"like": "instruction_corpus", "max_depth": 1},
        "hard": {"like": "instruction_corpus", "min_depth": 2, "num_samples": 7},
        "instruction_corpus": {"join": ["{easy}", "{hard}"]},
    }
    trials = planned(tmp_path, stages=stages, seeds=[1])
    (joined,) = by_name(trials, "joined")
    assert [part.settings["num_samples"] for part in [*joined.inputs.values()][1:]] == [7]
    (training,) = by_name(trials, "instruction")
    place = training.words.index("--instruction-corpus-path")
    assert training.words[place + 1] == joined.target


def test_a_finished_run_is_a_base(bench, tmp_path):
    """Its model and its tokenizer are taken as they are; a base that no arm uses is refused."""
    folder = next(bench.glob("stages/foundational_*/*/training_summary.json")).parent
    path = write_study(tmp_path / "s.json", seeds=[1], stages={"evaluation": MODEL_ALONE})
    (trial,) = plan(read_study(str(path)), tmp_path, base=str(folder))
    names = [stage.name for stage in stages_of([trial])]
    assert names == ["foundational", "test_corpus", "evaluation"]
    assert trial.evaluation.inputs["model_path"].target == str(folder / "best_model.pt")
    (with_lora,) = planned(tmp_path, base=str(folder), stages=OF_LORA, seeds=[1])
    (tokenizer,) = by_name([with_lora], "tokenizer")
    assert tokenizer.given.startswith(str(bench))
    with pytest.raises(UserError, match=r"arm 'a': foundational\.seed cannot vary, since"):
        planned(tmp_path, base=str(folder), arms={"a": {"foundational.seed": 7}})
    other = {"other": {"like": "foundational"}, "evaluation": {"model_path": "{other}"}}
    with pytest.raises(UserError, match=r"s\.json: base: .* arm 'base' does not start"):
        planned(tmp_path, base=str(folder), stages=other)


OF_LORA = {"evaluation": {"model_path": "{lora}"}}


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.json")), ids=lambda p: p.stem)
@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_shipped_studies_are_right_and_small(file, quick, tmp_path):
    """On two cores, by what stages are expected to take: two hours, and ten minutes."""
    study = read_study(str(file), quick)
    stages = stages_of(plan(study, tmp_path))
    assert sum(map(expected_seconds, stages)) / 2 < (10 if quick else 120) * 60 / 1.4
    assert f"`{file.name}`" in (ROOT / "studies" / "README.md").read_text()


def test_the_example_of_the_readme_is_a_study(tmp_path):
    text = (ROOT / "studies" / "README.md").read_text()
    (example,) = [part.split("```")[0] for part in text.split("```json\n")[1:]]
    (tmp_path / "mine.json").write_text(example)
    for quick in (False, True):
        trials = plan(read_study(str(tmp_path / "mine.json"), quick), tmp_path)
        assert len({trial.arm.name for trial in trials}) == 4


def test_a_dry_run_says_all_and_does_nothing(tmp_path):
    write_recipe(tmp_path / "tiny")
    path = write_study(tmp_path / "s.json", base=str(tmp_path / "tiny"), seeds=[1])
    ended = call("run_study.py", path, "--dry-run", "--output-dir", tmp_path / "results")
    assert ended.code == 0
    assert ended.out.count("$ python ") == 7
    assert "foundational_YYYYMMDD_HHMMSS/best_model.pt" in ended.out
    assert not (tmp_path / "results").exists()


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"qestion": "?"}, "unknown key 'qestion'; the keys are name, question"),
        ({"question": ""}, "question: is missing; say in a sentence"),
        ({"seeds": []}, "seeds: []: name at least one"),
        ({"seeds": [1, 1]}, "seeds: [1, 1]: name at least one, each once"),
        ({"seeds": [-1]}, "seeds: -1: must be at least 0"),
        ({"seeds": ["1"]}, "seeds is '1', not of type int; see studies/README.md"),
        ({"name": "../x"}, "name: '../x'"),
        ({"rows": ["depth four"]}, "rows: 'depth four' is none; write all, depth 4"),
        ({"rows": ["all: luck"]}, "exact match, whole trace, parse"),
        ({"against": "x"}, "against: there is no arm 'x'; there are 'base'"),
        ({"vary": {"lora.lora_rank": []}}, "vary: lora.lora_rank: [] is neither a list"),
        ({"vary": {"lora.lora_rank": {"from": 1, "to": 0, "step": 1}}}, "nor a range that grows"),
        ({"vary": {"lora.lora_rank": {"from": 1, "to": 3, "step": 0}}}, "nor a range that grows"),
        ({"vary": {"lora_rank": [1]}}, "'lora_rank': write STAGE.FLAG, such as lora.lora_rank"),
        ({"vary": {"lora.lora_rank, lora.lora_alpha": [[1]]}}, "[1] needs 2 values"),
        ({"vary": {"grpo.seed": [1, 1]}}, "two arms are called 'seed 1'"),
        ({"quick": {"name": "x"}}, "quick: unknown key 'name'"),
        ({"quick": []}, "quick: must be an object"),
        ({"base": "nowhere"}, "base: nowhere is neither a recipe"),
        ({"seeded": ["gpro"]}, "there is no stage 'gpro'"),
        ({"stages": {"tokeniser": {}}}, "there is no stage 'tokeniser'"),
        ({"arms": {"a": {"tokeniser.vocab_size": 200}}}, "there is no stage 'tokeniser'"),
        ({"arms": {"a": {"tokenizer.vocab_sise": 200}}}, "arm 'a', stage tokenizer: unknown arg"),
        ({"arms": {"a": {"tokenizer.vocab_size": "x"}}}, "arm 'a', stage tokenizer: argument"),
        ({"arms": {"a": {"instruction.output_dir": "x"}}}, "--output-dir: the study sees to it"),
        ({"arms": {"a": {"instruction.batch_tokens": 9}}}, "stage instruction: "),
        (
            {"stages": {"tokenizer": {"corpus_path": "{instruction}"}}},
            "'instruction' needs itself: evaluation -> ",
        ),
        ({"stages": {"tokenizer": {"given": "nowhere"}}}, "stage tokenizer: nowhere: no such"),
        ({"stages": {"lora": {"like": ["a"]}}}, "there is no stage 'lora'"),
        ({"stages": {"instruction_corpus": {"join": 5}}}, "instruction_corpus: join: 5 is no list"),
        ({"stages": {"instruction_corpus": {"join": ["a.txt"]}}}, "join: ['a.txt'] is no list of"),
        ({"stages": {"instruction_corpus": {"join": []}}}, "join: [] is no list of stages"),
        ({"stages": {"foundational": {"config": "x.json"}}}, "stage foundational: config: x.json"),
        ({"arms": {"a": {"instruction.seed": 5}}}, "arm 'a': instruction.seed comes from the"),
        ({"rows": ["depth 9"]}, "arm 'base': rows: depth 9: the test has depth 1 to "),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_is_one_line_that_names_file_key_and_remedy(tmp_path, keys, named):
    write_recipe(tmp_path / "tiny")
    keys = {"base": str(tmp_path / "tiny"), "seeds": [1], **keys}
    if "batch_tokens" in str(keys):
        keys["stages"] = {"instruction": {"batch_size": 4}}
    path = write_study(tmp_path / "mine.json", **keys)
    ended = call("run_study.py", path, "--dry-run")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert named in line
    assert line.startswith(f"error: {path}: ")


def test_a_row_that_the_test_does_not_have_is_named(bench):
    write_study(bench / "rows.json", **two_arms(bench / "tiny", rows=["7 terms"]))
    ended = call_in(bench, "rows.json")
    assert ended.code == 2
    assert "rows.json: rows: the test has no 7 terms; it has all, depth 1, depth 2" in ended.err


def call_in(folder, name):
    before = Path.cwd()
    os.chdir(folder)
    try:
        return call("run_study.py", *argv_of(name))
    finally:
        os.chdir(before)


# -------------------------------------------------------------------------------------- the arms


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ([3, "a"], [3, "a"]),
        ({"from": 1, "to": 32, "times": 2}, [1, 2, 4, 8, 16, 32]),
        ({"from": 1, "to": 31, "times": 2}, [1, 2, 4, 8, 16]),
        ({"from": 0, "to": 0.6, "step": 0.2}, [0.0, 0.2, 0.4, 0.6]),
        ({"from": 5, "to": 5, "step": 1}, [5]),
    ],
)
def test_lists_and_ranges(spec, values):
    found = values_of("a.b", spec)
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def test_crossed_and_paired(tmp_path):
    vary = {
        "lora.lora_rank, lora.lora_alpha": [[1, 2], [4, 8]],
        "lora.lora_target_modules": ["attention", "feedforward"],
        "grpo.rewards": [{"correct": 1, "format": 0.5}],
    }
    study = read_study(str(write_study(tmp_path / "s.json", vary=vary)))
    arms = arms_of(study)
    assert [arm.name for arm in arms] == [
        f"lora_rank {rank}, {where}, rewards correct=1,format=0.5"
        for rank in (1, 4)
        for where in ("attention", "feedforward")
    ]
    assert arms[2].settings["lora.lora_alpha"] == 8
    assert arms[2].place["lora_rank"] == 4


def test_quick_changes_stages_one_by_one_and_all_else_as_a_whole(tmp_path):
    keys = {"stages": {"lora": {"max_steps": 9, "seed": 1}}, "seeds": [1, 2], "rows": ["depth 1"]}
    quick = {"stages": {"lora": {"max_steps": 2}}, "seeds": [3]}
    path = str(write_study(tmp_path / "s.json", **keys, quick=quick))
    assert read_study(path).stages == keys["stages"]
    study = read_study(path, quick=True)
    assert study.stages == {"lora": {"max_steps": 2, "seed": 1}}
    assert (study.seeds, study.rows) == ([3], ["depth 1"])
