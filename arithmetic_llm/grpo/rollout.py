"""Where prompts come from, and what the policy makes of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from arithmetic_llm.config import GRPOConfig, SampleSpec
from arithmetic_llm.corpus.draw import draw_any
from arithmetic_llm.corpus.files import read_corpus
from arithmetic_llm.corpus.record import Record
from arithmetic_llm.evaluation.judge import Outcome, judge
from arithmetic_llm.evaluation.length import right_answers
from arithmetic_llm.grpo.rewards import Attempt, score
from arithmetic_llm.model.decode import Completion, Sampling, generate
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.task.expression import spell
from arithmetic_llm.task.problem import Row, problem_from


@dataclass(frozen=True)
class Rollout:
    """An outcome, the tokens that it was judged by, and what it is rewarded with."""

    outcome: Outcome
    prompt: list[int]
    completion: Completion
    reward: float
    parts: dict[str, float]  # each reward before its weight

    def as_dict(self) -> dict[str, Any]:
        """An entry of ``rollouts.jsonl``."""
        outcome = self.outcome
        return {
            "expression": outcome.expression,
            "depth": outcome.problem.depth,
            "text": outcome.text,
            "tokens": outcome.tokens,
            "finish_reason": self.completion.finish_reason,
            "correct": outcome.correct,
            "error": outcome.verdict.trace_error,
            "reward": self.reward,
            "rewards": self.parts,
        }


def row_name(row: Row) -> str:
    """``depth_3``, ``terms_7`` (a flat sum) or ``invalid``."""
    return row.kind if row.kind == "invalid" else f"{row.kind}_{row.number}"


def nested(config: GRPOConfig) -> SampleSpec:
    """How prompts are generated: trees of the depths asked for, with just their parentheses."""
    return SampleSpec(
        num_range=config.num_range,
        min_depth=config.min_depth,
        max_depth=config.max_depth,
        invalid_rate=0.0,
        typed_rate=0.0,
    )


class PassRates:
    """Running pass rate of each depth, and how often each should be asked."""

    MEMORY = 0.9  # weight of the past when a step's result comes in

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def update(self, rollouts: Sequence[Rollout]) -> None:
        by_depth = defaultdict(list)
        for rollout in rollouts:
            if (depth := rollout.outcome.problem.depth) is not None:
                by_depth[depth].append(float(rollout.outcome.correct))
        for depth, passed in by_depth.items():
            before = self.rates.get(depth, fmean(passed))
            self.rates[depth] = self.MEMORY * before + (1.0 - self.MEMORY) * fmean(passed)

    def weight(self, depth: int) -> float:
        """In proportion to p (1 - p), the variance of the reward; never quite 0, to find out."""
        rate = self.rates.get(depth, 0.5)
        return max(rate * (1.0 - rate), 0.01)


class PromptSource:
    """Training expressions, as a function of step and seed."""

    def __init__(self, config: GRPOConfig, pass_rates: PassRates):
        self.config, self.pass_rates = config, pass_rates
        self.corpus: list[Record] = []
        if config.data_mode == "instruction":
            self.corpus = [*read_corpus(config.instruction_corpus)]
        available = len(self.corpus) or config.num_samples
        self.prompts_per_epoch = min(config.num_samples, available)
        self.prompts_per_step = config.batch_size * config.gradient_accumulation_steps
        self.steps_per_epoch = -(-self.prompts_per_epoch // self.prompts_per_step)

    def of_step(self, step: int) -> list[str]:
        """The prompts of a step; a corpus is gone through in a new order each epoch.

        The last step of an epoch has what is left of it.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.prompts_per_step
        end = min(start + self.prompts_per_step, self.prompts_per_epoch)
        if not self.corpus:
            return self.others(end - start, step, 0)
        order = list(range(len(self.corpus)))
        random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
        return [self.corpus[i].expression for i in order[start:end]]

    def others(self, count: int, step: int, round_: int, adaptive: bool = True) -> list[str]:
        """Prompts at random, the same for the same step and round.

        Args:
            adaptive: choose depths by pass rate, if the config does at all.
        """
        rng = random.Random(f"{self.config.seed}/{step}/{round_}")
        if self.corpus:
            return [record.expression for record in rng.choices(self.corpus, k=count)]
        return [self._generated(rng, adaptive) for _ in range(count)]

    def _generated(self, rng: random.Random, adaptive: bool) -> str:
        config = self.config
        depths = range(config.min_depth, config.max_depth + 1)
        if config.adaptive_difficulty and adaptive:
            (depth,) = rng.choices(depths, [self.pass_rates.weight(depth) for depth in depths])
        else:
            depth = rng.choice(depths)
        spec = SampleSpec(num_range=config.num_range, min_depth=depth, max_depth=depth)
        return spell(draw_any(spec, "nested", "train", rng))


def roll_out(
    model: ArithmeticModel,
    tokenizer: ArithmeticTokenizer,
    expressions: Sequence[str],
    copies: int,
    sampling: Sampling,
    config: GRPOConfig,
    weights: dict[str, float],
) -> list[list[Rollout]]:
    """``copies`` completions of each expression, in one batch; a group for each expression.

    As in an evaluation, right answers are guesses: they save passes and change no text.
    """
    asked = [problem_from(expression) for expression in expressions for _ in range(copies)]
    prompts = [tokenizer.prompt_ids(problem.expression) for problem in asked]
    guesses = right_answers(asked, tokenizer)
    limit, context = config.max_gen_length, model.config.max_seq_length
    size = config.rollout_batch_size
    written = generate(model, prompts, limit, sampling, size, guesses=guesses)
    rollouts = []
    for problem, prompt, completion in zip(asked, prompts, written, strict=True):
        outcome = judge(problem, completion, len(prompt), tokenizer, context)
        rollouts.append(rewarded(outcome, prompt, completion, config, weights))
    return [rollouts[start : start + copies] for start in range(0, len(rollouts), copies)]


def rewarded(
    outcome: Outcome,
    prompt: list[int],
    completion: Completion,
    config: GRPOConfig,
    weights: dict[str, float],
) -> Rollout:
    """The rollout of a completion that has been judged, with its reward."""
    attempt = Attempt(outcome.verdict, outcome.tokens, config.max_gen_length, outcome.cut_off)
    reward, parts = score(attempt, weights)
    if outcome.cut_off and config.cutoff == "penalise":
        reward = -1.0
    return Rollout(outcome, prompt, completion, reward, parts)
