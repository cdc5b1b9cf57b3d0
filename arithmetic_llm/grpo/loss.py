"""Group relative policy optimization (Shao et al., 2024): advantages and loss, as pure functions.

Shape letters: B completions, T positions, V vocabulary, G groups, N completions a group, M tokens
of completions. The tensors of a batch are aligned like next-token prediction: what stands at
position t belongs to ``targets[:, t]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.model.tokenizer import PAD
from arithmetic_llm.model.transformer import ArithmeticModel


def group_advantages(rewards: Tensor, scale: str = "none", baseline: str = "group") -> Tensor:
    """How much better each completion is than its group.

    ``reward - group mean``; divided by the standard deviation (n - 1 in the denominator) of its
    group or of the batch if ``scale`` says so. With ``baseline="none"`` the reward itself, which
    for a reward of 0 or 1 is rejection-sampling fine-tuning.

    Args:
        rewards: (G, N).

    Returns:
        (G, N); zero in a group whose rewards are all alike, unless there is no baseline.
    """
    if baseline == "none":
        return rewards
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        return advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    if scale == "batch":
        return advantages / (rewards.std() + 1e-4)
    return advantages


@dataclass(frozen=True)
class Episode:
    """One completion with everything that its loss needs."""

    prompt: list[int]
    completion: list[int]  # tokens written, <eos> included
    rollout_logprobs: list[float]  # what the decoder sampled with
    advantage: float
    support: list[Tensor]  # (V,) bool for each token, if sampling was truncated


@dataclass(frozen=True)
class EpisodeBatch:
    """Right-padded episodes. What is beyond a completion's end has weight 0, by its length."""

    input_ids: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    weights: Tensor  # (B, T): 0 outside the completion; inside, the token's share in the sum
    advantages: Tensor  # (B,)
    rollout_logprobs: Tensor  # (B, T)
    support: Tensor | None  # (B, T, V) bool
    count: float  # what the sum over all micro-batches is divided by: this batch's part of it
    old_logprobs: Tensor | None = None  # (B, T) before the first of several updates

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.input_ids.numel()

    @property
    def mask(self) -> Tensor:
        """(B, T) bool: the tokens of the completions, each ``<eos>`` included."""
        return self.weights > 0

    def to(self, device: torch.device) -> EpisodeBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {n: t.to(device) for n, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **moved)


def collate(episodes: Sequence[Episode], config: GRPOConfig) -> EpisodeBatch:
    """Pad episodes to one batch and weigh their tokens as ``config.loss_type`` says."""
    width = max(len(e.prompt) + len(e.completion) for e in episodes) - 1
    ids = torch.full((len(episodes), width + 1), PAD)
    weights = torch.zeros(len(episodes), width)
    logprobs = torch.zeros(len(episodes), width)
    for row, episode in enumerate(episodes):
        start = len(episode.prompt) - 1  # the target at this position is the first token written
        end = start + len(episode.completion)
        ids[row, : end + 1] = torch.tensor([*episode.prompt, *episode.completion])
        weights[row, start:end] = token_weight(config.loss_type, len(episode.completion))
        logprobs[row, start:end] = torch.tensor(episode.rollout_logprobs)
    return EpisodeBatch(
        input_ids=ids[:, :-1],
        targets=ids[:, 1:],
        weights=weights,
        advantages=torch.tensor([e.advantage for e in episodes]),
        rollout_logprobs=logprobs,
        support=_support(episodes, width),
        count=sum(_count(config, len(e.completion)) for e in episodes),
    )


def token_weight(loss_type: str, length: int) -> float:
    """What one token of a completion of this length counts in the summed loss."""
    return 1.0 / length if loss_type == "grpo" else 1.0


def _count(config: GRPOConfig, length: int) -> float:
    """What one completion adds to the number that the summed loss is divided by."""
    return {"dapo": length, "grpo": 1, "dr_grpo": config.max_gen_length}[config.loss_type]


def _support(episodes: Sequence[Episode], width: int) -> Tensor | None:
    if not episodes[0].support:
        return None
    vocabulary = len(episodes[0].support[0])
    support = torch.ones(len(episodes), width, vocabulary, dtype=torch.bool)
    for row, episode in enumerate(episodes):
        start = len(episode.prompt) - 1
        support[row, start : start + len(episode.completion)] = torch.stack(episode.support)
    return support


def policy_distribution(model: ArithmeticModel, batch: EpisodeBatch, temperature: float) -> Tensor:
    """Log-probabilities (M, V) at the M completion tokens, of what the rollout sampled from.

    The same temperature as in the rollout, and where that was truncated, the same support.
    """
    hidden = model.hidden_states(batch.input_ids)[batch.mask]
    logits = model.lm_head(hidden).float() / temperature
    if batch.support is not None:
        logits = logits.masked_fill(~batch.support[batch.mask], -torch.inf)
    return logits.log_softmax(dim=-1)


def chosen(distribution: Tensor, batch: EpisodeBatch) -> Tensor:
    """Log-probabilities (M,) of the tokens that were written."""
    return distribution.gather(-1, batch.targets[batch.mask][:, None])[:, 0]


def clipped_objective(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic bound (Schulman et al., 2017), per token; all arguments broadcast.

    The smaller of ``ratio * advantage`` and its clipped twin, for either sign of the advantage.

    Returns:
        The objective (to be maximised), and where clipping was active.
    """
    ratio = (logprobs - old_logprobs).exp()
    free = ratio * advantages
    clipped = ratio.clamp(1.0 - low, 1.0 + high) * advantages
    return torch.minimum(free, clipped), clipped < free


def kl_divergence(
    distribution: Tensor,
    reference: Tensor,
    tokens: Tensor,
    ratio: Tensor | None,
    estimator: str,
) -> Tensor:
    """KL from the policy to the reference at each token, in nats (Schulman, 2020).

    ``k3`` is ``r - 1 - log r`` with ``r`` = reference / policy at the sampled token: never below 0,
    unbiased, of low variance. Times the importance ratio its gradient is unbiased too;
    ``k3_plain`` leaves that out. ``exact`` sums over the vocabulary.

    Args:
        distribution, reference: (M, V) log-probabilities.
        tokens: (M,) the sampled tokens.
        ratio: (M,) policy / old policy at the sampled token, with its gradient; ``k3`` alone uses
            it.
    """
    if estimator == "exact":
        inside = distribution > -torch.inf  # 0 * log 0 = 0 outside the support
        gap = torch.where(inside, distribution - reference, 0.0)
        return (distribution.exp() * gap).sum(dim=-1)
    gap = (reference - distribution).gather(-1, tokens[:, None])[:, 0]
    k3 = gap.exp() - gap - 1.0
    return k3 * ratio if estimator == "k3" else k3


@dataclass(frozen=True)
class LossTerms:
    """The loss of a micro-batch, summed, and what there is to know about it, summed over tokens."""

    loss: Tensor
    kl: float
    entropy: float
    clipped: float
    tokens: int


def grpo_loss(
    distribution: Tensor, reference: Tensor | None, batch: EpisodeBatch, config: GRPOConfig
) -> LossTerms:
    """Sum over tokens of weight x (KL coefficient x KL - clipped objective).

    Args:
        distribution: (M, V) of the policy, with its gradient; see `policy_distribution`.
        reference: (M, V) of the frozen start; None if the KL coefficient is 0.
    """
    mask, tokens = batch.mask, batch.targets[batch.mask]
    logprobs = chosen(distribution, batch)
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs[mask]
    advantages = batch.advantages[:, None].expand(mask.shape)[mask]
    objective, clipped = clipped_objective(
        logprobs, old, advantages, config.epsilon_low, config.epsilon_high
    )
    kl = torch.zeros_like(logprobs)
    if reference is not None:
        ratio = (logprobs - old).exp()
        kl = kl_divergence(distribution, reference, tokens, ratio, config.kl_estimator)
    loss = (batch.weights[mask] * (config.kl_penalty_coef * kl - objective)).sum()
    return LossTerms(
        loss,
        float(kl.detach().sum()),
        float(entropy(distribution.detach()).sum()),
        float(clipped.sum()),
        len(tokens),
    )


def entropy(distribution: Tensor) -> Tensor:
    """Of each row of log-probabilities, in nats."""
    return -torch.where(distribution > -torch.inf, distribution.exp() * distribution, 0.0).sum(-1)
