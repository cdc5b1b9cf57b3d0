"""Where prompts come from, and what the policy makes of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.corpus import read_corpus
from arithmetic_llm.drawing import draw_any
from arithmetic_llm.expression import ExpressionError, parse, spell
from arithmetic_llm.generate import Completion, Sampling, generate
from arithmetic_llm.model import ArithmeticModel
from arithmetic_llm.rewards import Attempt, score
from arithmetic_llm.sampling import SampleSpec
from arithmetic_llm.tokenizer import ArithmeticTokenizer
from arithmetic_llm.verifier import Verdict, verify

INVALID = 0  # the "depth" under which invalid expressions are counted


@dataclass(frozen=True)
class Rollout:
    """A completion and its worth."""

    expression: str
    depth: int
    prompt: list[int]
    completion: Completion
    text: str
    verdict: Verdict
    reward: float
    parts: dict[str, float]  # each reward before its weight

    @property
    def cut_off(self) -> bool:
        return self.completion.finish_reason == "length"

    def as_dict(self) -> dict[str, Any]:
        """What a person wants to read of it."""
        return {
            "expression": self.expression,
            "depth": self.depth,
            "text": self.text,
            "tokens": len(self.completion.tokens),
            "finish_reason": self.completion.finish_reason,
            "correct": self.verdict.correct,
            "error": self.verdict.trace_error,
            "reward": self.reward,
            "rewards": self.parts,
        }


def depth_of(expression: str) -> int:
    """Exact depth; `INVALID` for an invalid expression."""
    try:
        return parse(expression).depth
    except ExpressionError:
        return INVALID


class PassRates:
    """Running pass rate of each depth, and how often each should be asked."""

    MEMORY = 0.9  # weight of the past when a step's result comes in

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def update(self, rollouts: Sequence[Rollout]) -> None:
        by_depth = defaultdict(list)
        for rollout in rollouts:
            by_depth[rollout.depth].append(float(rollout.verdict.correct))
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
        self.corpus: list[str] = []
        if config.data_mode == "instruction":
            self.corpus = [record.expression for record in read_corpus(config.instruction_corpus)]

    @property
    def prompts_per_epoch(self) -> int:
        wanted = self.config.num_samples
        return min(wanted, len(self.corpus)) if self.corpus else wanted

    def draw(self, count: int, step: int, round_: int = 0) -> list[str]:
        """Expressions of the train split; a corpus is gone through in a new order each epoch."""
        if not self.corpus:
            rng = random.Random(f"{self.config.seed}/{step}/{round_}")
            return [self._generated(rng) for _ in range(count)]
        if round_:  # a refill: any others
            return random.Random(f"{self.config.seed}/{step}/{round_}").choices(
                self.corpus, k=count
            )
        start = step * self.config.batch_size * self.config.gradient_accumulation_steps
        epoch, place = divmod(start, self.prompts_per_epoch)
        order = list(range(len(self.corpus)))
        random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
        return [self.corpus[i] for i in order[: self.prompts_per_epoch][place : place + count]]

    def _generated(self, rng: random.Random) -> str:
        config = self.config
        depths = range(config.min_depth, config.max_depth + 1)
        if config.adaptive_difficulty:
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
    """``copies`` completions of each expression, in one batch; a group for each expression."""
    prompts = [tokenizer.prompt_ids(expression) for expression in expressions]
    completions = generate(
        model,
        [prompt for prompt in prompts for _ in range(copies)],
        config.max_gen_length,
        sampling,
        config.rollout_batch_size,
    )
    return [
        [
            judge(tokenizer, expression, prompt, completion, config, weights)
            for completion in completions[group * copies : (group + 1) * copies]
        ]
        for group, (expression, prompt) in enumerate(zip(expressions, prompts, strict=True))
    ]


def judge(
    tokenizer: ArithmeticTokenizer,
    expression: str,
    prompt: list[int],
    completion: Completion,
    config: GRPOConfig,
    weights: dict[str, float],
) -> Rollout:
    """Verify a completion and reward it."""
    text = tokenizer.decode(completion.tokens, skip_special=True)
    cut_off = completion.finish_reason == "length"
    verdict = verify(expression, text, cut_off)
    attempt = Attempt(verdict, len(completion.tokens), config.max_gen_length, cut_off)
    reward, parts = score(attempt, weights)
    if cut_off and config.cutoff == "penalise":
        reward = -1.0
    return Rollout(
        expression, depth_of(expression), prompt, completion, text, verdict, reward, parts
    )
