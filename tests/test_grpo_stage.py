"""The GRPO stage, run small and whole: prompts, rollouts, files, resuming, refusals."""

import itertools
import json
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import SMALL_WORLD
from helpers import call, checkpoint_of, command, one_thread, random_model, records
from oracle import Oracle, right_answer

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.corpus.coverage import coverage_of
from arithmetic_llm.corpus.draw import distinct_samples
from arithmetic_llm.corpus.files import json_line
from arithmetic_llm.corpus.record import rewriting, solved
from arithmetic_llm.evaluation.evaluate import evaluate, problems_from
from arithmetic_llm.evaluation.judge import Outcome, judge
from arithmetic_llm.folders import FINISHED
from arithmetic_llm.grpo import stage
from arithmetic_llm.grpo import task as grpo_task
from arithmetic_llm.grpo.monitor import Monitor
from arithmetic_llm.grpo.prompts import PassRates, PromptSource
from arithmetic_llm.grpo.rewards import REWARDS
from arithmetic_llm.grpo.rollout import Rollout, rewarded, roll_out
from arithmetic_llm.grpo.task import GRPOTask
from arithmetic_llm.model.checkpoint import read_checkpoint, save_checkpoint, weights_hash
from arithmetic_llm.model.decode import GREEDY, Completion
from arithmetic_llm.model.load import load_model
from arithmetic_llm.model.tokenizer import BOS, EOS, PAD
from arithmetic_llm.task.problem import Problem, Row, problem_from, split_of
from arithmetic_llm.task.solution import solve
from arithmetic_llm.task.verifier import verify

SCRIPT = "run_grpo_training.py"
STEPS = 6


@pytest.fixture(scope="module")
def world(trained_model, tokenizer, tmp_path_factory):
    """A folder with a model that is right now and then, its tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint(folder / "start" / "best_model.pt", checkpoint_of(trained_model, tokenizer))
    tokenizer.save(folder / "tokenizer")
    others = ("typed", "padded", "flat", "drill", "invalid")
    only_nested = {f"{style}_rate": 0.0 for style in others}
    corpus = records(60, num_range=(1, 9), max_depth=2, **only_nested)
    (folder / "i.jsonl").write_text("".join(map(json_line, corpus)))
    return folder


GENERATED = ("--data-mode", "generated", "--max-depth", 2, "--num-range", 1, 9)


def arguments(world, *more, prompts=GENERATED, attempts=("--num-candidates", 4)):
    return [
        *("--tokenizer", world / "tokenizer", "--sft-checkpoint", world / "start/best_model.pt"),
        *(*prompts, *attempts),
        *("--batch-size", 3, "--max-steps", STEPS, "--learning-rate", 1e-3),
        *("--eval-samples", 8, "--eval-every", 3, "--save-every", 2, "--device", "cpu"),
        *("--threads", 1, *more),
    ]


KINDS = {
    "full": ["--adaptive-difficulty", "--refill-rounds", 1, "--num-iterations", 2],
    "lora": ["--lora-rank", 4, "--lora-alpha", 8, "--save-merged-model", "--top-k", 10],
    "instruction": ["--sft-replay-coef", 0.1],
}


def kind_arguments(world, kind):
    corpus = ("--data-mode", "instruction", "--instruction-corpus", world / "i.jsonl")
    prompts = corpus if kind == "instruction" else GENERATED
    return arguments(world, *KINDS[kind], prompts=prompts)


def train(argv, output):
    """Train in this process to the end; returns the run folder and how the script ended."""
    ended = call(SCRIPT, *argv, "--output-dir", output)
    assert ended.code == 0, ended.err
    (folder,) = output.iterdir()
    return folder, ended


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A finished run of each kind, as ``folder, ended``."""
    return {
        kind: train(kind_arguments(world, kind), tmp_path_factory.mktemp(kind)) for kind in KINDS
    }


def lines_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_same_models(one, other):
    for name in ("final_model.pt", "best_model.pt"):
        left, right = (read_checkpoint(folder / name) for folder in (one, other))
        assert left.step == right.step
        assert left.weights.keys() == right.weights.keys()
        for key, weight in left.weights.items():
            assert torch.equal(weight, right.weights[key]), f"{name}: {key}"


# ------------------------------------------------------------------------------------ the files


def test_a_run_leaves_the_documented_files_and_no_other(finished):
    common = {
        "best_model.pt",
        "final_model.pt",
        "checkpoint_step_2.pt",
        "checkpoint_step_4.pt",
        "training_config.json",
        "model_config.json",
        "training_log.json",
        "grpo_training_log.json",
        "training_summary.json",
        "run.json",
        "metrics.jsonl",
        "rollouts.jsonl",
    }
    more = {"full": set(), "instruction": set(), "lora": {"lora_adapter.pt", "merged_model.pt"}}
    for kind, (folder, ended) in finished.items():
        assert {path.name for path in folder.iterdir()} == common | more[kind]
        assert folder.name.startswith("grpo_20")
        assert f"models in {folder}" in ended.out


def test_each_step_has_a_line_with_the_names_that_users_know(finished):
    folder, _ = finished["full"]
    steps = [line for line in lines_of(folder) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    always = {
        *("loss", "learning_rate", "reward", "reward_std", "accuracy", "frac_reward_zero_std"),
        *("completions/mean_length", "completions/clipped_ratio", "rewards/correct"),
        *("seconds_generating", "seconds_training"),
    }
    for line in steps:
        assert always <= line.keys()
        alive = line["frac_reward_zero_std"] < 1
        assert ({"kl", "entropy", "clip_ratio"} <= line.keys()) == alive
    assert json.loads((folder / "grpo_training_log.json").read_text()) == lines_of(folder)


def test_a_line_tells_the_means_of_all_its_steps(world, tmp_path, monkeypatch):
    """Of each figure over the steps that have it; rates and gradient norm are the last update's.

    A step without an update has a loss of 0 by itself, and none among others.
    """
    argv = arguments(world, "--eval-every", 6, "--schedule", "linear", "--rewards", "turns")
    runs = []
    for log_every in (1, 4):
        rewards = itertools.cycle([0.0] * 4 + [0.0, 0.25, 0.5, 1.0])  # each other group is dead
        monkeypatch.setitem(REWARDS, "turns", lambda attempt, rewards=rewards: next(rewards))
        more = ["--batch-size", 1, "--log-every", log_every]
        runs.append(train([*argv, *more], tmp_path / str(log_every))[0])
    single, joint = ([line for line in lines_of(folder) if "loss" in line] for folder in runs)
    assert [line["step"] for line in joint] == [4, 6]
    assert [("kl" in line) for line in single] == [False, True] * 3
    for line, window in zip(joint, (single[:4], single[4:]), strict=True):
        assert line.keys() == {name for each in window for name in each}
        for name in ("step", "epoch", "learning_rate", "grad_norm"):
            assert line[name] == [each[name] for each in window if name in each][-1]
        assert line["steps"] == sum(each["steps"] for each in window)
        for name in line.keys() - {"step", "steps", "epoch", "learning_rate", "grad_norm"}:
            learned = [each for each in window if name != "loss" or "grad_norm" in each]
            told = [each[name] for each in learned if name in each]
            if not name.startswith(("tokens_per_second", "seconds")):
                assert line[name] == pytest.approx(sum(told) / len(told)), name


def test_validation_is_told_by_exact_depth(finished):
    for folder, _ in finished.values():
        evaluations = [line for line in lines_of(folder) if "eval_reward" in line]
        assert [line["step"] for line in evaluations] == [0, 3, 6]
        for line in evaluations:
            assert {"eval_exact", "eval_exact_depth_1", "eval_exact_depth_2"} <= line.keys()
            depths = [line["eval_exact_depth_1"], line["eval_exact_depth_2"]]
            assert min(depths) <= line["eval_exact"] == line["eval_reward"] <= max(depths)


def test_the_best_model_is_that_of_the_highest_validation_reward(world, tmp_path, monkeypatch):
    rewards = iter([0.2, 0.1, 0.5, 0.3])
    monkeypatch.setattr(GRPOTask, "validate", lambda self, model: {"eval_reward": next(rewards)})
    argv = arguments(world, "--max-steps", 3, "--eval-every", 1)
    folder, _ = train(argv, tmp_path / "out")
    assert read_checkpoint(folder / "best_model.pt").step == 2
    assert json.loads((folder / FINISHED).read_text())["best"] == {"step": 2, "eval_reward": 0.5}


def test_the_best_model_is_the_start_if_training_only_harms(world, tmp_path, monkeypatch):
    rewards = iter([0.4, 0.1, 0.3])
    monkeypatch.setattr(GRPOTask, "validate", lambda self, model: {"eval_reward": next(rewards)})
    argv = arguments(world, "--max-steps", 2, "--eval-every", 1)
    folder, _ = train(argv, tmp_path / "out")
    best = read_checkpoint(folder / "best_model.pt")
    start = load_model(world / "start/best_model.pt").model.state_dict()
    assert best.step == 0
    assert all(torch.equal(weight, start[name]) for name, weight in best.weights.items())
    assert json.loads((folder / FINISHED).read_text())["best"] == {"step": 0, "eval_reward": 0.4}


def test_whole_rollouts_are_kept_with_their_rewards(finished):
    for folder, _ in finished.values():
        samples = lines_of(folder, "rollouts.jsonl")
        assert [line["step"] for line in samples] == list(range(1, STEPS + 1))
        for sample in samples:
            assert len(sample["rollouts"]) == 4
            assert len({rollout["expression"] for rollout in sample["rollouts"]}) == 1
            for rollout in sample["rollouts"]:
                cut_off = rollout["finish_reason"] == "length"
                verdict = verify(rollout["expression"], rollout["text"], cut_off)
                assert rollout["reward"] == rollout["rewards"]["correct"] == verdict.correct
                assert rollout["depth"] in (1, 2)


def test_the_start_is_checked_and_told(finished):
    for _, ended in finished.values():
        (told,) = [line for line in ended.err.splitlines() if line.startswith("step 0: decoder")]
        assert "(tolerance 0.001), KL to the reference 0" in told


def test_without_a_reference_no_kl_is_told(world, tmp_path):
    argv = arguments(world, "--kl-penalty-coef", 0, "--max-steps", 1)
    _, ended = train(argv, tmp_path / "out")
    assert "tolerance" in ended.err
    assert "KL" not in ended.err


def with_a_decoder_that_is_off(monkeypatch, tokens, by):
    """Rollouts whose first ``tokens`` log-probs of each completion are wrong."""

    def wrong(*args):
        groups = unchanged(*args)
        for rollout in (rollout for group in groups for rollout in group):
            logprobs = rollout.completion.logprobs
            logprobs[:tokens] = [logprob - by for logprob in logprobs[:tokens]]
        return groups

    unchanged = grpo_task.roll_out
    monkeypatch.setattr(grpo_task, "roll_out", wrong)


@pytest.mark.parametrize(
    ("precision", "tokens", "by", "message"),
    [
        ("fp32", 1, 0.01, "at most 1.0e-02 (tolerance 0.001)"),
        ("bf16", None, 0.05, "nats a token on average (tolerance 0.01)"),
        ("bf16", 1, 2.5, "(tolerance 2)"),
    ],
)
def test_a_decoder_that_disagrees_with_training_ends_the_run(
    world, tmp_path, monkeypatch, precision, tokens, by, message
):
    with_a_decoder_that_is_off(monkeypatch, tokens, by)
    argv = arguments(world, "--precision", precision, "--output-dir", tmp_path)
    ended = call(SCRIPT, *argv)
    assert ended.code == 2
    assert message in ended.error_lines[0]


def test_bf16_may_be_off_at_single_tokens(world, tmp_path, monkeypatch):
    with_a_decoder_that_is_off(monkeypatch, 1, 0.1)
    argv = arguments(world, "--precision", "bf16", "--max-steps", 1)
    folder, _ = train(argv, tmp_path / "out")
    assert (folder / "final_model.pt").exists()


def test_the_weights_move(world, finished):
    start = weights_hash(load_model(world / "start/best_model.pt").model)
    for folder, _ in finished.values():
        assert weights_hash(load_model(folder / "final_model.pt").model) != start


def test_the_checkpoint_tells_what_it_was_trained_on(finished):
    for folder, _ in finished.values():
        content = read_checkpoint(folder / "final_model.pt")
        assert content.stage == "grpo"
        assert content.trained_on.depths == (1, 2, 3)  # of the start, and the prompts'
        assert content.trained_on.splits["train"] > 100


# ------------------------------------------------------------------------------------- adapters


def test_with_a_rank_only_an_adapter_is_trained(world, finished):
    folder, ended = finished["lora"]
    content = read_checkpoint(folder / "final_model.pt")
    assert content.weights
    assert all("lora_" in name for name in content.weights)
    start = world / "start/best_model.pt"
    assert content.adapter["base_hash"] == weights_hash(load_model(start).model)
    assert content.adapter["config"]["lora_rank"] == 4
    assert " parameters (" in ended.out  # so many of so many train
    assert " %) train on cpu" in ended.out


def test_the_adapter_and_the_merged_model_are_the_best_one(finished):
    folder, _ = finished["lora"]
    hashes = {
        weights_hash(load_model(folder / name).model)
        for name in ("lora_adapter.pt", "best_model.pt", "merged_model.pt")
    }
    assert len(hashes) == 1
    assert read_checkpoint(folder / "merged_model.pt").adapter is None


def test_an_adapter_of_an_adapter_keeps_its_base_and_can_move(world, finished, tmp_path):
    """The base is then the merged model, which is no file of its own."""
    first, _ = finished["lora"]
    argv = arguments(world, "--sft-checkpoint", first / "lora_adapter.pt", "--lora-rank", 2)
    folder, _ = train([*argv, "--max-steps", 2], tmp_path / "runs")
    base = load_model(folder / "base_model.pt")
    assert weights_hash(base.model) == weights_hash(load_model(first / "best_model.pt").model)
    before = weights_hash(load_model(folder / "lora_adapter.pt").model)
    folder = folder.rename(tmp_path / "elsewhere")
    assert weights_hash(load_model(folder / "lora_adapter.pt").model) == before


# ------------------------------------------------------------------------------------- resuming


def cut_back(folder, copy, step):
    """A copy of a finished run as it was when it had been killed some time after ``step``."""
    shutil.copytree(folder, copy)
    for path in copy.glob("checkpoint_step_*.pt"):
        if int(path.stem.rpartition("_")[2]) > step:
            path.unlink()
    for name in (FINISHED, "final_model.pt", "training_log.json", "grpo_training_log.json"):
        (copy / name).unlink()
    return copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 2])
def test_a_resumed_run_ends_bit_identical(finished, tmp_path, kind, step):
    whole, _ = finished[kind]
    folder = cut_back(whole, tmp_path / whole.name, step)
    ended = call(SCRIPT, "--resume", folder)
    assert ended.code == 0, ended.err
    assert ("starts over" if step == 0 else f"at step {step}") in ended.out
    assert_same_models(folder, whole)
    steps = [[line["step"] for line in lines_of(run)] for run in (folder, whole)]
    assert steps[0] == steps[1]
    assert lines_of(folder, "rollouts.jsonl") == lines_of(whole, "rollouts.jsonl")
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_the_pass_rates_are_part_of_a_checkpoint(finished):
    folder, _ = finished["full"]
    state = read_checkpoint(folder / "checkpoint_step_4.pt").training["task"]
    assert state["pass_rates"].keys() == {1, 2}


def test_a_killed_run_ends_bit_identical(world, finished, tmp_path):
    argv = [*kind_arguments(world, "full"), "--output-dir", tmp_path / "out"]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command(SCRIPT, *argv), env=one_thread(), stdout=log, stderr=log)
    while not [*tmp_path.glob("out/*/checkpoint_step_2.pt")]:
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.005)
    time.sleep(random.random() * 0.3)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    (folder,) = (tmp_path / "out").iterdir()
    if not (folder / FINISHED).exists():
        assert call(SCRIPT, "--resume", folder).code == 0
    assert_same_models(folder, finished["full"][0])


def test_a_run_is_not_resumed_from_another_start(finished, world, tokenizer, tmp_path):
    folder = cut_back(finished["full"][0], tmp_path / "run", 2)
    other = checkpoint_of(random_model(tokenizer.vocab_size, seed=9), tokenizer)
    save_checkpoint(tmp_path / "other.pt", other)
    config = json.loads((folder / "training_config.json").read_text())
    config["sft_checkpoint"] = str(tmp_path / "other.pt")
    (folder / "training_config.json").write_text(json.dumps(config))
    ended = call(SCRIPT, "--resume", folder)
    assert ended.code == 2
    assert "start_hash has changed" in ended.err


def test_a_finished_run_names_the_flag_that_starts_a_new_one(finished):
    folder, _ = finished["full"]
    ended = call(SCRIPT, "--resume", folder)
    remedy = f"start a new run with --sft-checkpoint {folder / 'final_model.pt'}"
    assert ended.err == f"error: {folder}: is finished; {remedy}\n"


# ------------------------------------------------------------------------------------- configs


def test_a_written_config_starts_an_equal_run(finished, tmp_path):
    whole, _ = finished["instruction"]
    folder, _ = train(["--config", whole / "training_config.json"], tmp_path / "again")
    assert_same_models(folder, whole)


@pytest.mark.parametrize(
    "rewards",
    [
        "correct=1,step_validity=0.5,length=0.1",
        {"correct": 1, "step_validity": 0.5, "length": 0.1},
    ],
)
def test_rewards_from_a_json_file_are_each_told(world, tmp_path, rewards):
    config = {"rewards": rewards, "max_steps": 1}
    (tmp_path / "c.json").write_text(json.dumps(config))
    argv = [word for word in arguments(world) if word not in ("--max-steps", STEPS)]
    folder, _ = train([*argv, "--config", tmp_path / "c.json"], tmp_path / "out")
    line = next(line for line in lines_of(folder) if "loss" in line)
    parts = [line[f"rewards/{name}"] for name in ("correct", "step_validity", "length")]
    assert line["reward"] == pytest.approx(parts[0] + 0.5 * parts[1] + 0.1 * parts[2])
    assert parts[2] < 0


def test_completions_get_room_for_a_whole_solution(finished):
    folder, _ = finished["full"]
    limit = json.loads((folder / "training_config.json").read_text())["max_gen_length"]
    assert 60 < limit < 200  # of depth 2, not of any depth


def test_a_limit_that_cuts_right_solutions_off_is_warned_of(world, tmp_path):
    argv = arguments(world, "--max-gen-length", 20, "--max-steps", 1)
    _, ended = train(argv, tmp_path / "out")
    assert "warning: --max-gen-length 20 cuts off the right answers" in ended.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-candidates", 1], "--num-candidates: must be at least 2"),
        (["--temperature", 0], "--temperature: must be at least 0.01"),
        (["--rewards", "corect=1"], "no reward 'corect'; there are correct"),
        (["--min-depth", 3], "--min-depth 3: is above --max-depth 2"),
        (["--num-range", 9, 1], "the smaller number comes first"),
        (["--lora-rank", 2, "--lora-target-modules", "qproj"], "did you mean q_proj?"),
        (["--save-merged-model"], "--save-merged-model has no effect while lora_rank is 0"),
        (["--sft-checkpoint", "nowhere.pt"], "nowhere.pt: no such checkpoint file"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--loss-type", "ppo"], "loss-type"),
        (["--base-checkpoint", "x.pt"], "leave --base-checkpoint out"),
        (["--no-such-flag"], "unknown argument --no-such-flag"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path, argv, message):
    assert_refused(tmp_path, arguments(world, *argv), message)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ((), "--instruction-corpus is required with --data-mode instruction"),
        (("--instruction-corpus", "nowhere.jsonl"), "nowhere.jsonl: no such corpus file"),
        (
            ("--instruction-corpus", "x", "--adaptive-difficulty"),
            "--adaptive-difficulty has no effect while data_mode is instruction (the default)",
        ),
    ],
)
def test_a_corpus_and_generated_prompts_do_not_mix(world, tmp_path, prompts, message):
    assert_refused(tmp_path, arguments(world, prompts=prompts), message)


def assert_refused(tmp_path, argv, message):
    ended = call(SCRIPT, *argv, "--output-dir", tmp_path / "out")
    assert ended.code == 2
    assert len(ended.error_lines) == 1
    assert message in ended.error_lines[0]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------ steps without signal


@pytest.fixture
def dead_run(world, tmp_path, monkeypatch):
    """Ten steps in which every reward is the same."""
    monkeypatch.setitem(REWARDS, "constant", lambda attempt: 0.3)
    argv = arguments(world, "--rewards", "constant", "--max-steps", 10, "--max-gen-length", 6)
    return train([*argv, "--eval-every", 10, "--save-every", 20], tmp_path / "out")


def test_steps_without_signal_are_warned_of_and_the_run_goes_on(world, dead_run):
    folder, ended = dead_run
    assert ended.err.count("WARNING: 10 steps in a row without any signal") == 1
    steps = [line for line in lines_of(folder) if "loss" in line]
    assert [line["frac_reward_zero_std"] for line in steps] == [1.0] * 10
    assert not any({"kl", "entropy", "grad_norm"} & line.keys() for line in steps)
    start, final = (world / "start/best_model.pt", folder / "final_model.pt")
    assert weights_hash(load_model(start).model) == weights_hash(load_model(final).model)


def test_a_dead_step_recommends_flags_that_act(capsys):
    for mode, acts in (("generated", True), ("instruction", False)):
        monitor = Monitor(settings(data_mode=mode), has_reference=False)
        monitor.noted = {"accuracy": 0.0, "completions/clipped_ratio": 0.0}
        monitor.dead_steps = 9
        monitor.note_signal(False)
        assert ("--adaptive-difficulty" in capsys.readouterr().err) == acts


@pytest.mark.parametrize(("cutoff", "reward"), [("keep", 0.0), ("mask", 0.0), ("penalise", -1.0)])
def test_cut_off_completions_are_counted_and_treated_as_asked(world, tmp_path, cutoff, reward):
    argv = arguments(world, "--max-gen-length", 3, "--cutoff", cutoff, "--max-steps", 1)
    folder, _ = train(argv, tmp_path / "out")
    line = next(line for line in lines_of(folder) if "loss" in line)
    assert line["completions/clipped_ratio"] == 1.0
    assert line["reward"] == reward
    assert line["rewards/correct"] == 0.0


# ------------------------------------------------------------------------------ groups by hand


@pytest.mark.parametrize(
    "budget", [{"max_steps": 4}, {"max_steps": 3}, {"max_steps": 0, "num_epochs": 3}]
)
def test_the_prompts_of_all_steps_are_counted_as_they_are_asked(budget):
    source = PromptSource(settings(num_samples=10, batch_size=8, **budget), PassRates())
    asked = [len(source.of_step(step)) for step in range(source.total_steps)]
    assert source.total_prompts == sum(asked)


def settings(**options):
    return GRPOConfig(
        **{
            "data_mode": "generated",
            "max_depth": 2,
            "num_range": (1, 9),
            "max_gen_length": 50,
            "batch_size": 2,
            "num_candidates": 2,
            **options,
        }
    )


def rollout(reward, depth=1, cut_off=False):
    """A completion with a reward; right if that is above 0."""
    completion = Completion([9, 1], [-0.1, -0.2], "length" if cut_off else "eos")
    problem = Problem("1 + 2", Row("depth", depth), 1, 2)
    text = "Final Result: 3" if reward > 0 else ""
    outcome = Outcome(problem, text, verify("1 + 2", text, cut_off), 2, cut_off, False)
    return Rollout(outcome, [2, 8], completion, reward, {"correct": reward})


class Scripted(GRPOTask):
    """Its rounds of rollouts are given; it notes how many prompts each was asked for."""

    def __init__(self, tiny_model, tokenizer, rounds, **options):
        config = settings(**options)
        source = PromptSource(config, PassRates())
        super().__init__(tiny_model, tokenizer, config, source, ["1 + 2"])
        self.rounds, self.asked = iter(rounds), []

    def _roll_out(self, expressions, copies, sampling):
        self.asked.append(len(expressions))
        return [[rollout(*entry) for entry in group] for group in next(self.rounds)]

    def _check_start(self, groups):
        """The log-probabilities of these rollouts are made up."""


ALIVE, WON, LOST = [(1.0,), (0.0,)], [(1.0,), (1.0,)], [(0.0,), (0.0,)]


@pytest.mark.parametrize(
    ("rounds", "refills", "asked", "groups"),
    [
        ([[WON, LOST]], 0, [2], 2),
        ([[ALIVE, ALIVE]], 3, [2], 2),
        ([[ALIVE, LOST], [ALIVE]], 3, [2, 1], 3),
        ([[WON, LOST], [ALIVE, LOST], [LOST]], 2, [2, 2, 1], 5),
    ],
)
def test_dead_groups_are_replaced_as_often_as_allowed(
    tiny_model, tokenizer, rounds, refills, asked, groups
):
    task = Scripted(tiny_model, tokenizer, rounds, refill_rounds=refills)
    assert len(task._rollouts(0)) == groups
    assert task.asked == asked


def test_dead_groups_do_not_train_but_are_counted(tiny_model, tokenizer):
    task = Scripted(tiny_model, tokenizer, [[ALIVE, LOST], [WON]], refill_rounds=1)
    ((batch,),) = list(task.updates(1))
    assert batch.advantages.tolist() == [0.5, -0.5]
    metrics = task.metrics()
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert metrics["reward"] == metrics["accuracy"] == 0.5
    assert metrics["reward_std"] == pytest.approx(0.7071 / 3, rel=1e-3)
    assert task.pass_rates.rates == {1: 0.5}  # all three groups, or it would lean to one half


def test_masked_cut_offs_do_not_train_but_count_in_the_mean(tiny_model, tokenizer):
    group = [(1.0,), (0.0, 1, True)]
    for cutoff, advantages in (("keep", [0.5, -0.5]), ("mask", [0.5])):
        task = Scripted(tiny_model, tokenizer, [[group, LOST]], cutoff=cutoff)
        ((batch,),) = list(task.updates(1))
        assert batch.advantages.tolist() == advantages


def test_a_cut_off_can_be_penalised(tokenizer):
    completion = Completion(tokenizer.encode(" Final Result: 3"), [], "length")
    for cutoff, reward in (("keep", 0.0), ("mask", 0.0), ("penalise", -1.0)):
        config = settings(cutoff=cutoff)
        outcome = judge(problem_from("1 + 2"), completion, 1, tokenizer, 100)
        judged = rewarded(outcome, [2], completion, config, {"correct": 1.0})
        assert (judged.reward, judged.parts["correct"]) == (reward, 0.0)


@pytest.mark.parametrize(
    ("ending", "room", "reward"),
    [("", 0, 1.0), ("", -1, 0.0), (" 4", 0, 0.0), (" Final Result: {}", 0, 0.0)],
)
def test_what_is_rewarded_is_what_the_model_wrote_itself(tokenizer, ending, room, reward):
    """A right solution, and what comes after it; or without the room for its ``<eos>``."""
    problem = "(1 + 2) - 5"
    text = right_answer(problem) + ending.format(-2)
    config = settings(max_gen_length=len(tokenizer.encode(text)) + 1 + room)
    model = Oracle(tokenizer, lambda _: text)
    weights = {"correct": 1.0, "format": 0.5}
    ((judged,),) = roll_out(model, tokenizer, [problem], 1, GREEDY, config, weights)
    assert judged.reward == 1.5 * reward
    assert judged.outcome.text == text.strip()
    assert judged.as_dict()["correct"] == bool(reward)


def test_rollouts_stand_in_groups_of_their_prompts(tokenizer):
    config, expressions = settings(max_gen_length=100), ["1 + 2", "(3 - 4) + 5", "6 +"]
    groups = roll_out(Oracle(tokenizer), tokenizer, expressions, 2, GREEDY, config, {"correct": 1})
    assert [[r.outcome.expression for r in group] for group in groups] == [
        [expression] * 2 for expression in expressions
    ]
    assert [rollout.prompt for rollout, _ in groups] == [*map(tokenizer.prompt_ids, expressions)]
    assert {rollout.reward for group in groups for rollout in group} == {1.0}


@pytest.mark.parametrize("room", [20, 25, 35, 60])
def test_validation_judges_as_an_evaluation_does(trained_model, tokenizer, room):
    problems = problems_from(distinct_samples(SMALL_WORLD, 60, 3, "validation"))
    expressions = [problem.expression for problem in problems]
    config = settings(max_gen_length=room)
    source = PromptSource(config, PassRates())
    found = GRPOTask(trained_model, tokenizer, config, source, expressions).validate(trained_model)
    options = {"trained_on": None, "max_new_tokens": room}
    metrics = evaluate(trained_model, tokenizer, problems, **options).metrics
    assert 100 * found["eval_exact"] == pytest.approx(metrics["exact_match_accuracy"], abs=1e-4)
    for row in metrics["by_depth"]:
        exact = 100 * found[f"eval_exact_depth_{row['depth']}"]
        assert exact == pytest.approx(row["exact_match_accuracy"], abs=1e-4)


def test_without_a_baseline_only_what_is_rewarded_trains(tiny_model, tokenizer):
    """Rejection sampling: all that is right, and nothing else."""
    rounds = [[WON, ALIVE], []]
    task = Scripted(tiny_model, tokenizer, rounds, baseline="none", refill_rounds=1)
    ((batch,),) = list(task.updates(1))
    assert batch.advantages.tolist() == [1.0, 1.0, 1.0]
    assert task.asked == [2]  # a group that is all right is not dead here


def test_old_logprobs_stay_while_a_batch_is_used_again(tiny_model, tokenizer):
    task = Scripted(tiny_model, tokenizer, [[ALIVE, ALIVE]], num_iterations=3)
    updates = list(task.updates(1))
    assert len(updates) == 3
    (first,), *others = updates
    assert all(torch.equal(batch.old_logprobs, first.old_logprobs) for (batch,) in others)
    assert (first.old_logprobs[first.mask] < 0).all()
    ((batch,),) = Scripted(tiny_model, tokenizer, [[ALIVE, ALIVE]]).updates(1)
    assert batch.old_logprobs is None


def test_replay_weighs_its_coefficient_times_the_policys_loss(tiny_model, tokenizer):
    task = Scripted(tiny_model, tokenizer, [[ALIVE, ALIVE]], sft_replay_coef=0.25)
    ((policy, replay),) = task.updates(1)
    assert replay.loss_denominator == 0.0
    assert float(replay.batch.weights.sum()) == pytest.approx(0.25 * policy.loss_denominator)


@pytest.mark.parametrize("updates", [1, 2])
def test_replay_is_all_of_a_step_without_signal(tiny_model, tokenizer, updates):
    """Its mean loss times the coefficient; and the attempts still taught nothing."""
    options = {"sft_replay_coef": 0.25, "num_iterations": updates}
    task = Scripted(tiny_model, tokenizer, [[WON, LOST]], **options)
    each = list(task.updates(1))
    assert len(each) == updates
    ((replay,), *_) = each
    ids, targets = replay.batch.input_ids, replay.batch.targets
    with torch.no_grad():
        loss = task.loss(tiny_model, replay) / replay.loss_denominator
        expected = torch.nn.functional.cross_entropy(
            tiny_model(ids).flatten(0, 1),
            targets.masked_fill(replay.batch.weights == 0, -100).flatten(),
            ignore_index=-100,
        )
    torch.testing.assert_close(loss, 0.25 * expected)
    assert task.monitor.dead_steps == 1


def test_replay_goes_on_when_no_step_has_signal(world, tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "constant", lambda attempt: 0.3)
    argv = arguments(world, "--rewards", "constant", "--max-steps", 10, "--max-gen-length", 6)
    argv += ["--sft-replay-coef", 0.5, "--eval-every", 10]
    folder, ended = train(argv, tmp_path / "out")
    assert ended.err.count("WARNING: 10 steps in a row without any signal") == 1
    steps = [line for line in lines_of(folder) if "loss" in line]
    assert all(line["loss"] > 0 < line["grad_norm"] for line in steps)
    start, final = (world / "start/best_model.pt", folder / "final_model.pt")
    assert weights_hash(load_model(start).model) != weights_hash(load_model(final).model)


# ------------------------------------------------------------------- learning from solutions


def solutions_task(model, tokenizer, **options):
    config = settings(learn_from="solutions", batch_size=6, **options)
    return GRPOTask(model, tokenizer, config, PromptSource(config, PassRates()), ["1 + 2"])


def test_solutions_are_those_of_the_prompts_that_rollouts_would_get(tiny_model, tokenizer):
    task = solutions_task(tiny_model, tokenizer, micro_batch_size=4)
    (batches,) = task.updates(3)
    texts = [
        tokenizer.decode([i for i in ids.tolist() if i not in (PAD, BOS, EOS)])
        for solutions in batches
        for ids in solutions.batch.input_ids
    ]
    assert [len(solutions.batch.input_ids) for solutions in batches] == [4, 2]
    asked = PromptSource(settings(batch_size=6), PassRates()).of_step(3)
    expected = [solved(expression).sequence for expression in asked]
    assert Counter(text.replace(" ", "") for text in texts) == Counter(
        text.replace(" ", "") for text in expected
    )


def test_learning_from_solutions_is_the_cross_entropy_of_the_reference_library(
    tiny_model, tokenizer
):
    task = solutions_task(tiny_model, tokenizer)
    ((solutions,),) = task.updates(0)
    batch = solutions.batch
    loss = task.loss(tiny_model, solutions) / solutions.loss_denominator
    targets = batch.targets.masked_fill(batch.weights == 0, -100)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            tiny_model(batch.input_ids).flatten(0, 1), targets.flatten(), ignore_index=-100
        )
    torch.testing.assert_close(loss.detach(), expected)


def test_a_corpus_with_a_prompt_beyond_the_sampler_is_refused_at_once(world, tmp_path):
    """Its worked solution, which rollouts draft with, would take minutes and gigabytes."""
    text = " + ".join(["1"] * 4096)
    corpus = tmp_path / "c.txt"
    corpus.write_text(f"Evaluate: {text}\n<think> </think> Final Result: 4096\n")
    ended = call(
        SCRIPT,
        *("--sft-checkpoint", world / "start" / "best_model.pt"),
        *("--tokenizer", world / "tokenizer", "--instruction-corpus", corpus),
        *("--output-dir", tmp_path / "out", "--max-gen-length", 100),
    )
    assert ended.code == 2
    assert ended.error_lines[0].startswith(f"error: {corpus}: has a problem of 4,096 numbers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", ["adaptive_difficulty", "refill_rounds", "num_iterations", "sft_replay_coef"]
)
def test_learning_from_solutions_refuses_what_needs_attempts(world, tmp_path, option):
    flag = "--" + option.replace("_", "-")
    value = [] if option == "adaptive_difficulty" else [2]
    argv = arguments(world, "--learn-from", "solutions", flag, *value, attempts=())
    assert_refused(tmp_path, argv, "has no effect while learn_from is solutions")


def test_solutions_beyond_the_context_are_counted(tokenizer):
    task = solutions_task(
        random_model(tokenizer.vocab_size, max_seq_length=48), tokenizer, max_depth=3
    )
    (batches,) = task.updates(0)
    kept = sum(len(solutions.batch.input_ids) for solutions in batches)
    dropped = task.metrics()["solutions_dropped"]
    assert kept > 0 < dropped
    assert kept + dropped == 6


def test_a_run_without_any_update_says_so(world, tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "same", lambda attempt: 1.0)
    argv = arguments(world, "--rewards", "same", "--max-steps", 2)
    folder, ended = train(argv, tmp_path / "out")
    assert "warning: no step had an update; the weights are those of the start" in ended.err
    start = load_model(world / "start/best_model.pt").model
    assert weights_hash(load_model(folder / "final_model.pt").model) == weights_hash(start)


def test_learning_from_solutions_that_are_too_long_is_refused_or_told(world, tmp_path):
    start = load_model(world / "start/best_model.pt")
    for context, code, said in ((10, 2, "error: all correct"), (30, 0, "warning: ")):
        start.model.config = replace(start.model.config, max_seq_length=context)
        save_checkpoint(tmp_path / "short.pt", start)
        more = (
            "--learn-from",
            "solutions",
            "--max-steps",
            1,
            "--sft-checkpoint",
            tmp_path / "short.pt",
        )
        argv = arguments(world, *more, attempts=())
        ended = call(SCRIPT, *argv, "--output-dir", tmp_path / "out")
        assert ended.code == code, ended.err
        assert said in ended.out + ended.err
        assert "correct solutions of 500 prompts drawn are longer than" in ended.out + ended.err


def test_learning_from_solutions_runs_as_a_stage(world, tmp_path):
    more = ("--learn-from", "solutions", "--max-steps", 3, "--eval-every", 3)
    argv = arguments(world, *more, attempts=())
    folder, _ = train(argv, tmp_path / "out")
    lines = lines_of(folder)
    assert [line["step"] for line in lines if "eval_exact" in line] == [0, 3]
    assert not (folder / "rollouts.jsonl").exists()
    moved = read_checkpoint(folder / "final_model.pt").weights
    start = read_checkpoint(world / "start/best_model.pt").weights
    assert any(not torch.equal(weight, start[name]) for name, weight in moved.items())


# ------------------------------------------------------------------------------------ prompts


def corpus_source(world, **options):
    config = settings(data_mode="instruction", instruction_corpus=str(world / "i.jsonl"), **options)
    return PromptSource(config, PassRates())


def test_an_epoch_asks_each_prompt_once_in_an_order_of_its_own(world):
    source = corpus_source(world, batch_size=7)
    assert source.steps_per_epoch == 9
    epochs = [
        [prompt for step in range(9) for prompt in source.of_step(9 * epoch + step)]
        for epoch in range(3)
    ]
    everything = Counter(record.expression for record in source.corpus)
    assert all(Counter(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_rewritings_are_not_asked(world, tmp_path):
    step = rewriting("5 - 4 - 2", solve("5 - 4 - 2"), 2, 2)
    (tmp_path / "i.jsonl").write_text((world / "i.jsonl").read_text() + json_line(step))
    assert corpus_source(tmp_path).corpus == corpus_source(world).corpus


def test_num_samples_is_the_number_of_prompts_an_epoch(world):
    for source in (
        corpus_source(world, num_samples=10, batch_size=4),
        PromptSource(settings(num_samples=10, batch_size=4), PassRates()),
    ):
        assert source.steps_per_epoch == 3
        assert [len(source.of_step(step)) for step in range(4)] == [4, 4, 2, 4]
    assert corpus_source(world, num_samples=1000).prompts_per_epoch == 60


def test_generated_prompts_belong_to_the_train_split_and_are_repeatable():
    sources = [PromptSource(settings(batch_size=200), PassRates()) for _ in range(2)]
    prompts = sources[0].of_step(3)
    assert prompts == sources[1].of_step(3) != sources[0].of_step(4)
    assert {split_of(prompt) for prompt in prompts} == {"train"}
    assert sources[0].others(200, 3, 1) != prompts


def test_validation_belongs_to_the_validation_split(world):
    for covered in (None, coverage_of(world / "i.jsonl")):
        prompts = stage._validation_prompts(settings(eval_samples=30), covered)
        assert len(prompts) == 30
        assert {split_of(prompt) for prompt in prompts} == {"validation"}


def test_replayed_prompts_keep_to_all_depths():
    """Or what is mastered would not be replayed, and that is what replay is for."""
    config = settings(adaptive_difficulty=True, max_depth=2)
    pass_rates = PassRates()
    pass_rates.rates = {1: 1.0, 2: 0.5}
    source = PromptSource(config, pass_rates)
    easy = [
        sum(problem_from(e).row.number == 1 for e in source.others(200, 0, 1, adaptive=adaptive))
        for adaptive in (True, False)
    ]
    assert easy[0] < 30 < 70 < easy[1]


def test_difficulty_follows_the_pass_rates_as_they_change():
    rates = PassRates()
    source = PromptSource(settings(adaptive_difficulty=True, max_depth=3), rates)

    def shares():
        expressions = source.others(600, 0, 1)
        depths = Counter(problem_from(text).depth for text in expressions)
        return [depths[depth] / 600 for depth in (1, 2, 3)]

    assert shares() == pytest.approx([1 / 3] * 3, abs=0.07)
    rates.rates = {1: 1.0, 2: 0.5, 3: 0.0}  # known, in reach, out of reach
    assert shares() == pytest.approx([0.01 / 0.27, 0.25 / 0.27, 0.01 / 0.27], abs=0.04)
    for _ in range(60):  # depth 3 comes in reach, depth 2 is mastered
        rates.update(rollout(*entry).outcome for entry in ((1.0, 2), (1.0, 3), (0.0, 3)))
    assert rates.rates[2] > 0.99
    assert rates.rates[3] == pytest.approx(0.5, abs=0.01)
    assert shares()[2] > 0.8
