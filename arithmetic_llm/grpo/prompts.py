"""Sources of prompts: a corpus, or problems generated at the depths that teach most."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean

from arithmetic_llm.config import GRPOConfig, SampleSpec
from arithmetic_llm.corpus.draw import draw_any
from arithmetic_llm.corpus.files import read_problems
from arithmetic_llm.corpus.record import Record
from arithmetic_llm.evaluation.judge import Outcome
from arithmetic_llm.evaluation.length import check_sizes
from arithmetic_llm.task.expression import spell
from arithmetic_llm.task.problem import problem_from


def nested(config: GRPOConfig) -> SampleSpec:
    """Settings of the sampler: trees of the depths asked for, with just their parentheses."""
    return SampleSpec(
        num_range=config.num_range,
        min_depth=config.min_depth,
        max_depth=config.max_depth,
        invalid_rate=0.0,
        typed_rate=0.0,
    )


class PassRates:
    """Running pass rate of each depth, which says how often to ask it.

    A depth at 0.5 that has passed all of a step is at 0.9 x 0.5 + 0.1 x 1 = 0.55 after it.
    """

    MEMORY = 0.9  # weight of the past when a step's result comes in

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def update(self, outcomes: Iterable[Outcome]) -> None:
        """Take in the outcomes of a step; problems without a depth have no rate."""
        by_depth = defaultdict(list)
        for outcome in outcomes:
            if (depth := outcome.problem.depth) is not None:
                by_depth[depth].append(float(outcome.correct))
        for depth, passed in by_depth.items():
            before = self.rates.get(depth, fmean(passed))
            self.rates[depth] = self.MEMORY * before + (1.0 - self.MEMORY) * fmean(passed)

    def weight(self, depth: int) -> float:
        """Weight in the draw: p (1 - p), the variance of the reward; never quite 0, to find out."""
        rate = self.rates.get(depth, 0.5)
        return max(rate * (1.0 - rate), 0.01)


class PromptSource:
    """Training expressions, as a function of step and seed."""

    def __init__(self, config: GRPOConfig, pass_rates: PassRates):
        self.config, self.pass_rates = config, pass_rates
        self.corpus: list[Record] = []
        if config.data_mode == "instruction":
            self.corpus = read_problems(config.instruction_corpus)
            asked = (problem_from(record.expression) for record in self.corpus)
            check_sizes(asked, config.instruction_corpus)
        available = len(self.corpus) or config.num_samples
        self.prompts_per_epoch = min(config.num_samples, available)
        self.prompts_per_step = config.batch_size * config.gradient_accumulation_steps
        self.steps_per_epoch = -(-self.prompts_per_epoch // self.prompts_per_step)
        self.total_steps = config.max_steps or config.num_epochs * self.steps_per_epoch

    @property
    def total_prompts(self) -> int:
        """Prompts of all steps, one that is asked again counted again."""
        epochs, steps = divmod(self.total_steps, self.steps_per_epoch)
        return epochs * self.prompts_per_epoch + steps * self.prompts_per_step

    def of_step(self, step: int) -> list[str]:
        """The prompts of a step; each epoch goes through a corpus in a new order.

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
        """A problem of the train split, of a depth drawn evenly or by pass rate."""
        config = self.config
        depths = range(config.min_depth, config.max_depth + 1)
        if config.adaptive_difficulty and adaptive:
            (depth,) = rng.choices(depths, [self.pass_rates.weight(depth) for depth in depths])
        else:
            depth = rng.choice(depths)
        spec = SampleSpec(num_range=config.num_range, min_depth=depth, max_depth=depth)
        return spell(draw_any(spec, "nested", "train", rng))
