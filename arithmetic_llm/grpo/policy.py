"""Log-probabilities of completions under a policy, the same way wherever they are needed.

Shape letters as in `loss`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from arithmetic_llm.grpo.loss import EpisodeBatch
from arithmetic_llm.model.decode import evaluating
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import autocast


def policy_logprobs(model: ArithmeticModel, batch: EpisodeBatch, temperature: float) -> Tensor:
    """Log-probabilities (M, V) at the M completion tokens, of what the rollout sampled from.

    The same temperature as in the rollout, and where that was truncated, the same support.
    """
    hidden = model.hidden_states(batch.input_ids)[batch.mask]
    logits = model.lm_head(hidden).float() / temperature
    # Scored under the full softmax, truncated samples would be off by 0.25 nats a token.
    if batch.support is not None:
        logits = logits.masked_fill(~batch.support[batch.mask], -torch.inf)
    return logits.log_softmax(dim=-1)


@contextlib.contextmanager
def as_in_training(model: ArithmeticModel, precision: torch.dtype) -> Iterator[None]:
    """The forward that trains, in its precision and without dropout, but with no gradient."""
    with torch.no_grad(), evaluating(model), autocast(model.device, precision):
        yield
