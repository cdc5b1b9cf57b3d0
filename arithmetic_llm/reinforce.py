"""The GRPO stage: a policy that learns from its own attempts."""

from __future__ import annotations

import copy
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arithmetic_llm.adapters import parameter_summary, save_adapter_files, with_adapter
from arithmetic_llm.checkpoint import (
    Checkpoint,
    check_tokenizer,
    load_checkpoint,
    resolve_stamp,
    weights_hash,
)
from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.corpus import generate as generate_samples
from arithmetic_llm.corpus import test_set
from arithmetic_llm.coverage import merge
from arithmetic_llm.data import Batch, LossWeights, TokenisedSamples
from arithmetic_llm.generate import GREEDY, Sampling, evaluating
from arithmetic_llm.grpo import (
    Episode,
    EpisodeBatch,
    chosen,
    collate,
    group_advantages,
    grpo_loss,
    policy_distribution,
)
from arithmetic_llm.lora import disable_adapter, lora_layers
from arithmetic_llm.model import ArithmeticModel
from arithmetic_llm.rewards import parse_rewards
from arithmetic_llm.rollout import PassRates, PromptSource, Rollout, roll_out
from arithmetic_llm.runtime import (
    UserError,
    keep_freed_memory,
    resolve_device,
    seed_everything,
    sha256_file,
)
from arithmetic_llm.sampling import SampleSpec
from arithmetic_llm.supervised import counted_logits, summed_cross_entropy
from arithmetic_llm.tokenizer import ArithmeticTokenizer
from arithmetic_llm.trainer import ROLLOUTS, MetricsLog, Run, fit, open_run

DEAD_STEPS_TO_WARN = 10
# Largest difference, in nats a token, between what the decoder sampled with and what the training
# forward says of the same token. They add in another order; bf16 also rounds every product.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class Replay:
    """Right solutions to learn beside the policy's own; adds to the loss, not to its divisor."""

    batch: Batch
    count: float = 0.0

    @property
    def tokens(self) -> int:
        return self.batch.tokens

    def to(self, device: torch.device) -> Replay:
        return replace(self, batch=self.batch.to(device))


class GRPOTask:
    """Rollouts, rewards and their loss; see `trainer.Task`."""

    def __init__(
        self, run_model: ArithmeticModel, tokenizer: ArithmeticTokenizer, config: GRPOConfig
    ):
        self.model, self.tokenizer, self.config = run_model, tokenizer, config
        self.weights = parse_rewards(config.rewards)
        self.pass_rates = PassRates()
        self.source = PromptSource(config, self.pass_rates)
        self.reference = Reference(run_model, needed=config.kl_penalty_coef > 0)
        self.validation = _validation_prompts(config)
        self.prompts_per_step = config.batch_size * config.gradient_accumulation_steps
        self.steps_per_epoch = -(-self.source.prompts_per_epoch // self.prompts_per_step)
        self.total_steps = config.max_steps or config.num_epochs * self.steps_per_epoch
        self.precision = torch.float32  # of the training forward; set when the run is open
        self.dead_steps = 0
        self.folder: Path | None = None  # where samples of rollouts go; set when the run is open
        self._reset()

    # -- rollouts

    def updates(self, step: int) -> Iterator[list[EpisodeBatch | Replay]]:
        """Roll out, drop what carries no signal, and give each update its micro-batches."""
        self._reset()
        started = time.monotonic()
        groups = self._rollouts(step)
        self.pass_rates.update([*chain(*groups)])
        self._note(groups, time.monotonic() - started)
        self._keep_sample(step, groups[0])
        started = time.monotonic()
        batches = self._batches(self._episodes(groups))
        if not batches:
            self._warn_of_dead_step()
            return
        self.dead_steps = 0
        if step == 0:
            print(self.check_start(batches), file=sys.stderr)
        if self.config.num_iterations > 1:
            batches = [replace(b, old_logprobs=self._old_logprobs(b)) for b in batches]
        for _ in range(self.config.num_iterations):
            yield [*batches, *self._replay(step, batches)]
        self.noted["seconds_training"] = time.monotonic() - started

    def _rollouts(self, step: int) -> list[list[Rollout]]:
        """A step's groups; dead ones are replaced by new prompts as often as the config allows."""
        groups = self._roll_out_round(self.prompts_per_step, step, 0)
        for round_ in range(1, self.config.refill_rounds + 1):
            live = [group for group in groups if not is_dead(group)]
            missing = self.prompts_per_step - len(live)
            if not missing:
                break
            groups = live + self._roll_out_round(missing, step, round_)
        return groups

    def _roll_out_round(self, prompts: int, step: int, round_: int) -> list[list[Rollout]]:
        config = self.config
        seed = int(np.random.SeedSequence((config.seed, step, round_)).generate_state(1)[0])
        sampling = Sampling(config.temperature, config.top_k, config.top_p, seed)
        expressions = self.source.draw(prompts, step, round_)
        return self._roll_out(expressions, config.num_candidates, sampling)

    def _roll_out(
        self, expressions: Sequence[str], copies: int, sampling: Sampling
    ) -> list[list[Rollout]]:
        return roll_out(
            self.model, self.tokenizer, expressions, copies, sampling, self.config, self.weights
        )

    def _episodes(self, groups: list[list[Rollout]]) -> list[Episode]:
        """The rollouts that move the policy: those with an advantage, less masked cut-offs."""
        config = self.config
        rewards = torch.tensor([[rollout.reward for rollout in group] for group in groups])
        advantages = group_advantages(rewards, config.scale_rewards, config.baseline)
        no_signal = [config.baseline == "group" and is_dead(group) for group in groups]
        return [
            Episode(
                rollout.prompt,
                rollout.completion.tokens,
                rollout.completion.logprobs,
                float(advantage),
                rollout.completion.support,
            )
            for group, row, dead in zip(groups, advantages, no_signal, strict=True)
            for rollout, advantage in zip(group, row, strict=True)
            if not dead
            and not (config.baseline == "none" and advantage == 0)
            and not (rollout.cut_off and config.cutoff == "mask")
        ]

    def _batches(self, episodes: list[Episode]) -> list[EpisodeBatch]:
        """Micro-batches of episodes of like length."""
        size = self.config.micro_batch_size
        ordered = sorted(episodes, key=lambda e: len(e.prompt) + len(e.completion))
        starts = range(0, len(ordered), size)
        return [collate(ordered[i : i + size], self.config) for i in starts]

    # -- loss

    def loss(self, model: ArithmeticModel, batch: EpisodeBatch | Replay) -> Tensor:
        with evaluating(model):  # dropout would make ratio and KL compare two different policies
            if isinstance(batch, Replay):
                return summed_cross_entropy(*counted_logits(model, batch.batch))
            distribution = policy_distribution(model, batch, self.config.temperature)
            reference = self.reference.distribution(batch, self.config.temperature)
            terms = grpo_loss(distribution, reference, batch, self.config)
        for name in ("kl", "entropy", "clipped", "tokens"):
            self.sums[name] += getattr(terms, name)
        return terms.loss

    def _old_logprobs(self, batch: EpisodeBatch) -> Tensor:
        """(B, T): the policy's own view before the first of several updates."""
        old = torch.zeros(batch.weights.shape)
        old[batch.mask] = self._logprobs(batch).cpu()
        return old

    @torch.no_grad()
    def _logprobs(self, batch: EpisodeBatch) -> Tensor:
        """(M,) from the same forward that trains."""
        batch = batch.to(self.model.device)
        with evaluating(self.model), self._autocast():
            distribution = policy_distribution(self.model, batch, self.config.temperature)
        return chosen(distribution, batch)

    def _autocast(self):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.precision)

    def _replay(self, step: int, batches: list[EpisodeBatch]) -> list[Replay]:
        """Right solutions of new prompts, weighing ``sft_replay_coef`` times the policy's loss."""
        config = self.config
        if not config.sft_replay_coef:
            return []
        seed = int(np.random.SeedSequence((config.seed, step, 2**20)).generate_state(1)[0])
        samples = generate_samples(_nested(config), self.prompts_per_step, seed, "train")
        context = self.model.config.max_seq_length
        records = (sample.record for sample in samples)
        replay = TokenisedSamples(records, self.tokenizer, context, LossWeights(0.0, 1.0))
        if len(replay) == 0:
            return []
        batch = replay.batch(range(len(replay)))
        share = config.sft_replay_coef * sum(b.count for b in batches) / batch.count
        return [Replay(replace(batch, weights=batch.weights * share))]

    # -- what is checked, told and kept

    def check_start(self, batches: list[EpisodeBatch]) -> str:
        """At step 0 decoder and training forward agree, and the policy is its own reference.

        Raises:
            RuntimeError: they do not; every later figure would be wrong.
        """
        gap = max(
            float((self._logprobs(b).cpu() - b.rollout_logprobs[b.mask]).abs().max())
            for b in batches
        )
        with torch.no_grad(), evaluating(self.model), self._autocast():
            kl = max(self._start_kl(batch.to(self.model.device)) for batch in batches)
        if gap > TOLERANCE[self.precision] or kl > 1e-6:
            raise RuntimeError(
                f"step 0: decoder and training log-probs differ by {gap:.2e} nats a token "
                f"(tolerance {TOLERANCE[self.precision]}), KL to the reference is {kl:.2e} (not 0)"
            )
        return (
            f"step 0: decoder and training log-probs agree to {gap:.1e} nats a token, KL {kl:.1g}"
        )

    def _start_kl(self, batch: EpisodeBatch) -> float:
        reference = self.reference.distribution(batch, self.config.temperature)
        if reference is None:
            return 0.0
        distribution = policy_distribution(self.model, batch, self.config.temperature)
        return float(torch.where(reference > -torch.inf, distribution - reference, 0).abs().max())

    def _note(self, groups: list[list[Rollout]], seconds: float) -> None:
        rollouts = [*chain(*groups)]
        lengths = [len(rollout.completion.tokens) for rollout in rollouts]
        self.noted = {
            "reward": fmean(r.reward for r in rollouts),
            "reward_std": fmean(pstdev(r.reward for r in group) for group in groups),
            "accuracy": fmean(r.verdict.correct for r in rollouts),
            "frac_reward_zero_std": fmean(map(is_dead, groups)),
            "completions/mean_length": fmean(lengths),
            "completions/clipped_ratio": fmean(r.cut_off for r in rollouts),
            "seconds_generating": seconds,
            "seconds_training": 0.0,
        }
        for name in self.weights:
            self.noted[f"rewards/{name}"] = fmean(r.parts[name] for r in rollouts)

    def _keep_sample(self, step: int, group: list[Rollout]) -> None:
        """One whole group with its texts, so that a reader can see what is rewarded."""
        if self.folder and (step + 1) % self.config.log_every == 0:
            log = MetricsLog(self.folder, ROLLOUTS)
            log.append(step=step + 1, rollouts=[rollout.as_dict() for rollout in group])

    def figures(self) -> dict[str, float]:
        """The log line of a step, under the names that users of TRL know."""
        tokens = max(1, self.sums["tokens"])
        means = {name: self.sums[name] / tokens for name in ("kl", "entropy")}
        return {**self.noted, **means, "clip_ratio": self.sums["clipped"] / tokens}

    def _reset(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.noted: dict[str, float] = {}

    def _warn_of_dead_step(self) -> None:
        self.dead_steps += 1
        if self.dead_steps % DEAD_STEPS_TO_WARN == 0:
            print(
                f"WARNING: {self.dead_steps} steps in a row without any signal: in each group all "
                f"rewards are alike (accuracy {self.noted['accuracy']:.3f}), so nothing is learned."
                " Choose depths that succeed sometimes, a higher --temperature, more "
                "--num-candidates, --adaptive-difficulty or --refill-rounds.",
                file=sys.stderr,
            )

    def evaluate(self, model: ArithmeticModel) -> dict[str, float]:
        """Greedy on held-out prompts: reward, exact match, and exact match at each depth."""
        groups = self._roll_out(self.validation, 1, GREEDY)
        by_depth = defaultdict(list)
        for (rollout,) in groups:
            by_depth[rollout.depth].append(rollout)
        figures = {
            "eval_reward": fmean(rollout.reward for (rollout,) in groups),
            "eval_exact": fmean(rollout.verdict.correct for (rollout,) in groups),
        }
        for depth, rollouts in sorted(by_depth.items()):
            figures[f"eval_exact_depth_{depth}"] = fmean(r.verdict.correct for r in rollouts)
        return figures

    def badness(self, figures: dict[str, float]) -> float:
        return -figures["eval_reward"]

    def work(self, step: int) -> float:
        """Steps: how long a rollout will take is not known beforehand."""
        return step

    def state_dict(self) -> dict[str, Any]:
        return {"pass_rates": dict(self.pass_rates.rates), "dead_steps": self.dead_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pass_rates.rates = dict(state.get("pass_rates", {}))
        self.dead_steps = state.get("dead_steps", 0)


class Reference:
    """The frozen start of the policy: a copy, or the policy itself with its adapter disabled."""

    def __init__(self, policy: ArithmeticModel, needed: bool):
        self.needed, self.adapted = needed, bool(lora_layers(policy))
        self.model = policy
        if needed and not self.adapted:
            self.model = copy.deepcopy(policy).requires_grad_(False).eval()

    @torch.no_grad()
    def distribution(self, batch: EpisodeBatch, temperature: float) -> Tensor | None:
        """(M, V) log-probabilities, like the policy's; None if the KL counts nothing."""
        if not self.needed:
            return None
        with disable_adapter(self.model):
            return policy_distribution(self.model, batch, temperature)


def is_dead(group: Sequence[Rollout]) -> bool:
    """All rewards alike: the group says nothing about what to do better."""
    return all(rollout.reward == group[0].reward for rollout in group)


# ------------------------------------------------------------------------------------ the stage


def train_grpo(config: GRPOConfig) -> Path:
    """Improve a policy by its own attempts; returns the run folder."""
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed)
    if config.data_mode == "instruction" and not config.instruction_corpus:
        raise UserError("--instruction-corpus is required; or use --data-mode generated")
    start = resolve_stamp(config.sft_checkpoint)
    base = load_checkpoint(start, resolve_device(config.device), config.base_checkpoint)
    check_tokenizer(base, resolve_stamp(config.tokenizer), start)
    start_hash = weights_hash(base.model)
    corpus = config.instruction_corpus
    sources = {"corpus_sha256": sha256_file(corpus)} if corpus else {}
    checkpoint = Checkpoint(base.model, base.tokenizer, "grpo", _seen(base, config))
    if config.lora_rank:
        checkpoint = with_adapter(checkpoint, config, start)
    task = GRPOTask(checkpoint.model, checkpoint.tokenizer, config)
    run = open_run(config, checkpoint, start_hash=start_hash, **sources)
    task.precision, task.folder = run.precision, run.folder
    _describe(run, task)
    fit(run, task, _more_files)
    print(f"done: models in {run.folder}")
    return run.folder


def _more_files(run: Run) -> None:
    if run.checkpoint.adapter:
        save_adapter_files(run, run.config)
    run.write_json("grpo_training_log.json", MetricsLog(run.folder).read())


def _seen(base: Checkpoint, config: GRPOConfig) -> dict[str, Any]:
    """What the policy will have been trained on: prompts count as problems seen."""
    if config.data_mode == "instruction":
        return base.trained_on
    generated = {
        "styles": {"nested": config.num_samples * config.num_epochs},
        "depths": list(range(config.min_depth, config.max_depth + 1)),
        "flat_terms": [],
        "num_range": list(config.num_range),
        "splits": {"train": config.num_samples * config.num_epochs},
    }
    return merge(base.trained_on, generated)


def _nested(config: GRPOConfig) -> SampleSpec:
    return SampleSpec(
        num_range=config.num_range,
        min_depth=config.min_depth,
        max_depth=config.max_depth,
        invalid_rate=0.0,
        typed_rate=0.0,
    )


def _validation_prompts(config: GRPOConfig) -> list[str]:
    samples = test_set(_nested(config), max(1, config.eval_samples), config.seed, "validation")
    return [sample.record.expression for sample in samples]


def _describe(run: Run, task: GRPOTask) -> None:
    config = run.config
    print(
        f"grpo: {parameter_summary(run.model)} on {run.model.device}, {task.prompts_per_step} "
        f"prompts x {config.num_candidates} completions a step, {task.total_steps:,} steps, "
        f"rewards {config.rewards}, seed {config.seed}\nrun folder {run.folder}"
    )
