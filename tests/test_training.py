"""Both supervised stages, run small and whole: their files, and what kills and mistakes do."""

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import call, command, damages, edit, one_thread, put, removals, run

from arithmetic_llm import runtime
from arithmetic_llm.cli import parse
from arithmetic_llm.config import InstructionConfig
from arithmetic_llm.corpus.coverage import coverage_of
from arithmetic_llm.corpus.draw import distinct_samples
from arithmetic_llm.corpus.files import json_line
from arithmetic_llm.corpus.record import rewriting, solved
from arithmetic_llm.folders import FINISHED
from arithmetic_llm.model import kernels
from arithmetic_llm.model.checkpoint import read_checkpoint, weights_hash
from arithmetic_llm.model.load import load_model
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.solution import solve
from arithmetic_llm.training import loop, supervised
from arithmetic_llm.training.loop import epoch_log
from arithmetic_llm.training.run import OF_BEFORE, MetricsLog, Run
from arithmetic_llm.training.supervised import SupervisedTask, counted_logits, train_instruction

FOUNDATIONAL, INSTRUCTION = "run_foundational_training.py", "run_instruction_training.py"
SMALL = ["--device", "cpu", "--threads", 1, "--eval-samples", 20, "--batch-size", 16]
SHAPE = ["--d-model", 32, "--nhead", 2, "--num-layers", 2, "--dim-feedforward", 48]
STEPS = 100


def foundational(workshop, *argv):
    """The arguments of a small foundational run, with dropout so that the random state matters."""
    return [
        *("--corpus-path", workshop / "corpus.txt"),
        *("--tokenizer-path", workshop / "tokenizer"),
        *("--learning-rate", 3e-3, "--dropout", 0.1, "--max-steps", STEPS),
        *SMALL,
        *SHAPE,
        *argv,
    ]


def instruction(workshop, base, *argv):
    return [
        *("--instruction-corpus-path", workshop / "i.jsonl"),
        *("--tokenizer-path", workshop / "tokenizer"),
        *("--foundational-checkpoint", base / "best_model.pt"),
        *("--learning-rate", 1e-3, "--max-steps", STEPS),
        *SMALL,
        *argv,
    ]


def the_run_in(folder):
    (found,) = folder.iterdir()
    return found


def train(script, argv, output):
    """Train in this process to the end; returns the run folder."""
    ended = call(script, *argv, "--output-dir", output)
    assert ended.code == 0, ended.err
    return the_run_in(output)


@pytest.fixture(scope="module")
def finished(workshop, tmp_path_factory):
    """A finished foundational run that was never disturbed."""
    return train(FOUNDATIONAL, foundational(workshop, *OFTEN), tmp_path_factory.mktemp("done"))


@pytest.fixture(scope="module")
def arguments(workshop, finished):
    """The arguments of a run of each stage."""
    return {
        FOUNDATIONAL: foundational(workshop, *OFTEN),
        INSTRUCTION: instruction(workshop, finished, *OFTEN),
    }


@pytest.fixture(scope="module")
def undisturbed(finished, arguments, tmp_path_factory):
    """The finished run of each stage that the disturbed ones must equal."""
    output = tmp_path_factory.mktemp("undisturbed")
    return {FOUNDATIONAL: finished, INSTRUCTION: train(INSTRUCTION, arguments[INSTRUCTION], output)}


OFTEN = ["--eval-every", 25, "--save-every", 20, "--log-every", 5]


def read_json(path):
    return json.loads(path.read_text())


def metrics(folder):
    """All lines of the metrics stream, each of which must be whole at any time."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same_models(one, other):
    for name in ("final_model.pt", "best_model.pt"):
        left, right = (load_model(folder / name) for folder in (one, other))
        assert left.step == right.step
        weights = right.model.state_dict()
        for key, weight in left.model.state_dict().items():
            assert torch.equal(weight, weights[key]), f"{name}: {key}"


# ------------------------------------------------------------------------------------ the files


def test_a_run_leaves_the_documented_files_and_no_other(undisturbed):
    for folder in undisturbed.values():
        assert {path.name for path in folder.iterdir()} == {
            "best_model.pt",
            "final_model.pt",
            "checkpoint_step_60.pt",  # the newest two
            "checkpoint_step_80.pt",
            "training_config.json",
            "model_config.json",
            "training_log.json",
            "training_summary.json",
            "run.json",
            "metrics.jsonl",
        }


def test_folders_are_named_by_stage_and_time(undisturbed):
    stages = {FOUNDATIONAL: "foundational", INSTRUCTION: "instruction"}
    for script, folder in undisturbed.items():
        stage, _, stamp = folder.name.partition("_")
        assert stage == stages[script]
        time.strptime(stamp, "%Y%m%d_%H%M%S")


def series(folder, name):
    """All values of a figure in the metrics stream."""
    return [line[name] for line in metrics(folder) if name in line]


def test_the_loss_goes_down(undisturbed):
    losses = series(undisturbed[FOUNDATIONAL], "loss")
    assert losses[-1] < 0.5 * losses[0]
    held_out = series(undisturbed[FOUNDATIONAL], "eval_loss")
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < 0.8 * held_out[0]


def test_composed_tokens_start_as_sums(workshop, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(supervised, "fit", lambda run, task: begun.append(run) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("run_foundational_training.py", foundational(workshop), tmp_path)
    checkpoint = begun[0].checkpoint
    vectors, numbered = checkpoint.model.lm_head.weight, checkpoint.tokenizer.composed
    assert len(numbered) == 40
    for token, (digit, mark) in numbered.items():
        torch.testing.assert_close(vectors[token], vectors[digit] + vectors[mark])


def test_instruction_tuning_starts_from_the_foundational_weights(undisturbed):
    """Its held-out loss starts where that of the foundational stage ended, and sinks further."""
    before, after = (series(folder, "eval_loss") for folder in undisturbed.values())
    assert after[-1] < after[0] < before[-1] < before[0]


def test_the_best_model_is_the_first_of_the_lowest_held_out_loss(workshop, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr(SupervisedTask, "validate", lambda self, model: {"eval_loss": next(losses)})
    argv = foundational(workshop, "--max-steps", 20, "--eval-every", 5)
    folder = train(FOUNDATIONAL, argv, tmp_path)
    assert load_model(folder / "best_model.pt").step == 10
    assert load_model(folder / "final_model.pt").step == 20
    assert read_json(folder / FINISHED)["best"] == {"step": 10, "eval_loss": 1.0}
    assert read_json(folder / FINISHED)["final"] == {"step": 20, "eval_loss": 2.0}


def test_a_run_shorter_than_every_interval_has_all_files_and_figures(workshop, tmp_path):
    folder = train(FOUNDATIONAL, foundational(workshop, "--max-steps", 3), tmp_path)
    assert load_model(folder / "best_model.pt").step == 3
    (epoch,) = read_json(folder / "training_log.json")
    assert epoch["train_loss"] > 0
    assert epoch["eval_loss"] > 0


def test_the_training_log_has_one_entry_an_epoch(undisturbed):
    log = read_json(undisturbed[FOUNDATIONAL] / "training_log.json")
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4, 5, 6]  # 19 steps each
    assert all(entry["train_loss"] > 0 for entry in log)
    assert log[-1]["train_loss"] < log[0]["train_loss"]


def test_an_epochs_loss_is_the_mean_of_its_lines():
    lines = [
        {"step": 5, "steps": 5, "loss": 4.0},
        {"step": 10, "steps": 5, "loss": 2.0},
        {"step": 10, "eval_loss": 3.0},
        {"step": 15, "steps": 5, "loss": 1.0},
    ]
    assert epoch_log(lines, steps_per_epoch=10) == [
        {"epoch": 1, "train_loss": 3.0, "step": 10, "eval_loss": 3.0},
        {"epoch": 2, "train_loss": 1.0},
    ]


def test_an_epochs_loss_counts_each_step_once():
    """The end of an epoch closes a line early, and steps without an update have no loss."""
    told = [(20, 20, 2.0), (25, 5, 1.0), (30, 0, 0.0), (45, 15, 3.0)]
    lines = [dict(zip(("step", "steps", "loss"), line, strict=True)) for line in told]
    log = epoch_log(lines, steps_per_epoch=25)
    assert [entry["train_loss"] for entry in log] == [pytest.approx(1.8), 3.0]


def test_the_metrics_tell_the_learning_rate_that_was_used(workshop, tmp_path):
    argv = foundational(
        workshop,
        *("--max-steps", 20, "--warmup-steps", 2, "--log-every", 1),
        "--schedule",
        "linear",
    )
    lines = [line for line in metrics(train(FOUNDATIONAL, argv, tmp_path)) if "loss" in line]
    rates = [line["learning_rate"] / 3e-3 for line in lines]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.0, 17 / 18])
    assert rates[-1] == pytest.approx(1 / 18)


def test_run_json_tells_what_is_needed_to_repeat_the_run(undisturbed):
    for folder in undisturbed.values():
        facts = read_json(folder / "run.json")
        assert (facts["seed"], facts["device"], facts["threads"]) == (42, "cpu", 1)
        assert len(facts["corpus_sha256"]) == len(facts["tokenizer_hash"]) == 64
        assert facts["versions"]["torch"] == torch.__version__
        assert isinstance(facts["command"], list)


def test_a_checkpoint_tells_what_it_was_trained_on(undisturbed):
    for stage, folder in undisturbed.items():
        seen = load_model(folder / "best_model.pt").trained_on
        assert seen.depths == (1, 2), stage
        assert seen.num_range == (1, 9)
        assert seen.splits.keys() == {"train"}


def test_a_written_config_starts_an_equal_run(workshop, undisturbed, tmp_path):
    folder = undisturbed[FOUNDATIONAL]
    again = train(
        FOUNDATIONAL,
        [
            "--config",
            folder / "training_config.json",
            "--model-config",
            folder / "model_config.json",
        ],
        tmp_path,
    )
    assert_same_models(again, folder)


def test_the_prompt_counts_for_nothing_in_instruction_tuning(workshop, finished, tmp_path):
    """Whatever a config says that was made without the command line, which refuses the flag."""
    argv = instruction(workshop, finished, "--max-steps", 3, "--output-dir", tmp_path)
    config = parse(InstructionConfig, [str(word) for word in argv], "")
    runs = [train_instruction(replace(config, prompt_loss_weight=w)) for w in (0.0, 5.0)]
    assert_same_models(*runs)


def test_samples_beyond_the_context_are_reported_by_depth(workshop, tmp_path):
    argv = foundational(workshop, "--max-steps", 2, "--max-seq-length", 50)
    ended = call(FOUNDATIONAL, *argv, "--output-dir", tmp_path)
    assert ended.code == 0
    assert "corpus.txt are longer than 50 tokens and left out (" in ended.out
    assert "of depth 2" in ended.out


def test_held_out_samples_beyond_the_context_are_reported_and_count_as_wrong(
    workshop, tmp_path, monkeypatch
):
    """A model that knows every token of what it can read is exact on just that share."""

    def all_known(model, batch):
        logits, targets, weights = counted_logits(model, batch)
        if not torch.is_grad_enabled():
            logits = 100.0 * torch.nn.functional.one_hot(targets, logits.shape[-1])
        return logits, targets, weights

    monkeypatch.setattr(supervised, "counted_logits", all_known)
    argv = foundational(workshop, "--max-steps", 1, "--max-seq-length", 60)
    ended = call(FOUNDATIONAL, *argv, "--output-dir", tmp_path)
    tokenizer = ArithmeticTokenizer.load(workshop / "tokenizer")
    spec = coverage_of(workshop / "corpus.txt").held_out_spec()
    drawn = distinct_samples(spec, 20, seed=42, split="validation")
    depths = Counter(
        sample.depth
        for sample in drawn
        if len(tokenizer.encode_batch([sample.record.sequence])[0]) > 58
    )
    assert 0 < depths[2] == depths.total() < len(drawn)
    assert (
        f"warning: {depths[2]} of {len(drawn)} held-out samples are longer than 60 tokens and left "
        f"out of eval_loss and wrong in eval_exact ({depths[2]} of depth 2); "
        "raise --max-seq-length, or make a corpus of shallower problems\n"
    ) in ended.out
    (last,) = series(the_run_in(tmp_path), "eval_exact")
    assert last == 1 - depths[2] / len(drawn)


@pytest.mark.parametrize(
    ("context", "what"),
    [(8, "samples of {corpus}"), (16, "held-out samples")],  # "5 +" has 9 tokens, "1 + 2" has 22
)
def test_a_context_that_no_sample_fits_into_is_an_error(workshop, tmp_path, context, what):
    argv = foundational(workshop, "--max-seq-length", context)
    ended = call(FOUNDATIONAL, *argv, "--output-dir", tmp_path / "out")
    assert ended.code == 2
    named = what.format(corpus=workshop / "corpus.txt")
    assert ended.error_lines == [
        f"error: all {named} are longer than {context} tokens; raise --max-seq-length, or make a "
        "corpus of shallower problems"
    ]
    assert not (tmp_path / "out").exists()


def test_a_context_for_rewritings_alone_is_an_error(workshop, tmp_path):
    step = rewriting("3 - 2 + 2", solve("3 - 2 + 2"), 2, 2)
    samples = [step, solved("((1 + 2) - 3) + (4 - (5 + 6))")]
    (tmp_path / "c.jsonl").write_text("".join(map(json_line, samples)))
    argv = foundational(workshop, "--max-seq-length", 30, "--corpus-path", tmp_path / "c.jsonl")
    ended = call(FOUNDATIONAL, *argv, "--output-dir", tmp_path / "out")
    assert ended.code == 2
    assert "c.jsonl are longer than 30 tokens; raise --max-seq-length" in ended.error_lines[0]


# ------------------------------------------------------------------------------------- disturbed


def start(script, argv, output, cwd):
    """Start a run as a process of its own and wait until it has made its folder."""
    log = open(cwd / "log.txt", "a")  # noqa: SIM115
    process = subprocess.Popen(
        [*command(script), *map(str, argv), "--output-dir", str(output)],
        env=one_thread(),
        stdout=log,
        stderr=log,
    )
    wait_until(process, lambda: output.exists() and any(output.glob("*/training_config.json")))
    return process, the_run_in(output)


def wait_until(process, condition):
    for _ in range(60_000):
        if condition():
            return
        assert process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.002)
    raise TimeoutError


def resume(script, folder):
    """Resume in a process of its own."""
    log = open(folder.parent.parent / "log.txt", "a")  # noqa: SIM115
    return subprocess.Popen(
        [*command(script), "--resume", str(folder)], env=one_thread(), stdout=log, stderr=log
    )


def last_step(folder):
    return max((line["step"] for line in metrics(folder)), default=0)


def kill(process, folder, after_step):
    """SIGKILL at a random moment after the stream shows a step."""
    wait_until(process, lambda: last_step(folder) >= after_step)
    time.sleep(random.random() * 0.03)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / FINISHED).exists()


unix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


@unix
@pytest.mark.parametrize("script", [FOUNDATIONAL, INSTRUCTION])
def test_a_run_killed_again_and_again_ends_bit_identical(script, arguments, undisturbed, tmp_path):
    process, folder = start(script, arguments[script], tmp_path / "models", tmp_path)
    process.kill()  # before its first checkpoint
    process.wait()
    assert not [*folder.glob("checkpoint_step_*")]
    kill(resume(script, folder), folder, after_step=random.randint(5, 35))
    kill(resume(script, folder), folder, after_step=random.randint(40, 70))
    ended = call(script, "--resume", folder)
    assert ended.code == 0, ended.err
    assert "it has no checkpoint yet, so it starts over" in (tmp_path / "log.txt").read_text()
    assert_same_models(folder, undisturbed[script])
    steps = [line["step"] for line in metrics(folder)]
    assert steps == sorted(steps)
    assert len(steps) == len(metrics(undisturbed[script]))
    assert {p.name for p in folder.iterdir()} == {p.name for p in undisturbed[script].iterdir()}


@unix
@pytest.mark.parametrize("script", [FOUNDATIONAL, INSTRUCTION])
def test_ctrl_c_saves_and_the_run_goes_on(script, arguments, undisturbed, tmp_path):
    process, folder = start(script, arguments[script], tmp_path / "models", tmp_path)
    wait_until(process, lambda: last_step(folder) >= 33)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    *before, saved, interrupted = (tmp_path / "log.txt").read_text().splitlines()
    assert (saved, interrupted) == (f"saved; go on with --resume {folder}", "interrupted")
    assert (
        "finishing the step at hand and saving; a second Ctrl-C ends at once without saving"
        in before
    )
    saved = max(folder.glob("checkpoint_step_*.pt"), key=lambda path: path.stat().st_mtime)
    assert load_model(saved).step >= last_step(folder) - 5
    ended = call(script, "--resume", folder)
    assert ended.code == 0, ended.err
    assert "at step" in ended.out
    assert_same_models(folder, undisturbed[script])


def test_what_fails_after_the_last_step_costs_no_training(
    workshop, undisturbed, tmp_path, monkeypatch
):
    """A full disk, say, or a base that has moved: the last step is saved before."""

    write = Run.write_json

    def on_a_full_disk(run, name, value):
        if name == FINISHED:
            raise UserError("the disk is full")
        write(run, name, value)

    argv = foundational(workshop, *OFTEN, "--output-dir", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_json", on_a_full_disk)
        ended = call(FOUNDATIONAL, *argv)
    assert ended.code == 2
    folder = the_run_in(tmp_path / "out")
    before = metrics(folder)
    monkeypatch.setattr(loop, "train_step", None)
    ended = call(FOUNDATIONAL, "--resume", folder)
    assert ended.code == 0, ended.err
    assert f"at step {STEPS}\n" in ended.out
    assert metrics(folder) == before
    assert_same_models(folder, undisturbed[FOUNDATIONAL])
    assert not (folder / f"checkpoint_step_{STEPS}.pt").exists()


def test_the_settings_of_the_newest_run_are_found_by_the_literal_stamp(
    workshop, undisturbed, tmp_path
):
    shutil.copytree(undisturbed[FOUNDATIONAL], tmp_path / "out" / undisturbed[FOUNDATIONAL].name)
    settings = tmp_path / "out" / "foundational_YYYYMMDD_HHMMSS" / "training_config.json"
    argv = ("--config", settings, "--max-steps", 1, *SHAPE, "--output-dir", tmp_path / "new")
    ended = call(FOUNDATIONAL, *argv)
    assert ended.code == 0, ended.err
    assert f"{settings} -> " in ended.out
    kept = read_json(the_run_in(tmp_path / "new") / "training_config.json")
    assert kept["corpus_path"] == str(workshop / "corpus.txt")


def test_a_run_is_resumed_by_the_script_of_its_stage_alone(unfinished):
    before = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    for script in (INSTRUCTION, "run_instruction_training_lora.py", "run_grpo_training.py"):
        ended = call(script, "--resume", unfinished)
        assert ended.code == 2
        said = f"error: {unfinished}: is a run of stage foundational; resume it with the script of"
        assert ended.err.startswith(said)
    assert {path.name: path.read_bytes() for path in unfinished.iterdir()} == before


def test_a_depth_of_which_no_sample_fits_was_not_trained_on(workshop, tmp_path):
    argv = foundational(workshop, "--max-steps", 2, "--max-seq-length", 34)
    ended = call(FOUNDATIONAL, *argv, "--output-dir", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert re.search(
        r"samples of .* are longer than 34 tokens and left out \(.* of depth 2", ended.out
    )
    model = read_checkpoint(the_run_in(tmp_path / "out") / "best_model.pt")
    assert model.trained_on.depths == (1,)
    assert coverage_of(workshop / "corpus.txt").depths == (1, 2)


@pytest.fixture
def unfinished(workshop, undisturbed, tmp_path):
    """A copy of the foundational run as it was at step 80, and of what it learns from."""
    folder = shutil.copytree(undisturbed[FOUNDATIONAL], tmp_path / "run")
    for name in (FINISHED, "final_model.pt", "training_log.json"):
        (folder / name).unlink()
    shutil.copytree(workshop, tmp_path / "workshop")
    config = read_json(folder / "training_config.json")
    config["corpus_path"] = str(tmp_path / "workshop" / "corpus.txt")
    config["tokenizer_path"] = str(tmp_path / "workshop" / "tokenizer")
    (folder / "training_config.json").write_text(json.dumps(config))
    return folder


def refused(folder, *argv):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ended = call(FOUNDATIONAL, "--resume", folder, *argv)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    return ended.err


def test_a_damaged_last_checkpoint_is_no_reason_to_start_over(unfinished, undisturbed):
    last = unfinished / "checkpoint_step_80.pt"
    last.write_bytes(last.read_bytes()[:1000])
    ended = call(FOUNDATIONAL, "--resume", unfinished)
    assert ended.code == 0
    assert "trying the one before" in ended.err
    assert "at step 60" in ended.out
    assert_same_models(unfinished, undisturbed[FOUNDATIONAL])


def test_a_damaged_later_checkpoint_displaces_no_good_one(unfinished, opened):
    later = unfinished / "checkpoint_step_200.pt"
    later.write_bytes(b"half")
    assert call(FOUNDATIONAL, "--resume", unfinished).code == 0
    (run,) = opened
    assert (run.step, run.config.keep_checkpoints) == (80, 2)
    run.step = 85
    run.save_step()
    steps = {int(path.stem.rpartition("_")[2]) for path in unfinished.glob("checkpoint_step_*.pt")}
    assert steps == {80, 85, 200}


@pytest.mark.parametrize(("step", "lost"), [(80, False), (90, True), (None, True)])
def test_a_best_model_that_the_run_has_yet_to_make_again_is_not_the_best(
    unfinished, opened, step, lost
):
    best = unfinished / "best_model.pt"
    edit(best, lambda content: content.update(step=step))  # None: a damaged file
    assert call(FOUNDATIONAL, "--resume", unfinished).code == 0
    assert math.isinf(opened[0].best) == lost


def test_the_summary_tells_of_the_best_model_that_is_there(unfinished):
    """The figure to beat was of a step that a kill has taken, and does not come again."""
    edit(unfinished / "best_model.pt", lambda content: content.update(step=90))
    edit(unfinished / "checkpoint_step_80.pt", lambda content: content["training"].update(best=0.0))
    assert call(FOUNDATIONAL, "--resume", unfinished).code == 0
    told = read_json(unfinished / FINISHED)["best"]
    assert told["step"] == read_checkpoint(unfinished / "best_model.pt").step > 90
    assert told in metrics(unfinished)


def test_an_unknown_past_stays_unknown(workshop, undisturbed, tmp_path):
    start = shutil.copy(undisturbed[FOUNDATIONAL] / "best_model.pt", tmp_path)
    edit(Path(start), lambda content: content.update(trained_on={}))
    argv = instruction(workshop, tmp_path, "--max-steps", 1)
    folder = train(INSTRUCTION, argv, tmp_path / "runs")
    assert read_checkpoint(folder / "final_model.pt").trained_on is None


def test_what_is_not_resumable_is_passed_over(unfinished, undisturbed):
    """A copy of a model under the name of a step, an older run's say."""
    shutil.copy(unfinished / "best_model.pt", unfinished / "checkpoint_step_90.pt")
    ended = call(FOUNDATIONAL, "--resume", unfinished)
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("warning")]
    assert str(unfinished / "checkpoint_step_90.pt") in line
    assert "not what training goes on with" in line
    assert "at step 80" in ended.out
    assert_same_models(unfinished, undisturbed[FOUNDATIONAL])


def test_a_run_without_any_checkpoint_that_will_do_starts_over_unchanged(unfinished, undisturbed):
    """What is passed over leaves no trace in the weights that the run starts from."""
    for path in unfinished.glob("checkpoint_step_*"):
        path.unlink()
    shutil.copy(unfinished / "best_model.pt", unfinished / "checkpoint_step_90.pt")
    ended = call(FOUNDATIONAL, "--resume", unfinished)
    assert ended.code == 0, ended.err
    assert "none of its checkpoints will do, so it starts over" in ended.out
    assert_same_models(unfinished, undisturbed[FOUNDATIONAL])


def misfits(training):
    """Changes to values of the right type that no run could go on with."""
    groups = training["optimizer"]["param_groups"]
    for path, value in (
        (("rng",), torch.zeros(3, dtype=torch.uint8)),
        (("rng",), training["rng"].float()),
        (("rng",), torch.full_like(training["rng"], 255)),
        (("cuda_rng",), ["text"]),
        (("threads",), 0),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
        (("optimizer", "state", 999), training["optimizer"]["state"][0]),
        (("optimizer", "param_groups"), groups[:-1]),
        (("optimizer", "param_groups"), [{**group, "params": [0]} for group in groups]),
        (("optimizer", "param_groups"), [{**group, "lr": "fast"} for group in groups]),
        (("optimizer", "param_groups"), [{"params": group["params"]} for group in groups]),
    ):
        yield (*path, value), partial(put, path, value)


@pytest.fixture
def opened(monkeypatch):
    return runs_that_a_script_opens(monkeypatch)


def runs_that_a_script_opens(monkeypatch):
    """A list of them, each as it stands when training would begin."""
    runs = []
    monkeypatch.setattr(
        supervised, "fit", lambda run, *_: runs.append(run) or {"best": {"eval_loss": 0.0}}
    )
    return runs


@pytest.mark.parametrize(
    ("asked", "on", "now"),
    [("auto", "cpu", "before"), ("auto", "cuda:0", "tried"), ("fp32", "cpu", "asked")],
)
def test_a_resumed_run_keeps_the_precision_that_a_trial_chose(
    unfinished, opened, monkeypatch, asked, on, now
):
    """Unless it says which, or goes on on a device of another kind."""
    for name, changed in (
        ("run.json", {"precision": "bfloat16", "device": on}),
        ("training_config.json", {"precision": asked}),
    ):
        path = unfinished / name
        path.write_text(json.dumps({**read_json(path), **changed}))
    monkeypatch.setattr(runtime, "bf16_pays", lambda device: False)
    assert call(FOUNDATIONAL, "--resume", unfinished).code == 0
    precision = torch.bfloat16 if now == "before" else torch.float32
    assert (opened[0].precision, opened[0].optimizer.precision) == (precision, precision)


def test_a_resumed_run_says_what_gives_it_other_bits(unfinished, opened, monkeypatch):
    monkeypatch.setattr(kernels, "in_use", lambda device: "other")
    monkeypatch.setattr(kernels, "failure", lambda device: "cc has gone")
    ended = call(FOUNDATIONAL, "--resume", unfinished)
    assert (ended.code, opened[0].step) == (0, 80)
    assert "before, now other; its weights will not be bit-identical" in ended.err
    assert "compiled functions; there are none, since cc has gone" in ended.out


def test_a_run_of_before_there_were_compiled_functions_goes_on(unfinished, opened, monkeypatch):
    monkeypatch.setattr(kernels, "in_use", lambda device: "compiled")
    edit(unfinished / "checkpoint_step_80.pt", lambda content: content["training"].pop("kernels"))
    ended = call(FOUNDATIONAL, "--resume", unfinished)
    assert (ended.code, opened[0].step) == (0, 80)
    assert "kernels of this run: torch before, now compiled" in ended.err


def test_a_step_with_other_weights_is_passed_over(unfinished, opened):
    last = unfinished / "checkpoint_step_80.pt"
    edit(last, lambda content: content["weights"].pop("lm_head.weight"))
    ended = call(FOUNDATIONAL, "--resume", unfinished)
    assert ended.code == 0, ended.err
    assert f"{last}: cannot be resumed from (weight lm_head.weight is missing)" in ended.err
    assert opened[0].step == 60


def resumed_with(changes, good, last):
    """Resume from a copy of a checkpoint with each of some changes to its training state.

    It is passed over with one warning; yields the change's place, when the run has been opened.
    """
    for place, change in changes:
        shutil.copy(good, last)
        edit(last, lambda content, change=change: change(content["training"]))
        ended = call(FOUNDATIONAL, "--resume", last.parent)
        assert ended.code == 0, (place, ended.err)
        assert ended.err.startswith(f"warning: {last}: "), (place, ended.err)
        assert ended.err.count("\n") == 1, place
        yield place


def test_a_training_state_damaged_anywhere_is_passed_over_and_leaves_no_trace(unfinished, opened):
    """Each key taken away or of another type; the run then starts over as if there were no file."""
    (unfinished / "checkpoint_step_60.pt").unlink()
    last = unfinished / "checkpoint_step_80.pt"
    good = last.rename(unfinished / "good.pt")
    assert call(FOUNDATIONAL, "--resume", unfinished).code == 0
    start, start_rng = opened.pop().model.state_dict(), torch.get_rng_state()
    training = torch.load(good, weights_only=True)["training"]
    needed = {name: training[name] for name in training if name not in OF_BEFORE}
    changes = [*damages(training), *removals(needed), *misfits(training)]
    assert len(changes) > 50
    for place in resumed_with(changes, good, last):
        run = opened.pop()
        assert (run.step, run.best, run.optimizer.state_dict()["state"]) == (0, math.inf, {}), place
        assert torch.equal(torch.get_rng_state(), start_rng), place
        for name, weight in run.model.state_dict().items():
            assert torch.equal(weight, start[name]), place


def test_a_workers_state_damaged_anywhere_is_passed_over(workshop, tmp_path, monkeypatch):
    """A run that stands between two means."""
    more = ("--workers", 2, "--local-steps", 99, "--max-steps", 10, "--save-every", 5)
    folder = train(FOUNDATIONAL, foundational(workshop, *more, "--keep-checkpoints", 0), tmp_path)
    (folder / FINISHED).unlink()
    last = folder / "checkpoint_step_5.pt"
    good = last.rename(folder / "good.pt")
    opened = runs_that_a_script_opens(monkeypatch)
    workers = torch.load(good, weights_only=True)["training"]["workers"]
    weights = workers[0]["weights"]
    assert not torch.equal(weights[0], workers[1]["weights"][0])
    changes = [
        *damages({"workers": workers}),
        *damages(workers[0], ("workers", 0)),
        *(
            (path, partial(put, path, value))
            for path, value in (
                (("workers",), workers[:1]),
                (("workers", 1, "weights"), weights[:-1]),
                (("workers", 0, "weights", 0), torch.zeros(3)),
                (("workers", 1, "optimizer", "state"), {}),
            )
        ),
    ]
    for place in resumed_with(changes, good, last):
        run = opened.pop()
        assert [each.step for each in (run, *run.workers)] == [0, 0, 0], place
        for worker in run.workers:
            assert all(map(torch.equal, worker.trained, run.trained)), place
    shutil.copy(good, last)
    assert call(FOUNDATIONAL, "--resume", folder).code == 0
    (run,) = opened
    for worker, saved in zip(run.workers, workers, strict=True):
        assert worker.step == 5
        assert all(map(torch.equal, worker.trained, saved["weights"]))


@pytest.mark.parametrize(
    "torn",
    ['{"step": 5, "a": {}', '{"step": 5, "a": {"b"}', '{"st', "\0" * 40, "5", "[]", '{"a": 1}'],
)
def test_a_line_of_metrics_that_is_not_whole_is_passed_over(unfinished, undisturbed, torn):
    with open(unfinished / "metrics.jsonl", "a") as file:
        file.write(torn)
    ended = call(FOUNDATIONAL, "--resume", unfinished)
    assert ended.code == 0, ended.err
    steps = [[line["step"] for line in metrics(f)] for f in (unfinished, undisturbed[FOUNDATIONAL])]
    assert steps[0] == steps[1]


def test_a_byte_of_metrics_that_is_no_text_costs_its_line_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n{"step": 2, "\xff": \xfe}\n{"step": 3}\n'
    )
    assert MetricsLog(tmp_path).read() == [{"step": 1}, {"step": 3}]


def test_a_resumed_run_remembers_its_best(workshop, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 3.0, 3.0])
    monkeypatch.setattr(SupervisedTask, "validate", lambda *_: {"eval_loss": next(losses)})
    argv = foundational(workshop, "--max-steps", 15, "--eval-every", 5, "--save-every", 10)
    folder = train(FOUNDATIONAL, argv, tmp_path)
    (folder / FINISHED).unlink()
    assert call(FOUNDATIONAL, "--resume", folder).code == 0
    assert load_model(folder / "best_model.pt").step == 5
    assert read_json(folder / FINISHED)["best"]["step"] == 5


def test_a_changed_corpus_is_refused_on_resume(unfinished):
    with open(unfinished.parent / "workshop" / "corpus.txt", "a") as file:
        file.write("Evaluate: 1 + 2\n<think> </think> Final Result: 3\n")
    assert "corpus" in refused(unfinished)


def test_a_changed_tokenizer_is_refused_on_resume(unfinished):
    workshop = unfinished.parent / "workshop"
    made = call(
        "train_tokenizer.py",
        *("--corpus-path", workshop / "corpus.txt", "--output-dir", workshop / "tokenizer"),
        *("--vocab-size", 160),
    )
    assert made.code == 0
    assert "tokenizer" in refused(unfinished)


def test_other_settings_are_refused_on_resume(unfinished):
    assert refused(unfinished, "--learning-rate", 1) == (
        f"error: --learning-rate 1.0: {unfinished} runs with 0.003; "
        "leave it out, or start a new run\n"
    )
    assert "--d-model" in refused(unfinished, "--d-model", 64)


def test_a_finished_run_is_not_resumed(undisturbed):
    folder = undisturbed[FOUNDATIONAL]
    start = f"start a new run with --init-from {folder / 'final_model.pt'}"
    assert f"{folder}: is finished; {start}\n" in refused(folder)


# ------------------------------------------------------------------------------ other beginnings


def test_init_from_starts_a_new_run_from_old_weights(workshop, undisturbed, tmp_path):
    base = undisturbed[INSTRUCTION] / "final_model.pt"
    argv = [
        *("--corpus-path", workshop / "corpus.txt", "--tokenizer-path", workshop / "tokenizer"),
        *("--init-from", base, "--max-steps", 1, "--learning-rate", 1e-9, *SMALL),
    ]
    folder = train(FOUNDATIONAL, argv, tmp_path)
    left, right = (load_model(path).model for path in (base, folder / "final_model.pt"))
    for one, other in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_init_from_takes_the_place_of_the_foundational_checkpoint(workshop, undisturbed, tmp_path):
    base = undisturbed[FOUNDATIONAL] / "final_model.pt"
    given = instruction(workshop, undisturbed[FOUNDATIONAL], "--max-steps", 1)
    at = given.index("--foundational-checkpoint")
    argv = [*given[:at], *given[at + 2 :]]
    ended = call(INSTRUCTION, *argv, "--output-dir", tmp_path)
    assert ended.err == (
        "error: --foundational-checkpoint is required without --init-from; see --help\n"
    )
    folder = train(INSTRUCTION, [*argv, "--init-from", base], tmp_path)
    assert read_json(folder / "run.json")["start_hash"] == weights_hash(load_model(base).model)
    ended = call(INSTRUCTION, *given, "--init-from", base)
    assert ended.code == 2
    assert "--foundational-checkpoint" in ended.err
    assert f"has no effect while init_from is {base} (from the command line)" in ended.err


def test_a_stamped_base_is_remembered_by_its_real_name(
    workshop, undisturbed, tmp_path, monkeypatch
):
    """A later foundational run must not become the base of a resumed instruction run."""
    models = tmp_path / "models"
    shutil.copytree(undisturbed[FOUNDATIONAL], models / "foundational_20250101_000000")
    monkeypatch.chdir(tmp_path)
    literal = [
        "models/foundational_YYYYMMDD_HHMMSS/best_model.pt" if "best_model" in str(word) else word
        for word in instruction(workshop, undisturbed[FOUNDATIONAL], "--max-steps", 2)
    ]
    folder = train(INSTRUCTION, literal, tmp_path / "out")
    base = read_json(folder / "training_config.json")["foundational_checkpoint"]
    assert base == "models/foundational_20250101_000000/best_model.pt"


def test_the_context_of_a_base_can_be_changed(workshop, undisturbed, tmp_path):
    argv = instruction(workshop, undisturbed[FOUNDATIONAL], "--max-steps", 2)
    folder = train(INSTRUCTION, [*argv, "--max-seq-length", 300], tmp_path)
    assert load_model(folder / "best_model.pt").model.config.max_seq_length == 300


def test_another_tokenizer_than_the_bases_is_refused(workshop, undisturbed, tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    argv = instruction(workshop, undisturbed[FOUNDATIONAL], "--tokenizer-path", tmp_path)
    ended = call(INSTRUCTION, *argv, "--output-dir", tmp_path / "out")
    assert ended.code == 2
    assert "not the tokenizer" in ended.err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ bad endings


MUON = ["--optimizer", "muon", "--muon-learning-rate", 1e30]


@pytest.mark.parametrize(
    ("rates", "remedy"),
    [
        (["--learning-rate", 1e30], "lower --learning-rate"),
        (MUON, "lower --muon-learning-rate or --learning-rate"),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(workshop, tmp_path, rates, remedy):
    argv = foundational(workshop, *rates, "--warmup-steps", 0)
    ended = call(FOUNDATIONAL, *argv, "--output-dir", tmp_path)
    assert ended.code == 2
    assert ended.error_lines == [ended.err.splitlines()[-1]]
    assert ended.error_lines[0].endswith(f"; {remedy}")
    assert not (the_run_in(tmp_path) / "final_model.pt").exists()


def test_a_held_out_loss_of_nan_ends_the_run(workshop, tmp_path, monkeypatch):
    """The last update is seen by no training loss."""
    monkeypatch.setattr(SupervisedTask, "validate", lambda *_: {"eval_loss": float("nan")})
    argv = foundational(workshop, "--max-steps", 2, "--optimizer", "muon")
    ended = call(FOUNDATIONAL, *argv, "--output-dir", tmp_path)
    assert ended.code == 2
    assert ended.err.endswith("; lower --muon-learning-rate or --learning-rate\n")
    assert not (the_run_in(tmp_path) / FINISHED).exists()


def test_the_expected_time_is_printed_at_the_start(workshop, tmp_path):
    ended = run(FOUNDATIONAL, *foundational(workshop, "--max-steps", 30), "--output-dir", tmp_path)
    assert ended.code == 0
    assert "expected time for this run: about" in ended.err
    assert "30 steps, seed 42" in ended.out
