"""What the GRPO stage does with the formulas: whole steps, as the stage itself sets them up.

The rollouts are real, of a model that is right about half the time and has dropout. What they are
worth is said by Python's own arithmetic, and the loss of them by TRL on transformers' model.
"""

import copy
import inspect
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import pytest
import torch
from helpers import checkpoint_of, of_transformers, records
from oracle import right_answer, with_result
from torch import Tensor, nn
from trl_reference import assert_same_gradients, their_logprobs, their_loss

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.corpus.files import json_line
from arithmetic_llm.grpo import rollout
from arithmetic_llm.grpo import stage as grpo_stage
from arithmetic_llm.grpo.loss import Episode
from arithmetic_llm.grpo.stage import train_grpo
from arithmetic_llm.grpo.task import GRPOTask
from arithmetic_llm.model.checkpoint import save_checkpoint
from arithmetic_llm.model.decode import Completion, generate
from arithmetic_llm.model.lora import lora_layers, merge_adapter
from arithmetic_llm.model.tokenizer import EOS, THINK
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.problem import split_of
from arithmetic_llm.training import loop as trainer
from arithmetic_llm.training.step import train_step

CANDIDATES = 8
KINDS = {"all weights": {}, "adapter": {"lora_rank": 4, "lora_dropout": 0.5, "learning_rate": 1e-2}}

# ------------------------------------------------------------------------------- the materials


@pytest.fixture(scope="module")
def world(trained_model, tokenizer, tmp_path_factory):
    """A folder with a model that has dropout, its tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("world")
    config = replace(trained_model.config, dropout=0.5)
    model = ArithmeticModel(config, tokenizer.vocab_size)
    model.load_state_dict(trained_model.state_dict())
    save_checkpoint(folder / "start.pt", checkpoint_of(model, tokenizer))
    tokenizer.save(folder / "tokenizer")
    others = ("typed", "padded", "flat", "drill", "invalid")
    only_nested = {f"{style}_rate": 0.0 for style in others}
    corpus = records(60, num_range=(1, 12), max_depth=1, **only_nested)
    (folder / "i.jsonl").write_text("".join(map(json_line, corpus)))
    return folder


@dataclass
class Stage:
    """What `train_grpo` hands to the training loop."""

    run: object
    task: GRPOTask

    @property
    def model(self):
        return self.run.model

    @property
    def config(self):
        return self.task.config

    def step(self) -> float:
        """One step of the loop; returns its loss."""
        self.run.model.train()
        return train_step(self.run, self.task)[0]


@pytest.fixture
def opened(world, tmp_path, monkeypatch):
    """A function from settings to the stage, opened by `train_grpo` and not yet begun."""

    def open_stage(**options) -> Stage:
        config = GRPOConfig(**{**settings(world), "output_dir": str(tmp_path), **options})
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(grpo_stage, "fit", lambda run, task, *_: found.append(Stage(run, task)))
            train_grpo(config)
        return found[0]

    return open_stage


def settings(world):
    return {
        "tokenizer": str(world / "tokenizer"),
        "sft_checkpoint": str(world / "start.pt"),
        "instruction_corpus": str(world / "i.jsonl"),
        "data_mode": "generated",
        "max_depth": 1,
        "num_range": (1, 12),
        "batch_size": 8,
        "num_candidates": CANDIDATES,
        "temperature": 0.8,
        "max_gen_length": 40,
        "kl_penalty_coef": 0.3,
        "micro_batch_size": 6,
        "learning_rate": 1e-3,
        "gradient_clip": 0.0,  # so that gradients are seen as the loss has them
        "max_steps": 20,
        "warmup_steps": 0,
        "eval_samples": 8,
        "device": "cpu",
        "threads": 1,
    }


# ------------------------------------------------------------------------------- what is watched


def asked_of(*args, **options) -> dict:
    """The arguments of a call of the decoder by name."""
    return inspect.signature(generate).bind(*args, **options).arguments


@dataclass
class Decoded:
    """One call of the decoder: what it was asked, and what came of it."""

    prompts: list
    sampling: object
    completions: list[Completion]


@pytest.fixture
def decoded(monkeypatch):
    """Every call of the decoder by the stage from here on, the latest last."""
    calls = []

    def watched(*args, **options):
        asked = asked_of(*args, **options)
        completions = generate(**asked)
        calls.append(Decoded(asked["prompts"], asked["sampling"], completions))
        return completions

    monkeypatch.setattr(rollout, "generate", watched)
    return calls


@dataclass
class Update:
    """What one update of the optimizer starts from."""

    scale: float
    model: ArithmeticModel  # as it was when the gradient was computed
    gradients: dict[str, Tensor]


def watch_updates(stage: Stage) -> list[Update]:
    """Every update from here on; they are carried out all the same."""
    updates, step = [], stage.run.optimizer.step

    def watched(scale=1.0):
        model = stage.model
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        updates.append(Update(scale, copy.deepcopy(model), gradients))
        step(scale)

    stage.run.optimizer.step = watched
    return updates


def watch_batches(stage: Stage) -> list:
    """Every micro-batch that a loss is computed of from here on."""
    batches, loss = [], stage.task.loss

    def watched(model, batch):
        batches.append(batch)
        return loss(model, batch)

    stage.task.loss = watched
    return batches


# ------------------------------------------------------------------- what it is, said by others


def expression_of(tokenizer, prompt: list[int]) -> str:
    return re.fullmatch(r"<bos>Evaluate: (.*?) ?<think>", tokenizer.decode(prompt))[1]


def is_right(expression: str, text: str) -> bool:
    """Whether a text ends with the number that Python makes of the expression, and states one."""
    stated = re.fullmatch(r"(?:(?!Final Result:).)*Final Result: (-?\d+)<eos>", text)
    return bool(stated) and int(stated[1]) == eval(expression)


def groups_of(tokenizer, call: Decoded, scale: str = "none") -> list[list[Episode]]:
    """The groups of a rollout, each completion with its advantage."""
    rows = [*zip(call.prompts, call.completions, strict=True)]
    groups = [rows[i : i + CANDIDATES] for i in range(0, len(rows), CANDIDATES)]
    return [_with_advantages(tokenizer, group, scale) for group in groups]


def _with_advantages(tokenizer, group, scale: str) -> list[Episode]:
    rewards = [
        float(is_right(expression_of(tokenizer, prompt), tokenizer.decode(written.tokens)))
        for prompt, written in group
    ]
    unit = stdev(rewards) + 1e-4 if scale == "group" else 1.0
    return [
        Episode(prompt, c.tokens, c.logprobs, (reward - fmean(rewards)) / unit, c.support)
        for (prompt, c), reward in zip(group, rewards, strict=True)
    ]


def episodes_of(tokenizer, call: Decoded, scale: str = "none") -> list[Episode]:
    """All completions of those groups that were neither all right nor all wrong."""
    groups = groups_of(tokenizer, call, scale)
    alive = [group for group in groups if any(episode.advantage for episode in group)]
    assert alive, "no group of this step has anything to teach; choose another seed"
    return [episode for group in alive for episode in group]


def replayed(tokenizer, batches: list) -> list[list[int]]:
    """The token ids of the solutions among micro-batches; each is checked to be right."""
    found = [ids for b in batches if hasattr(b, "batch") for ids in b.batch.input_ids.tolist()]
    solutions = []
    for ids in found:
        text = re.sub("(<eos>)?(<pad>)*$", "", tokenizer.decode(ids))
        expression, steps = re.fullmatch(r"<bos>Evaluate: (.*?) ?<think>(.*)", text).groups()
        assert is_right(expression, steps + "<eos>")
        solutions.append([*tokenizer.prompt_ids(expression), *tokenizer.encode(steps), EOS])
    return solutions


def cross_entropy(theirs, sequences: list[list[int]]) -> Tensor:
    """Of transformers' model, in nats a token that stands after ``<think>``."""
    losses = []
    for ids in sequences:
        start = ids.index(THINK)
        logits = theirs(torch.tensor([ids])).logits[0, start:-1]
        target = torch.tensor(ids[start + 1 :])
        losses.append(nn.functional.cross_entropy(logits, target, reduction="none"))
    return torch.cat(losses).mean()


def surrogate(theirs, made: list[Episode], config: GRPOConfig) -> float:
    """Sum over completions of advantage times log-probability."""
    rows = their_logprobs(theirs, made, config)
    return sum(e.advantage * sum(row) for e, row in zip(made, rows, strict=True))


def gradients_through_adapter(model: ArithmeticModel, merged: dict[str, Tensor]):
    """Of ``A`` and ``B``, by the chain rule, from those of the merged ``W + scale * B A``."""
    found = {}
    for path, layer in lora_layers(model):
        gradient = merged[f"{path}.weight"] * layer.scale
        found[f"{path}.lora_A.weight"] = layer.lora_B.weight.T @ gradient
        found[f"{path}.lora_B.weight"] = gradient @ layer.lora_A.weight.T
    return found


def clipped_share(old, new, made, config) -> float:
    """Of the tokens, those where clipping stops the gradient."""
    active = [
        (ratio > 1 + config.epsilon_high and e.advantage > 0)
        or (ratio < 1 - config.epsilon_low and e.advantage < 0)
        for e, *rows in zip(made, old, new, strict=True)
        for ratio in (math.exp(b - a) for a, b in zip(*rows, strict=True))
    ]
    return fmean(active)


# ------------------------------------------------------------------------- a whole step of TRL's

STEPS = {
    "all tokens": {"loss_type": "dapo"},
    "top k": {"loss_type": "dr_grpo", "top_k": 5, "kl_estimator": "k3_plain"},
    "nucleus": {"loss_type": "grpo", "top_p": 0.97, "scale_rewards": "group"},
    "adapter": {"loss_type": "dapo", "top_k": 8, **KINDS["adapter"]},
}


@pytest.mark.parametrize("kind", STEPS)
def test_each_update_of_a_later_step_is_that_of_trl(opened, tokenizer, decoded, kind):
    """With KL to the start, several updates, several micro-batches, and replay."""
    stage = opened(num_iterations=3, sft_replay_coef=0.4, **STEPS[kind])
    config, start = stage.config, of_transformers(merge_adapter(stage.model))
    for _ in range(2):
        stage.step()
    updates, batches = watch_updates(stage), watch_batches(stage)
    loss = stage.step()
    made = episodes_of(tokenizer, decoded[-1], config.scale_rewards)
    solutions = replayed(tokenizer, batches[: len(batches) // 3])
    assert len(updates) == 3
    assert len(batches) // 3 > 3  # of them two with replay
    assert len(solutions) == config.batch_size

    policies = [of_transformers(merge_adapter(update.model)) for update in updates]
    old, reference = (their_logprobs(m, made, config) for m in (policies[0], start))
    losses = []
    for update, theirs in zip(updates, policies, strict=True):
        expected, metrics = their_loss(theirs, made, config, config.loss_type, old, reference)
        expected = expected + config.sft_replay_coef * cross_entropy(theirs, solutions)
        expected.backward()
        losses.append(expected.item())
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        if config.lora_rank:
            gradients = gradients_through_adapter(update.model, gradients)
        assert_same_gradients(update.gradients, gradients)
        assert metrics["kl"] > 1e-3  # or the reference could be anything
    assert loss == pytest.approx(fmean(losses), rel=1e-4)
    last = their_logprobs(policies[-1], made, config)
    assert 0 < clipped_share(old, last, made, config) < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_is_zero_at_the_start_and_then_that_to_the_start(opened, tokenizer, decoded, kind):
    """At one update a step the ratio is 1: the loss is the KL less the mean advantage."""
    stage = opened(kl_penalty_coef=1.0, **KINDS[kind])
    config, start = stage.config, of_transformers(merge_adapter(stage.model))
    for step in range(4):
        theirs = of_transformers(merge_adapter(stage.model))
        loss = stage.step()
        made = episodes_of(tokenizer, decoded[-1])
        kl = loss + fmean(e.advantage for e in made for _ in e.completion)
        rows = zip(*(their_logprobs(m, made, config) for m in (theirs, start)), strict=True)
        gaps = [b - a for policy, base in rows for a, b in zip(policy, base, strict=True)]
        assert kl == pytest.approx(fmean(math.exp(gap) - gap - 1 for gap in gaps), abs=1e-6)
        assert (kl > 5e-6) == (step > 0)


# -------------------------------------------------------------------------- the right direction


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e-5},
        {"learning_rate": 1e-5, "optimizer": "muon", "muon_learning_rate": 1e-4},
    ],
    ids=["adamw", "muon"],
)
def test_a_step_makes_likelier_what_is_better_than_its_group(opened, tokenizer, decoded, options):
    stage = opened(**options)
    before = of_transformers(stage.model)
    stage.step()
    after, made = of_transformers(stage.model), episodes_of(tokenizer, decoded[-1])
    gained = surrogate(after, made, stage.config) - surrogate(before, made, stage.config)
    assert gained > 0.01


# --------------------------------------------------------------------- what the loss depends on


def gradients_of_step(stage: Stage) -> list[dict[str, Tensor]]:
    """Of each update of a step that no check precedes."""
    updates = watch_updates(stage)
    stage.run.step = 1
    stage.step()
    return [update.gradients for update in updates]


def assert_equal_gradients(ones, others):
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("iterations", [1, 2])
def test_old_logprobs_are_the_policys_own_and_not_the_decoders(opened, monkeypatch, iterations):
    def off(*args, **options):
        completions = generate(*args, **options)
        for completion in completions:
            completion.logprobs = [logprob - 0.2 for logprob in completion.logprobs]
        return completions

    plain = gradients_of_step(opened(num_iterations=iterations))
    monkeypatch.setattr(rollout, "generate", off)
    assert_equal_gradients(gradients_of_step(opened(num_iterations=iterations)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_plays_no_part_in_a_step_and_is_on_again_after_it(opened, decoded, kind):
    """In rollouts, old log-probs, reference, loss and replay."""
    found = []
    for on in (True, False):
        stage = opened(num_iterations=2, sft_replay_coef=0.4, **KINDS[kind])
        dropouts = [m for m in stage.model.modules() if isinstance(m, nn.Dropout)]
        assert {dropout.p for dropout in dropouts} == {0.5}
        for _, layer in lora_layers(stage.model):  # B is 0: nothing of an adapter would show
            nn.init.constant_(layer.lora_B.weight, 0.01)
        for dropout in [] if on else dropouts:
            dropout.p = 0.0
        found.append(gradients_of_step(stage))
        assert all(dropout.training for dropout in dropouts)
    assert_equal_gradients(*found)
    texts = [[completion.tokens for completion in call.completions] for call in decoded]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.7}], ids=str)
def test_dropping_the_support_of_a_rollout_would_change_the_step(opened, monkeypatch, cut):
    """Which is what makes the comparison with TRL above worth something."""

    def forgetful(*args, **options):
        completions = generate(*args, **options)
        for completion in completions:
            completion.support = []
        return completions

    one = gradients_of_step(opened(**cut))
    monkeypatch.setattr(rollout, "generate", forgetful)
    (other,) = gradients_of_step(opened(**cut))
    with pytest.raises(AssertionError):
        assert_same_gradients(one[0], other)


# ------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 4, "top_p": 0.8}], ids=str
)
def test_rollouts_are_sampled_as_the_config_says(opened, decoded, options):
    stage = opened(**options)
    stage.step()
    (call,) = decoded
    assert {name: getattr(call.sampling, name) for name in options} == options
    assert len(call.prompts) == stage.config.batch_size * CANDIDATES
    seeds = [call.sampling.seed]
    for _ in range(2):
        stage.step()
        seeds.append(decoded[-1].sampling.seed)
    assert len({*seeds}) == 3


def test_refills_are_sampled_with_random_numbers_of_their_own(opened, decoded):
    """Of pairs, half are alike, so that there is something to replace."""
    opened(num_candidates=2, refill_rounds=2).step()
    assert len(decoded) == len({call.sampling.seed for call in decoded}) == 3


def test_rollouts_at_another_temperature_than_the_loss_end_the_run(opened, monkeypatch):
    def hotter(*args, **options):
        asked = asked_of(*args, **options)
        return generate(**{**asked, "sampling": replace(asked["sampling"], temperature=1.0)})

    monkeypatch.setattr(rollout, "generate", hotter)
    with pytest.raises(UserError, match="decoder and training log-probs differ"):
        opened().step()


# --------------------------------------------------------------------------------- accumulation


def test_accumulated_batches_of_prompts_are_one_update(opened, tokenizer, decoded):
    found = []
    for size, accumulated in ((2, 4), (8, 1)):
        stage = opened(batch_size=size, gradient_accumulation_steps=accumulated, num_samples=16)
        assert stage.task.steps_per_epoch == 2
        found.append(gradients_of_step(stage))
        assert len(groups_of(tokenizer, decoded[-1])) == 8
    assert len(found[0]) == 1
    assert_equal_gradients(*found)


# ------------------------------------------------------------------- prompts, replay, validation

SOURCES = {
    "generated": {},
    "generated with refills": {"refill_rounds": 1},
    "instruction": {"data_mode": "instruction"},
}


@pytest.mark.parametrize("source", SOURCES)
def test_prompts_and_replay_are_of_the_train_split(opened, world, tokenizer, decoded, source):
    stage = opened(sft_replay_coef=0.4, **SOURCES[source])
    batches = watch_batches(stage)
    for _ in range(2):
        stage.step()
    prompts = {expression_of(tokenizer, p) for call in decoded for p in call.prompts}
    solutions = [
        expression_of(tokenizer, ids[: ids.index(THINK) + 1])
        for ids in replayed(tokenizer, batches)
    ]
    assert len(solutions) == 16
    assert len({*solutions}) > 8  # drawn anew, not the same ones again
    assert {split_of(expression) for expression in prompts | {*solutions}} == {"train"}
    if source == "instruction":
        lines = map(json.loads, (world / "i.jsonl").read_text().splitlines())
        assert prompts | {*solutions} <= {line["expression"] for line in lines}


@pytest.mark.parametrize("source", SOURCES)
def test_replay_is_of_other_prompts_than_the_rollouts(opened, tokenizer, decoded, source):
    """But for a few: there are not many prompts, and a draw may hit the same one by chance."""
    stage = opened(sft_replay_coef=0.4, **SOURCES[source])
    shared = 0
    for _ in range(2):
        calls, batches = len(decoded), watch_batches(stage)
        stage.step()
        prompts = {tuple(prompt) for call in decoded[calls:] for prompt in call.prompts}
        solutions = replayed(tokenizer, batches)
        assert len(solutions) == 8
        shared += sum(tuple(ids[: ids.index(THINK) + 1]) in prompts for ids in solutions)
    assert shared < 8


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_held_out_is_of_the_validation_split(opened, tokenizer, decoded, source):
    stage = opened(**SOURCES[source])
    stage.task.validate(stage.model.eval())
    (call,) = decoded
    expressions = [expression_of(tokenizer, prompt) for prompt in call.prompts]
    assert {split_of(expression) for expression in expressions} == {"validation"}
    assert Counter(expressions) == Counter(stage.task.validation)
    assert len(expressions) == stage.config.eval_samples


def test_validation_is_greedy_whatever_seed_and_temperature(opened, tokenizer, decoded):
    """Its figures are the share of right ones among what the decoder writes by itself."""
    stage, found = opened(data_mode="instruction"), []
    problems = stage.task.source.of_step(0) + stage.task.source.of_step(1)
    for options in ({}, {"seed": 7}, {"temperature": 5.0, "top_k": 50}):
        config = replace(stage.config, **options)
        task = GRPOTask(stage.model, tokenizer, config, stage.task.source, problems)
        found.append(task.validate(stage.model))
    written = generate(stage.model, decoded[0].prompts, stage.config.max_gen_length)
    right = [
        is_right(expression, tokenizer.decode(completion.tokens))
        for expression, completion in zip(problems, written, strict=True)
    ]
    assert 0.2 < fmean(right) < 1
    assert found[0]["eval_exact"] == found[0]["eval_reward"] == fmean(right)
    assert found[0] == found[1] == found[2]


# ------------------------------------------------------------------------------------ precision


def test_bf16_is_the_precision_of_every_training_forward(opened, monkeypatch):
    """Of the check of the start, old log-probs, reference, loss and replay; not of the decoder."""
    types = {"decoder": set(), "training": set()}
    place = ["training"]

    def decoding(*args, **options):
        place.append("decoder")
        try:
            return generate(*args, **options)
        finally:
            place.pop()

    def note(module, inputs, output):
        if isinstance(module, nn.Linear):
            types[place[-1]].add(output.dtype)

    monkeypatch.setattr(rollout, "generate", decoding)
    stage = opened(precision="bf16", num_iterations=2, sft_replay_coef=0.4)
    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        stage.step()
    finally:
        hook.remove()
    assert types == {"decoder": {torch.float32}, "training": {torch.bfloat16}}


# -------------------------------------------------------------------------------- learning rate


@pytest.fixture
def scripted(tokenizer, monkeypatch):
    """In place of the decoder: every second completion is right, at once."""

    def write(model, prompts, *_, **__):
        return [completion(prompt, row % 2) for row, prompt in enumerate(prompts)]

    def completion(prompt, wrong):
        expression = expression_of(tokenizer, prompt)
        text = with_result(expression, 999) if wrong else right_answer(expression)
        tokens = [*tokenizer.encode(text), EOS]
        return Completion(tokens, [0.0] * len(tokens), "eos")

    monkeypatch.setattr(rollout, "generate", write)
    monkeypatch.setattr(GRPOTask, "_check_start", lambda *_: None)


def test_the_learning_rate_follows_its_schedule_and_is_the_logged_one(opened, scripted):
    """A warm-up of 2 of 20 steps, then half a cosine from the peak down to a tenth of it."""
    stage = opened(
        schedule="cosine",
        final_lr_ratio=0.1,
        warmup_steps=2,
        num_iterations=2,
        batch_size=1,
        num_candidates=2,
        eval_samples=1,
    )
    updates = watch_updates(stage)
    trainer.fit(stage.run, stage.task)
    cosine = [(1.0 + math.cos(math.pi * step / 18)) / 2 for step in range(18)]
    expected = [0.5, 1.0, *(0.1 + 0.9 * share for share in cosine)]
    assert [update.scale for update in updates[::2]] == pytest.approx(expected)
    assert [update.scale for update in updates[1::2]] == pytest.approx(expected)
    lines = map(json.loads, (stage.run.folder / "metrics.jsonl").read_text().splitlines())
    logged = [line["learning_rate"] for line in lines if "loss" in line]
    assert logged == pytest.approx([1e-3 * scale for scale in expected])
    assert {group["lr"] for group in stage.run.optimizer.param_groups} == {1e-3}
