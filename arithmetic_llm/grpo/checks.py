"""The check of the start: what must agree at step 0, before anything has moved."""

from __future__ import annotations

import torch
from torch import Tensor

from arithmetic_llm.grpo.loss import EpisodeBatch, kl_divergence, token_logprobs
from arithmetic_llm.grpo.policy import as_in_training, policy_logprobs
from arithmetic_llm.grpo.reference import Reference
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError

# How much the log-probs that the decoder sampled with may differ from those of the training
# forward, in nats a token: on average, and at most. In fp32 the two add in another order, that is
# all; bf16 rounds every product, which moves single unlikely tokens by almost 1.
TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (1e-2, 2.0)}
LARGEST_START_KL = 1e-6  # nats a token: the policy is its reference, so what is there is rounding


def check_start(
    policy: ArithmeticModel,
    reference: Reference,
    batches: list[EpisodeBatch],
    temperature: float,
    precision: torch.dtype,
) -> str:
    """Check that decoder and training forward agree, and that the policy is its own reference.

    Returns:
        A line that says how far they are apart.

    Raises:
        UserError: too far; every later figure would be wrong.
    """
    with as_in_training(policy, precision):
        gaps = torch.cat([decoder_gaps(policy, batch, temperature) for batch in batches])
        kl = max(largest_kl(policy, reference, batch, temperature) for batch in batches)
    mean, largest = float(gaps.mean()), float(gaps.max())
    mean_allowed, allowed = TOLERANCE[precision]
    found = (
        f"step 0: decoder and training log-probs differ by {mean:.1e} nats a token on average "
        f"(tolerance {mean_allowed:g}), at most {largest:.1e} (tolerance {allowed:g})"
        + (f", KL to the reference {kl:.1g}" if reference.needed else "")
    )
    if not (mean <= mean_allowed and largest <= allowed and kl <= LARGEST_START_KL):
        raise UserError(f"{found}; this must not be: try --precision fp32 or --device cpu")
    return found


def decoder_gaps(policy: ArithmeticModel, batch: EpisodeBatch, temperature: float) -> Tensor:
    """Distances (M,) between what the decoder sampled with and the training forward, in nats."""
    batch = batch.to(policy.device)
    logprobs = token_logprobs(policy_logprobs(policy, batch, temperature), batch)
    return (logprobs - batch.rollout_logprobs[batch.mask]).abs().cpu()


def largest_kl(
    policy: ArithmeticModel, reference: Reference, batch: EpisodeBatch, temperature: float
) -> float:
    """Largest KL to the reference of any token, in nats; 0 if there is no reference."""
    if not reference.needed:
        return 0.0
    batch = batch.to(policy.device)
    ours = policy_logprobs(policy, batch, temperature)
    theirs = reference.logprobs(batch, temperature)
    tokens = batch.targets[batch.mask]
    return float(kl_divergence(ours, theirs, tokens, None, "exact").abs().max())
