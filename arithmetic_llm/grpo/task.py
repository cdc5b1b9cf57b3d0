"""The GRPO stage: a policy that learns from its own attempts."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.corpus.files import solved
from arithmetic_llm.grpo.loss import (
    Episode,
    EpisodeBatch,
    chosen,
    collate,
    group_advantages,
    grpo_loss,
    kl_divergence,
    policy_distribution,
)
from arithmetic_llm.grpo.prompts import PromptSource
from arithmetic_llm.grpo.reference import Reference
from arithmetic_llm.grpo.rewards import parse_rewards
from arithmetic_llm.grpo.rollout import Rollout, roll_out, row_name
from arithmetic_llm.model.decode import GREEDY, Sampling, evaluating
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError
from arithmetic_llm.training.batches import Batch, LossWeights, TokenisedSamples, micro_batches
from arithmetic_llm.training.loop import autocast
from arithmetic_llm.training.run import ROLLOUTS, MetricsLog
from arithmetic_llm.training.supervised import (
    counted_logits,
    summed_cross_entropy,
)

DEAD_STEPS_TO_WARN = 10
# How much the log-probs that the decoder sampled with may differ from those of the training
# forward, in nats a token: on average, and at most. In fp32 the two add in another order, that is
# all; bf16 rounds every product, which moves single unlikely tokens by almost 1.
TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (1e-2, 2.0)}
LARGEST_START_KL = 1e-6  # nats a token: the policy is its reference, so what is there is rounding
REPLAY = 2**20  # a round of its own, so that no replayed prompt is that of a rollout by plan


@dataclass(frozen=True)
class Solutions:
    """Right solutions to learn from; beside rollouts they add to the loss, not to its divisor."""

    batch: Batch
    count: float

    @property
    def tokens(self) -> int:
        return self.batch.tokens

    def to(self, device: torch.device) -> Solutions:
        return replace(self, batch=self.batch.to(device))


class GRPOTask:
    """Rollouts, rewards and their loss; see `loop.Task`.

    Args:
        validation: held-out expressions to judge the policy by.
    """

    judges_start = True  # what a run adds shows only beside what it began with

    def __init__(
        self,
        model: ArithmeticModel,
        tokenizer: ArithmeticTokenizer,
        config: GRPOConfig,
        source: PromptSource,
        validation: Sequence[str],
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.source, self.validation = source, validation
        self.pass_rates = source.pass_rates
        self.weights = parse_rewards(config.rewards)
        attempts = config.learn_from == "attempts"
        self.reference = Reference(model, needed=attempts and config.kl_penalty_coef > 0)
        self.steps_per_epoch = source.steps_per_epoch
        self.total_steps = config.max_steps or config.num_epochs * self.steps_per_epoch
        self.precision = torch.float32  # of the training forward; set when the run is open
        self.dead_steps = 0
        self.folder: Path | None = None  # where samples of rollouts go; set when the run is open
        self._reset()

    # -- rollouts

    def updates(self, step: int) -> Iterator[list[EpisodeBatch | Solutions]]:
        """The micro-batches of each update, from attempts or from solutions."""
        self._reset()
        if self.config.learn_from == "attempts":
            yield from self._from_attempts(step)
        elif solutions := self._solutions(self.source.of_step(step)):
            yield solutions

    def _from_attempts(self, step: int) -> Iterator[list[EpisodeBatch | Solutions]]:
        """Roll out, drop what carries no signal, and give each update its micro-batches.

        A step without signal has what is replayed, and no update if that is nothing.
        """
        started = time.monotonic()
        groups = self._rollouts(step)
        self.pass_rates.update([*chain(*groups)])
        self._note(groups, time.monotonic() - started)
        self._keep_sample(step, groups[0])
        started = time.monotonic()
        if step == 0:
            episodes = [as_episode(rollout, 0.0) for rollout in chain(*groups)]
            print(self.check_start(self._batches(episodes)), file=sys.stderr)
        batches = self._batches(self._signal(groups))
        self.dead_steps = 0 if batches else self.dead_steps + 1
        self._warn_of_dead_steps()
        if self.config.num_iterations > 1:
            batches = [replace(b, old_logprobs=self._old_logprobs(b)) for b in batches]
        micro_batches = batches + self._replay(step, batches)
        for _ in range(self.config.num_iterations if micro_batches else 0):
            yield micro_batches
        self.noted["seconds_training"] = time.monotonic() - started

    def _rollouts(self, step: int) -> list[list[Rollout]]:
        """A step's groups, and new ones in place of the dead as often as the config allows.

        The dead ones stay in the list: figures and pass rates count all that was rolled out.
        """
        prompts = self.source.of_step(step)
        groups = self._roll_out(prompts, self.config.num_candidates, self._sampling(step, 0))
        for round_ in range(1, self.config.refill_rounds + 1):
            missing = len(prompts) - sum(not self._is_dead(group) for group in groups)
            if not missing:
                break
            others = self.source.others(missing, step, round_)
            sampling = self._sampling(step, round_)
            groups += self._roll_out(others, self.config.num_candidates, sampling)
        return groups

    def _sampling(self, step: int, round_: int) -> Sampling:
        config, seed = self.config, derived_seed(self.config.seed, step, round_)
        return Sampling(config.temperature, config.top_k, config.top_p, seed)

    def _roll_out(
        self, expressions: Sequence[str], copies: int, sampling: Sampling
    ) -> list[list[Rollout]]:
        return roll_out(
            self.model, self.tokenizer, expressions, copies, sampling, self.config, self.weights
        )

    def _signal(self, groups: list[list[Rollout]]) -> list[Episode]:
        """The rollouts that move the policy, with their advantages."""
        config = self.config
        rewards = torch.tensor([[rollout.reward for rollout in group] for group in groups])
        advantages = group_advantages(rewards, config.scale_rewards, config.baseline).tolist()
        return [
            as_episode(rollout, advantage)
            for group, row in zip(groups, advantages, strict=True)
            for rollout, advantage in zip(group, row, strict=True)
            if not self._is_dead(group)
            and not (config.baseline == "none" and advantage == 0)
            and not (config.cutoff == "mask" and rollout.outcome.cut_off)
        ]

    def _is_dead(self, group: Sequence[Rollout]) -> bool:
        """Nothing in it can move the policy."""
        if self.config.baseline == "none":
            return all(rollout.reward == 0 for rollout in group)
        return is_dead(group)

    def _batches(self, episodes: list[Episode]) -> list[EpisodeBatch]:
        """Micro-batches of episodes of like length."""
        lengths = np.array([len(e.prompt) + len(e.completion) for e in episodes], dtype=int)
        return [collate([episodes[i] for i in part], self.config) for part in self._parts(lengths)]

    def _parts(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Which sequences go through the model together."""
        return micro_batches(
            lengths,
            np.arange(len(lengths)),
            self.model.config,
            self.model.device,
            most_rows=self.config.micro_batch_size,
        )

    # -- loss

    def loss(self, model: ArithmeticModel, batch: EpisodeBatch | Solutions) -> Tensor:
        with evaluating(model):  # dropout would make ratio and KL compare two different policies
            if isinstance(batch, Solutions):
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
        with evaluating(self.model), autocast(self.model.device, self.precision):
            distribution = policy_distribution(self.model, batch, self.config.temperature)
        return chosen(distribution, batch)

    def _replay(self, step: int, batches: list[EpisodeBatch]) -> list[Solutions]:
        """Right solutions of new prompts; they add ``sft_replay_coef`` times their mean loss.

        Beside a policy's loss they are weighed by its divisor and add nothing to it. In a step
        without signal they are all there is, and the divisor is their own.
        """
        if not self.config.sft_replay_coef:
            return []
        prompts = self.source.others(self.source.prompts_per_step, step, REPLAY, adaptive=False)
        replay = self._solutions(prompts)
        if not replay:
            return []
        own = sum(solutions.count for solutions in replay)
        divisor = sum(batch.count for batch in batches) or own
        scale = self.config.sft_replay_coef * divisor / own
        return [
            Solutions(
                replace(r.batch, weights=r.batch.weights * scale), 0.0 if batches else r.count
            )
            for r in replay
        ]

    def _solutions(self, expressions: Sequence[str]) -> list[Solutions]:
        """Micro-batches of right solutions of like length; those beyond the context are counted."""
        context = self.model.config.max_seq_length
        records = [solved(expression) for expression in expressions]
        samples = TokenisedSamples(records, self.tokenizer, context, LossWeights(0.0, 1.0))
        self.noted["solutions_dropped"] = len(samples.dropped)
        batches = [samples.batch(part) for part in self._parts(samples.lengths)]
        return [Solutions(batch, batch.count) for batch in batches]

    # -- what is checked, told and kept

    def check_start(self, batches: list[EpisodeBatch]) -> str:
        """At step 0 decoder and training forward agree, and the policy is its own reference.

        Raises:
            UserError: they do not; every later figure would be wrong.
        """
        gaps = torch.cat([self._logprobs(b).cpu() - b.rollout_logprobs[b.mask] for b in batches])
        mean, largest = float(gaps.abs().mean()), float(gaps.abs().max())
        mean_allowed, allowed = TOLERANCE[self.precision]
        kl = max(map(self._start_kl, batches)) if self.reference.needed else 0.0
        found = (
            f"step 0: decoder and training log-probs differ by {mean:.1e} nats a token on average "
            f"(tolerance {mean_allowed:g}), at most {largest:.1e} (tolerance {allowed:g})"
            + (f", KL to the reference {kl:.1g}" if self.reference.needed else "")
        )
        if not (mean <= mean_allowed and largest <= allowed and kl <= LARGEST_START_KL):
            raise UserError(f"{found}; this must not be: try --precision fp32 or --device cpu")
        return found

    @torch.no_grad()
    def _start_kl(self, batch: EpisodeBatch) -> float:
        """Largest KL to the reference of any token, in nats."""
        batch, temperature = batch.to(self.model.device), self.config.temperature
        with evaluating(self.model), autocast(self.model.device, self.precision):
            distribution = policy_distribution(self.model, batch, temperature)
            reference = self.reference.distribution(batch, temperature)
        tokens = batch.targets[batch.mask]
        return float(kl_divergence(distribution, reference, tokens, None, "exact").abs().max())

    def _note(self, groups: list[list[Rollout]], seconds: float) -> None:
        rollouts = [*chain(*groups)]
        lengths = [len(rollout.completion.tokens) for rollout in rollouts]
        self.noted = {
            "reward": fmean(r.reward for r in rollouts),
            "reward_std": fmean(stdev(r.reward for r in group) for group in groups),
            "accuracy": fmean(r.outcome.correct for r in rollouts),
            "frac_reward_zero_std": fmean(map(is_dead, groups)),
            "completions/mean_length": fmean(lengths),
            "completions/clipped_ratio": fmean(r.outcome.cut_off for r in rollouts),
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
        names = {"entropy": "entropy", "clip_ratio": "clipped"}
        if self.reference.needed:
            names["kl"] = "kl"
        tokens = self.sums["tokens"]  # none in a step without signal, which has no such figures
        means = {name: self.sums[key] / tokens for name, key in names.items() if tokens}
        return {**self.noted, **means}

    def _reset(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.noted: dict[str, float] = {}

    def _warn_of_dead_steps(self) -> None:
        if self.dead_steps and self.dead_steps % DEAD_STEPS_TO_WARN == 0:
            print(
                f"WARNING: {self.dead_steps} steps in a row without any signal: in each group all "
                "rewards are alike, or what differs is cut off and masked. Attempts teach nothing "
                f"(accuracy {self.noted['accuracy']:.3f}, cut off "
                f"{self.noted['completions/clipped_ratio']:.3f}). Choose {self._worth_asking()}, "
                "a higher --temperature, more --num-candidates or --refill-rounds.",
                file=sys.stderr,
            )

    def _worth_asking(self) -> str:
        """Which problems to ask, in the words of the data mode."""
        if self.config.data_mode == "instruction":
            return "a corpus of problems that succeed sometimes"
        return "depths that succeed sometimes (--max-depth, --adaptive-difficulty)"

    def evaluate(self, model: ArithmeticModel) -> dict[str, float]:
        """Greedy on held-out prompts: reward, exact match, and exact match at each depth."""
        groups = self._roll_out(self.validation, 1, GREEDY)
        rows = defaultdict(list)
        for (rollout,) in groups:
            rows[rollout.outcome.problem.row].append(rollout.outcome.correct)
        figures = {
            "eval_reward": fmean(rollout.reward for (rollout,) in groups),
            "eval_exact": fmean(rollout.outcome.correct for (rollout,) in groups),
        }
        by_row = {f"eval_exact_{row_name(row)}": fmean(rows[row]) for row in sorted(rows)}
        return {**figures, **by_row}

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


def as_episode(rollout: Rollout, advantage: float) -> Episode:
    """What the loss needs of a rollout."""
    written = rollout.completion
    return Episode(rollout.prompt, written.tokens, written.logprobs, advantage, written.support)


def derived_seed(*numbers: int) -> int:
    """A seed of its own for every combination of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def is_dead(group: Sequence[Rollout]) -> bool:
    """All rewards alike: the group says nothing about what to do better."""
    return all(rollout.reward == group[0].reward for rollout in group)
