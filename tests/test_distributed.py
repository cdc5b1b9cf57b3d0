"""Several gloo processes do what one does: every stage, kills, resuming, and what they say."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ROOT,
    Ended,
    call,
    checkpoint_of,
    command,
    on_threads,
    one_thread,
    random_model,
    records,
)
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from arithmetic_llm import distributed
from arithmetic_llm.config import RunConfig, TrainingConfig
from arithmetic_llm.corpus.files import json_line
from arithmetic_llm.distributed import Place, gather_shares, is_mine, share
from arithmetic_llm.folders import FINISHED
from arithmetic_llm.model.checkpoint import read_checkpoint, save_checkpoint
from arithmetic_llm.runtime import UserError
from arithmetic_llm.training import workers as workers_module
from arithmetic_llm.training.gradients import _LossModule
from arithmetic_llm.training.step import seed_dropout
from arithmetic_llm.training.workers import require_a_worker_each

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")

FOUNDATIONAL, GRPO = "run_foundational_training.py", "run_grpo_training.py"
STEPS = 20
SAMPLES = 64  # 9 batches of 7, and one of 1: fewer samples than processes


@pytest.fixture(scope="module")
def world(trained_model, tokenizer, tmp_path_factory):
    """A folder with a model that is right now and then, its tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint(folder / "start.pt", checkpoint_of(trained_model, tokenizer))
    tokenizer.save(folder / "tokenizer")
    others = ("typed", "padded", "flat", "drill", "invalid")
    rates = {f"{style}_rate": 0.0 for style in others}
    corpus = records(SAMPLES, num_range=(1, 9), max_depth=2, **rates)
    (folder / "i.jsonl").write_text("".join(map(json_line, corpus)))
    return folder


COMMON = (
    *("--device", "cpu", "--threads", 1, "--precision", "fp32", "--max-steps", STEPS),
    *("--eval-samples", 10, "--eval-every", 10, "--log-every", 1),
)
SHAPE = ("--d-model", 32, "--nhead", 2, "--num-layers", 2, "--dim-feedforward", 48)


def foundational(world, *more):
    start = ("--corpus-path", world / "i.jsonl", "--tokenizer-path", world / "tokenizer")
    return FOUNDATIONAL, [*start, *SHAPE, "--batch-size", 7, *COMMON, *more]


def instruction(script, world, *more):
    return script, [
        *("--instruction-corpus-path", world / "i.jsonl"),
        *("--tokenizer-path", world / "tokenizer"),
        *("--foundational-checkpoint", world / "start.pt", "--batch-size", 7, *COMMON, *more),
    ]


def grpo(world, *more):
    return GRPO, [
        *("--tokenizer", world / "tokenizer", "--sft-checkpoint", world / "start.pt"),
        *("--data-mode", "generated", "--max-depth", 2, "--num-range", 1, 9),
        *(*COMMON, *more),
    ]


MUON = ("--optimizer", "muon", "--muon-learning-rate", 0.005)


def trainings(world):
    """A run of each kind, by name."""
    lora = "run_instruction_training_lora.py"
    return {
        "foundational": foundational(world, "--dropout", 0, "--learning-rate", 1e-3, *MUON),
        "instruction": instruction(
            *("run_instruction_training.py", world, "--gradient-accumulation-steps", 2),
        ),
        "lora": instruction(lora, world, "--lora-rank", 4, "--save-merged-model", *MUON),
        "grpo": grpo(
            *(world, "--batch-size", 3, "--num-candidates", 4, "--adaptive-difficulty"),
            *("--refill-rounds", 1, "--num-iterations", 2, "--micro-batch-size", 2),
        ),
        "grpo, two groups": grpo(
            *(world, "--batch-size", 2, "--num-candidates", 2, "--temperature", 0.5),
            *("--kl-penalty-coef", 0, "--sft-replay-coef", 0.1, "--lora-rank", 4, *MUON),
        ),
    }


def with_dropout(world):
    """A run whose random numbers matter."""
    return foundational(world, "--dropout", 0.2, "--learning-rate", 1e-3, "--save-every", 5)


def with_workers(world, *more):
    """Local SGD of two, with dropout, in rounds that neither saving nor evaluating goes by."""
    return foundational(
        *(world, "--workers", 2, "--local-steps", 4, "--dropout", 0.2, "--learning-rate", 1e-3),
        *(*MUON, "--save-every", 6, *more),
    )


def evaluation(world):
    asked = ("--num-samples", 40, "--max-depth", 2, "--num-range", 1, 9, "--batch-size", 16)
    return "run_evaluation.py", ["--model-path", world / "start.pt", *asked]


def torchrun(processes, *words, **environment):
    """Have PyTorch's own launcher run a script to its end."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    done = subprocess.run(
        [*launcher, "--nproc_per_node", str(processes), *map(str, words)],
        env={**one_thread(), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def ended(world, tmp_path_factory):
    """A function of a number of processes: how all runs ended, and their folders by name."""
    top = tmp_path_factory.mktemp("runs")
    jobs = {**trainings(world), "evaluation": evaluation(world)}

    @cache
    def run(processes):
        outputs = {name: top / str(processes) / name for name in jobs}
        lines = [(s, [*map(str, a), "--output-dir", str(outputs[n])]) for n, (s, a) in jobs.items()]
        way = in_this_process(lines) if processes == 1 else in_turn(processes, lines, top)
        return way, outputs

    return run


def in_this_process(lines):
    """One script after the other, as one."""
    ways = [call(script, *argv) for script, argv in lines]
    assert {way.code for way in ways} == {0}, ways[-1].err
    out, err = ("".join(getattr(way, stream) for way in ways) for stream in ("out", "err"))
    return Ended(0, out, err)


def in_turn(processes, lines, folder):
    """One script after the other in each of several processes."""
    (folder / "jobs.json").write_text(json.dumps(lines))
    way = torchrun(processes, ROOT / "tests" / "in_turn.py", folder / "jobs.json")
    assert way.code == 0, way.err
    return way


def the_run_in(folder):
    (found,) = folder.iterdir()
    return found


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def largest_gap(run, other, name="final_model.pt"):
    """The largest distance between two tensors of a name, relative to their norm."""
    ours, theirs = (read_checkpoint(folder / name).weights for folder in (run, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).norm() / ours[key].norm()) for key in ours)


# ------------------------------------------------------------------------- as one process does


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_do_what_one_does(ended, processes):
    """In one test, so that tests that run side by side do not launch all of it several times."""
    (one, one_outputs), (other, other_outputs) = ended(1), ended(processes)
    for name in trainings(Path()):
        runs = the_run_in(one_outputs[name]), the_run_in(other_outputs[name])
        check_weights(*runs)
        check_figures(*runs)
        check_files(*runs, processes)
    check_evaluations(one_outputs["evaluation"], other_outputs["evaluation"])
    for stream in ("out", "err"):
        assert lines_said(other, stream) == lines_said(one, stream)
    check_dead_groups(the_run_in(one_outputs["grpo, two groups"]))
    assert not torch.distributed.is_initialized()  # one process needs no group


def check_weights(one, other):
    for file in ("final_model.pt", "best_model.pt"):
        assert largest_gap(one, other, file) < 1e-5, (other, file)


def check_figures(one, other):
    ours, theirs = lines_of(one), lines_of(other)
    assert len(ours) == len(theirs)
    for line, same in zip(ours, theirs, strict=True):
        assert line.keys() == same.keys()
        timed = {key for key in line if key.startswith(("seconds", "tokens_per"))}
        for key in line.keys() - timed:
            assert same[key] == pytest.approx(line[key], rel=1e-3, abs=1e-5), (other, key)


def check_files(one, other, processes):
    assert {path.name for path in other.iterdir()} == {path.name for path in one.iterdir()}
    assert json.loads((other / "run.json").read_text())["processes"] == processes


def check_evaluations(one, other):
    """Alike to the letter, but for the last digits of gaps between logits, which are rounding."""
    for sample, same in zip(*(stored(f, "sample_outputs") for f in (one, other)), strict=True):
        assert same.pop("margin") == pytest.approx(sample.pop("margin"), abs=1e-4)
        assert same == sample
    ours, theirs = (stored(folder, "evaluation_metrics") for folder in (one, other))
    rounding = {"seconds", "tokens_per_second", "near_ties"}  # gaps below 1e-4, rounding included
    assert {key for key in ours if ours[key] != theirs[key]} <= rounding


def stored(folder, kind):
    (path,) = folder.glob(f"{kind}_*.json")
    return json.loads(path.read_text())


def lines_said(way, stream):
    """Every line with its count, paths, times and figures left out."""
    text = re.sub(r"\d{8}_\d{6}|/runs\d*/\d|[\d.]+(e-\d+|s\b)?", "#", getattr(way, stream))
    return Counter(line for line in text.splitlines() if "expected time" not in line)


def check_dead_groups(run):
    """Of two groups one, or both: a process had nothing to learn from, and then none had."""
    shares = {line["frac_reward_zero_std"] for line in lines_of(run) if "loss" in line}
    assert shares >= {0.5, 1.0}


@pytest.mark.parametrize("dropout", [0, 0.2])
@pytest.mark.parametrize(
    ("local_steps", "ways"),
    [(4, ((1, 1), (2, 1), (2, 2), (1, 3))), (0, ((1, 1), (2, 1), (1, 3)))],
    ids=["local SGD", "in turn"],
)
def test_a_worker_is_the_same_in_a_thread_or_a_process(world, tmp_path, dropout, local_steps, ways):
    """Bit for bit: three on one core, on two threads, in two processes and in three."""
    large = ("--d-model", 192, "--dim-feedforward", 256, "--max-steps", 8)
    runs = []
    for threads, processes in ways:
        output = tmp_path / f"{threads} {processes}"
        more = (*large, "--dropout", dropout, "--threads", threads, "--output-dir", output)
        script, argv = with_workers(world, "--workers", 3, "--local-steps", local_steps, *more)
        if processes == 1:
            assert call(script, *argv).code == 0
        else:
            in_turn(processes, [(script, [*map(str, argv)])], tmp_path)
        runs.append(the_run_in(output))
    for other in runs[1:]:
        assert largest_gap(runs[0], other) == 0
        check_figures(runs[0], other)
    sizes = [(run / "checkpoint_step_6.pt").stat().st_size for run in runs]
    assert max(sizes) < 1.1 * min(sizes)  # parts of a vector would each be saved as all of it


@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_that_fails_ends_those_that_wait_for_their_turn(world, tmp_path, threads):
    script, argv = with_workers(world, "--local-steps", 0, "--threads", threads, "--dropout", 0)
    with on_threads(threads):
        ended = call(script, *argv, "--muon-learning-rate", 1e30, "--output-dir", tmp_path)
    assert ended.code == 2
    assert re.search(
        "error: the (loss|gradient norm) is (nan|inf) at step [0-9]+; lower", ended.err
    )


def test_a_worker_is_computed_on_one_core_even_where_it_is_alone(world, tmp_path, monkeypatch):
    """As with dropout, one after the other: sums of several threads have other last bits."""
    threads, original = [], workers_module.train_step
    monkeypatch.setattr(
        workers_module,
        "train_step",
        lambda *given: threads.append(torch.get_num_threads()) or original(*given),
    )
    script, argv = with_workers(world, "--threads", 2, "--max-steps", 4, "--output-dir", tmp_path)
    with on_threads(2):
        assert call(script, *argv).code == 0
    assert threads == [1] * 8


@pytest.mark.parametrize("local_steps", [190, 0])
def test_workers_that_were_interrupted_go_on_bit_for_bit(world, tmp_path, local_steps):
    """Between two means or two turns, in as many processes or in one."""
    more = ("--max-steps", 200, "--log-every", 20, "--keep-checkpoints", 1)
    more += ("--local-steps", local_steps, "--save-every", 500, "--eval-every", 100)
    script, argv = with_workers(world, *more)
    whole = tmp_path / "whole"
    assert call(script, *argv, "--output-dir", whole).code == 0
    for processes in (1, 2):
        output = tmp_path / str(processes)
        words = command(script, *argv, "--output-dir", output, "--processes", 2)
        with started(words, tmp_path / "log.txt") as process:
            run = wait_for_step(process, output, 20)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        (saved,) = run.glob("checkpoint_step_*.pt")
        assert 20 <= read_checkpoint(saved).step < 190
        resumed = subprocess.run(
            command(script, "--resume", run, "--processes", processes),
            **{"env": one_thread(), "capture_output": True, "text": True},
        )
        assert (resumed.returncode, "bit-identical" in resumed.stderr) == (0, False)
        assert largest_gap(the_run_in(whole), run) == 0


def test_rounds_end_where_something_is_due(world, tmp_path):
    """A mean every 4 steps, saved every 6, evaluated every 10, logged every 7 and 5, an epoch."""
    script, argv = with_workers(world, "--keep-checkpoints", 0, "--log-every", 7)
    assert call(script, *argv, "--output-dir", tmp_path).code == 0
    run = the_run_in(tmp_path)
    saved = {int(path.stem.rpartition("_")[2]) for path in run.glob("checkpoint_step_*.pt")}
    lines = lines_of(run)
    assert saved == {6, 12, 18}
    assert [line["step"] for line in lines if "eval_loss" in line] == [10, 20]
    assert [line["step"] for line in lines if "loss" in line] == [5, 7, 10, 14, 15, 20]
    assert sum(line["steps"] for line in lines if "loss" in line) == STEPS


def test_a_process_without_a_worker_is_refused():
    def require(processes, workers, local_steps=50):
        config = TrainingConfig(workers=workers, local_steps=local_steps)
        require_a_worker_each(config, processes)

    for processes, workers in ((3, 1), (3, 3), (3, 4), (1, 2)):
        require(processes, workers)
    for processes, workers in ((3, 1), (3, 3), (1, 2)):
        require(processes, workers, local_steps=0)
    with pytest.raises(UserError, match="--workers 2: is fewer than the 3 processes; start at mo"):
        require(3, 2)
    for workers in (2, 4):
        with pytest.raises(UserError, match=f"{workers}: take turns .* 1 or {workers}, not 3"):
            require(3, workers, local_steps=0)


def test_each_process_and_step_drops_other_values():
    def drawn(rank, step):
        seed_dropout(SimpleNamespace(config=RunConfig(seed=7), step=step), rank)
        return float(torch.rand(()))

    places = [(rank, step) for rank in (0, 1) for step in (3, 4)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(1, 4) == drawn(1, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_shares_come_back_in_order(monkeypatch, world_size, count):
    items, shares = list(range(count)), []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "_place", Place(rank, world_size))
        shares.append(share(items))
        assert shares[-1] == [item for item in items if is_mine(item)]
    monkeypatch.setattr(distributed, "_gather", lambda own: shares)
    assert gather_shares(shares[0]) == items


# -------------------------------------------------------------------------- kills and resuming


@contextlib.contextmanager
def started(words, log):
    """A launcher's process; it and its own do not outlive the block."""
    environment = {**one_thread(), "PYTHONPATH": str(ROOT)}
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*map(str, words)], env=environment, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()


def wait_for_step(process, output, step):
    for _ in range(30_000):
        runs = [*output.glob("*/metrics.jsonl")]
        if runs and max((line["step"] for line in lines_of(runs[0].parent)), default=0) >= step:
            return runs[0].parent
        assert process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.004)
    raise TimeoutError


def process_of(launcher, rank):
    """The process of a rank among the children of a launcher."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise LookupError(rank)


def test_a_process_that_is_killed_or_told_to_stop_ends_all_and_the_job_goes_on(world, tmp_path):
    """At the end the weights are, bit for bit, those of two processes that nothing disturbed."""
    script, argv = with_dropout(world)
    log, output = tmp_path / "log.txt", tmp_path / "models"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2)
    words = (*launcher, "--standalone", "--max-restarts", 2, ROOT / script, *argv)
    with started([*words, "--output-dir", output], log) as process:
        run = wait_for_step(process, output, 7)
        os.kill(process_of(process, 1), signal.SIGKILL)
        wait_for_step(process, output, 12)
        os.kill(process_of(process, 1), signal.SIGTERM)
        assert process.wait(timeout=120) == 0, log.read_text()
    said = log.read_text()
    assert said.count("error: another of the 2 processes has ended or does not answer") == 1
    assert said.count(f"saved; go on with --resume {run}\ninterrupted\n") == 1
    steps = re.findall(rf"^resuming {re.escape(str(run))} at step (\d+)$", said, re.MULTILINE)
    first, second = map(int, steps)
    assert first in (5, 10)
    assert 12 <= second < STEPS
    assert the_run_in(output) == run
    undisturbed = tmp_path / "undisturbed"
    in_turn(2, [(script, [*map(str, argv), "--output-dir", str(undisturbed)])], tmp_path)
    assert largest_gap(run, the_run_in(undisturbed)) == 0


def test_ctrl_c_saves_once_and_another_number_of_processes_goes_on(world, tmp_path):
    more = ("--dropout", 0, "--learning-rate", 1e-4, "--max-steps", 80, "--processes")
    script, argv = foundational(world, *more, 2)
    log, output = tmp_path / "log.txt", tmp_path / "models"
    with started([*command(script, *argv), "--output-dir", output], log) as process:
        run = wait_for_step(process, output, 12)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert log.read_text().splitlines()[-2:] == [
        f"saved; go on with --resume {run}",
        "interrupted",
    ]
    (saved,) = run.glob("checkpoint_step_*.pt")
    assert 12 <= read_checkpoint(saved).step < 80
    resumed = call(script, "--resume", run, "--processes", 1)
    assert resumed.code == 0, resumed.err
    assert resumed.err.count("was computed by 2 processes before, now by 1 process;") == 1
    assert (run / FINISHED).exists()
    script, argv = foundational(world, *more, 1)
    assert call(script, *argv, "--output-dir", tmp_path / "one").code == 0
    assert largest_gap(run, the_run_in(tmp_path / "one")) < 1e-4


# ------------------------------------------------------------------------------------ mistakes


def test_a_mistake_is_one_line_from_all_processes_together(world, tmp_path):
    script, argv = foundational(world, "--processes", 2, "--tokenizer-path", tmp_path / "none")
    done = subprocess.run(
        command(script, *argv), env=one_thread(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'none'}")
    assert not done.stdout


def test_a_process_that_hangs_ends_the_job_after_the_time_out(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(
        "import time\n"
        "from arithmetic_llm.cli import run_main\n"
        "from arithmetic_llm.distributed import added_up, is_main\n"
        "def main(argv):\n"
        "    if not is_main():\n"
        "        time.sleep(60)\n"
        "    added_up([1.0])\n"
        "run_main(main, parallel=True)\n"
    )
    begun = time.monotonic()
    done = torchrun(2, script, ARITHMETIC_LLM_TIMEOUT="2")
    assert time.monotonic() - begun < 50
    assert done.code != 0
    (line,) = done.error_lines
    assert line.startswith("error: another of the 2 processes has ended or does not answer")


def test_what_is_summed_lies_where_the_model_does():
    """`DistributedDataParallel` takes no weights on two kinds of devices."""
    module = _LossModule(random_model(9).to("meta"))
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


@pytest.mark.parametrize("what", ["[gloo/pair.cc:5] Connection closed by peer", "Timed out"])
def test_others_that_have_ended_are_named(what):
    with pytest.raises(UserError, match="another of the 1 processes has ended"):
        distributed.collectively(fail, RuntimeError(what))
    with pytest.raises(UserError, match="another"):
        distributed.collectively(fail, torch.distributed.DistBackendError("NCCL"))


@pytest.mark.parametrize("what", ["CUDA out of memory", "modified by an inplace operation"])
def test_a_mistake_of_ones_own_is_not_blamed_on_others(what):
    with pytest.raises(RuntimeError, match=what):
        distributed.collectively(fail, RuntimeError(what))


def fail(error):
    raise error


def test_a_number_of_processes_that_a_launcher_overrules_is_refused(monkeypatch):
    assert [distributed.to_launch(asked) for asked in (1, 2)] == [False, True]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [distributed.to_launch(asked) for asked in (1, 2)] == [False, False]
    assert not distributed.to_launch(4, resuming=True)  # 4 is what the run had before
    with pytest.raises(UserError, match="--processes 4: leave it out, a launcher has started 2"):
        distributed.to_launch(4)


def test_a_launcher_that_cannot_start_says_why_in_a_line(monkeypatch):
    """On Windows torch has no libuv, which its elastic launcher asks for."""

    def refuse(*_):
        raise RendezvousConnectionError("the store") from RuntimeError("built without libuv")

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: refuse)
    with pytest.raises(UserError, match=r"--processes: .*\(built without libuv\); leave it out"):
        distributed.launch(2, "script.py", [])
