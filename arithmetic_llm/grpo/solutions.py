"""Right solutions to learn from: instead of attempts, or replayed beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from arithmetic_llm.corpus.record import solved
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.training.batches import Batch, LossWeights, TokenisedSamples


@dataclass(frozen=True)
class Solutions:
    """A micro-batch of right solutions; its loss is their cross-entropy after ``<think>``."""

    batch: Batch
    loss_denominator: float  # what it adds to the divisor of the summed loss; 0 beside rollouts

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.batch.tokens

    def to(self, device: torch.device) -> Solutions:
        return replace(self, batch=self.batch.to(device))


def tokenised_solutions(
    expressions: Sequence[str], tokenizer: ArithmeticTokenizer, context: int
) -> TokenisedSamples:
    """The right solution of each expression; ``dropped`` has those longer than the context."""
    records = [solved(expression) for expression in expressions]
    return TokenisedSamples(records, tokenizer, context, LossWeights(prompt=0.0, result=1.0))


def as_replay(
    solutions: list[Solutions], coefficient: float, policy_denominator: float
) -> list[Solutions]:
    """Weigh solutions so that they add ``coefficient`` times their mean loss to an update.

    The loop divides the sum of all losses once, by the sum of all counts. Beside a policy's loss
    the solutions are therefore weighed by its divisor and add nothing to it; in a step without
    signal they are all there is, and the divisor is their own.

    Args:
        policy_denominator: the divisor of the policy's loss; 0 in a step without signal.
    """
    if not solutions:
        return []
    own = sum(each.loss_denominator for each in solutions)
    scale = coefficient * (policy_denominator or own) / own
    return [
        Solutions(
            replace(each.batch, weights=each.batch.weights * scale),
            0.0 if policy_denominator else each.loss_denominator,
        )
        for each in solutions
    ]
