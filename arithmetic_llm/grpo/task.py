"""A GRPO step in order: roll out and reward, advantages, micro-batches, loss.

Beside it stand the formulas (`loss`), what a step logs (`monitor`), the check of the first one
(`checks`), and the frozen start (`reference`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.distributed import is_mine, world_size
from arithmetic_llm.grpo.checks import check_start
from arithmetic_llm.grpo.loss import (
    Episode,
    EpisodeBatch,
    LossSettings,
    collate,
    group_advantages,
    grpo_loss,
    token_logprobs,
)
from arithmetic_llm.grpo.monitor import Monitor, validation_metrics
from arithmetic_llm.grpo.policy import as_in_training, policy_logprobs
from arithmetic_llm.grpo.prompts import PromptSource
from arithmetic_llm.grpo.reference import Reference
from arithmetic_llm.grpo.rewards import parse_rewards
from arithmetic_llm.grpo.rollout import Rollout, is_dead, roll_out
from arithmetic_llm.grpo.solutions import Solutions, as_replay, tokenised_solutions
from arithmetic_llm.model.decode import GREEDY, SamplingParams, evaluating
from arithmetic_llm.model.fused import summed_cross_entropy
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import derived_seed
from arithmetic_llm.training.batches import micro_batches
from arithmetic_llm.training.supervised import counted_logits

REPLAY = 2**20  # a round of its own, so that no replayed prompt is that of a rollout by plan


class GRPOTask:
    """Task of the training loop that learns from attempts; see `step.Task`.

    Args:
        validation: held-out expressions to judge the policy by.
    """

    validates_start = True  # what a run adds shows only beside what it began with
    at_once = 1  # its loss notes figures in the order of the micro-batches
    shares_batches = True

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
        self.settings = loss_settings(config)
        attempts = config.learn_from == "attempts"
        self.reference = Reference(model, needed=attempts and config.kl_penalty_coef > 0)
        self.monitor = Monitor(config, self.reference.needed)
        self.steps_per_epoch = source.steps_per_epoch
        self.total_steps = source.total_steps
        self.precision = torch.float32  # of the training forward; set when the run is open

    # -- a step

    def updates(self, step: int) -> Iterator[list[EpisodeBatch | Solutions]]:
        """The micro-batches of each update, from attempts or from solutions."""
        self.monitor.begin_step()
        if self.config.learn_from == "attempts":
            yield from self._from_attempts(step)
        elif solutions := self._solutions(self.source.of_step(step)):
            yield solutions

    def _from_attempts(self, step: int) -> Iterator[list[EpisodeBatch | Solutions]]:
        """Roll out, and learn from what carries signal, in one update or several.

        A step without signal has what is replayed, and no update if that is nothing.
        """
        groups = self._rollouts(step)
        self.pass_rates.update(rollout.outcome for rollout in chain(*groups))
        self.monitor.note_rollouts(step, groups)
        if step == 0:
            self._check_start(groups)
        batches = self._batches(self._episodes(groups))
        self.monitor.note_signal(bool(batches))
        if self.config.num_iterations > 1:
            batches = [
                self._with_old_logprobs(batch) if is_mine(place) else batch
                for place, batch in enumerate(batches)
            ]
        update = batches + self._replay(step, batches)
        for _ in range(self.config.num_iterations if update else 0):
            yield update
        self.monitor.end_step()

    # -- roll out and reward

    def _rollouts(self, step: int) -> list[list[Rollout]]:
        """A step's groups, and new ones in place of the dead as often as the config allows.

        The dead ones stay in the list: figures and pass rates count all that was rolled out.
        """
        prompts = self.source.of_step(step)
        groups = self._attempts(prompts, step, 0)
        for round_ in range(1, self.config.refill_rounds + 1):
            missing = len(prompts) - sum(not self._is_dead(group) for group in groups)
            if not missing:
                break
            groups += self._attempts(self.source.others(missing, step, round_), step, round_)
        return groups

    def _attempts(self, prompts: Sequence[str], step: int, round_: int) -> list[list[Rollout]]:
        """A group of sampled completions for each prompt."""
        return self._roll_out(prompts, self.config.num_candidates, self._sampling(step, round_))

    def _sampling(self, step: int, round_: int) -> SamplingParams:
        """Sampling as the config says, with random numbers of its own for each round."""
        config, seed = self.config, derived_seed(self.config.seed, step, round_)
        return SamplingParams(config.temperature, config.top_k, config.top_p, seed)

    def _roll_out(
        self, expressions: Sequence[str], copies: int, sampling: SamplingParams
    ) -> list[list[Rollout]]:
        """A group of rewarded completions for each expression."""
        return roll_out(
            self.model, self.tokenizer, expressions, copies, sampling, self.config, self.weights
        )

    def _is_dead(self, group: Sequence[Rollout]) -> bool:
        """Tell whether nothing in a group can move the policy."""
        if self.config.baseline == "none":
            return all(rollout.reward == 0 for rollout in group)
        return is_dead(group)

    # -- advantages

    def _episodes(self, groups: list[list[Rollout]]) -> list[Episode]:
        """The rollouts that move the policy, with their advantages."""
        config = self.config
        rewards = torch.tensor([[rollout.reward for rollout in group] for group in groups])
        # Before anything is dropped: a masked completion still counts in the mean of its group.
        advantages = group_advantages(rewards, config.scale_rewards, config.baseline).tolist()
        return [
            as_episode(rollout, advantage)
            for group, row in zip(groups, advantages, strict=True)
            if not self._is_dead(group)
            for rollout, advantage in zip(group, row, strict=True)
            if not (config.baseline == "none" and advantage == 0)
            and not (config.cutoff == "mask" and rollout.outcome.cut_off)
        ]

    # -- micro-batches

    def _batches(self, episodes: list[Episode]) -> list[EpisodeBatch]:
        """Micro-batches of episodes of like length."""
        loss_type, length_limit = self.config.loss_type, self.config.max_gen_length
        lengths = np.array([len(e.prompt) + len(e.completion) for e in episodes], dtype=int)
        return [
            collate([episodes[i] for i in part], loss_type, length_limit)
            for part in self._parts(lengths)
        ]

    def _parts(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Indices of the sequences that go through the model together."""
        return micro_batches(
            lengths,
            np.arange(len(lengths)),
            self.model.config,
            self.model.device,
            least=world_size(),
            most_rows=self.config.micro_batch_size,
        )

    def _with_old_logprobs(self, batch: EpisodeBatch) -> EpisodeBatch:
        """Add the policy's own view before the first of several updates.

        Not the decoder's: in another precision or order of adding, the ratio would begin off 1.
        """
        there = batch.to(self.model.device)
        with as_in_training(self.model, self.precision):
            logprobs = policy_logprobs(self.model, there, self.config.temperature)
        old = torch.zeros(batch.weights.shape)
        old[batch.mask] = token_logprobs(logprobs, there).cpu()
        return replace(batch, old_logprobs=old)

    # -- loss

    def loss(self, model: ArithmeticModel, batch: EpisodeBatch | Solutions) -> Tensor:
        """The summed loss of a micro-batch."""
        with evaluating(model):  # dropout would make ratio and KL compare two different policies
            if isinstance(batch, Solutions):
                return summed_cross_entropy(*counted_logits(model, batch.batch))
            logprobs = policy_logprobs(model, batch, self.config.temperature)
            reference = self.reference.logprobs(batch, self.config.temperature)
            terms = grpo_loss(logprobs, reference, batch, self.settings)
        self.monitor.note_loss(terms)
        return terms.loss

    # -- right solutions, instead of attempts or beside them

    def _solutions(self, expressions: Sequence[str]) -> list[Solutions]:
        """Micro-batches of right solutions of like length; those beyond the context are counted."""
        context = self.model.config.max_seq_length
        samples = tokenised_solutions(expressions, self.tokenizer, context)
        self.monitor.noted["solutions_dropped"] = len(samples.dropped)
        batches = [samples.batch(part) for part in self._parts(samples.lengths)]
        return [Solutions(batch, batch.loss_denominator) for batch in batches]

    def _replay(self, step: int, batches: list[EpisodeBatch]) -> list[Solutions]:
        """Right solutions of new prompts; they add ``sft_replay_coef`` times their mean loss."""
        if not self.config.sft_replay_coef:
            return []
        prompts = self.source.others(self.source.prompts_per_step, step, REPLAY, adaptive=False)
        policy_denominator = sum(batch.loss_denominator for batch in batches)
        return as_replay(self._solutions(prompts), self.config.sft_replay_coef, policy_denominator)

    # -- the rest of the loop's protocol, and the check of the first step

    def _check_start(self, groups: list[list[Rollout]]) -> None:
        """Say how well decoder, training forward and reference agree, or end the run."""
        batches = self._batches([as_episode(rollout, 0.0) for rollout in chain(*groups)])
        temperature = self.config.temperature
        found = check_start(self.model, self.reference, batches, temperature, self.precision)
        print(found, file=sys.stderr)

    def metrics(self) -> dict[str, float]:
        """The log line of the last step."""
        return self.monitor.metrics()

    def validate(self, model: ArithmeticModel) -> dict[str, float]:
        """Greedy on held-out prompts: reward, exact match, and exact match at each depth."""
        groups = self._roll_out(self.validation, 1, GREEDY)
        return validation_metrics([*chain(*groups)])

    def selection_loss(self, metrics: dict[str, float]) -> float:
        """The less, the higher the validation reward."""
        return -metrics["eval_reward"]

    def work(self, step: int) -> float:
        """Steps: how long a rollout will take is not known beforehand."""
        return step

    def state_dict(self) -> dict[str, Any]:
        """Pass rates and the number of steps without signal, for a checkpoint."""
        return {"pass_rates": dict(self.pass_rates.rates), "dead_steps": self.monitor.dead_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state again."""
        self.pass_rates.rates = dict(state.get("pass_rates", {}))
        self.monitor.dead_steps = state.get("dead_steps", 0)


def loss_settings(config: GRPOConfig) -> LossSettings:
    """The part of the config that the loss is made of."""
    return LossSettings(
        config.epsilon_low, config.epsilon_high, config.kl_penalty_coef, config.kl_estimator
    )


def as_episode(rollout: Rollout, advantage: float) -> Episode:
    """The part of a rollout that its loss needs."""
    written = rollout.completion
    return Episode(rollout.prompt, written.tokens, written.logprobs, advantage, written.support)
