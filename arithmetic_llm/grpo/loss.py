"""Group relative policy optimization (Shao et al., 2024): advantages and loss, as pure functions.

In the order of a step: rewards become advantages, completions with their advantages become a
batch, and the policy's log-probabilities on that batch become the loss.

Shape letters: B completions, T positions, V vocabulary, G groups, N completions a group, M tokens
of completions. The tensors of a batch are aligned like next-token prediction: what stands at
position t belongs to ``targets[:, t]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from arithmetic_llm.model.tokenizer import PAD
from arithmetic_llm.runtime import moved


def group_advantages(rewards: Tensor, scale: str = "none", baseline: str = "group") -> Tensor:
    """Measure how much better each completion is than its group.

    ``reward - group mean``; divided by the standard deviation (n - 1 in the denominator) of its
    group or of the batch if ``scale`` says so. With ``baseline="none"`` the reward itself, which
    for a reward of 0 or 1 is rejection-sampling fine-tuning.

    Two groups of four completions, one right answer in the first and none in the second::

        rewards         1      0      0      0       0  0  0  0
        scale="none"    0.75  -0.25  -0.25  -0.25    0  0  0  0
        scale="group"   1.5   -0.5   -0.5   -0.5     0  0  0  0     standard deviation 0.5
        scale="batch"   2.12  -0.71  -0.71  -0.71    0  0  0  0     that of all eight, 0.35
        baseline="none" 1      0      0      0       0  0  0  0

    Args:
        rewards: (G, N).
        scale: ``none``, ``group`` or ``batch``.
        baseline: ``group`` or ``none``.

    Returns:
        (G, N); zero in a group whose rewards are all alike, unless there is no baseline.
    """
    if baseline == "none":
        return rewards
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":  # a rare success weighs more: the learning rate must follow
        return advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    if scale == "batch":
        return advantages / (rewards.std() + 1e-4)
    return advantages


@dataclass(frozen=True)
class Episode:
    """Completion with everything that its loss needs."""

    prompt: list[int]
    completion: list[int]  # tokens written, <eos> included
    rollout_logprobs: list[float]  # what the decoder sampled with
    advantage: float
    support: list[Tensor]  # (V,) bool for each token, if sampling was truncated


@dataclass(frozen=True)
class EpisodeBatch:
    """Right-padded episodes; see `collate` for an example."""

    input_ids: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    weights: Tensor  # (B, T): 0 outside the completion; inside, the token's share in the sum
    advantages: Tensor  # (B,)
    rollout_logprobs: Tensor  # (B, T)
    support: Tensor | None  # (B, T, V) bool
    loss_denominator: (
        float  # this batch's part of what the sum over all micro-batches is divided by
    )
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
        there = {n: moved(t, device) for n, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **there)


def collate(episodes: Sequence[Episode], loss_type: str, length_limit: int) -> EpisodeBatch:
    """Pad episodes to one batch and weigh their tokens as ``loss_type`` says.

    Prompt ``a b`` with completion ``c d``, and prompt ``f`` with completion ``g``; ``.`` pads::

        input_ids         a  b  c     f  g  .
        targets           b  c  d     g  .  .
        weights, dapo     0  1  1     1  0  0     count 3, the tokens written
        weights, grpo     0 .5 .5     1  0  0     count 2, the completions
        weights, dr_grpo  0  1  1     1  0  0     count 2 x length_limit

    Args:
        loss_type: ``dapo``, ``grpo`` or ``dr_grpo``.
        length_limit: most tokens of a completion; ``dr_grpo`` alone uses it.
    """
    width = max(len(e.prompt) + len(e.completion) for e in episodes) - 1
    ids = torch.full((len(episodes), width + 1), PAD)
    weights = torch.zeros(len(episodes), width)
    logprobs = torch.zeros(len(episodes), width)
    for row, episode in enumerate(episodes):
        start = len(episode.prompt) - 1  # the target at this position is the first token written
        end = start + len(episode.completion)
        ids[row, : end + 1] = torch.tensor([*episode.prompt, *episode.completion])
        # By length and not by token id: the last <eos> counts, or stopping is never reinforced.
        weights[row, start:end] = token_weight(loss_type, len(episode.completion))
        logprobs[row, start:end] = torch.tensor(episode.rollout_logprobs)
    return EpisodeBatch(
        input_ids=ids[:, :-1],
        targets=ids[:, 1:],
        weights=weights,
        advantages=torch.tensor([e.advantage for e in episodes]),
        rollout_logprobs=logprobs,
        support=_support(episodes, width),
        loss_denominator=sum(
            _denominator(loss_type, len(e.completion), length_limit) for e in episodes
        ),
    )


def token_weight(loss_type: str, length: int) -> float:
    """Weight in the summed loss of one token of a completion of this length."""
    return 1.0 / length if loss_type == "grpo" else 1.0


def _denominator(loss_type: str, length: int, length_limit: int) -> float:
    """Part of a completion of this length in the number that the summed loss is divided by."""
    return {"dapo": length, "grpo": 1, "dr_grpo": length_limit}[loss_type]


def _support(episodes: Sequence[Episode], width: int) -> Tensor | None:
    """(B, T, V) bool, True outside the completions; None if nothing was truncated."""
    if not episodes[0].support:
        return None
    vocabulary = len(episodes[0].support[0])
    support = torch.ones(len(episodes), width, vocabulary, dtype=torch.bool)
    for row, episode in enumerate(episodes):
        start = len(episode.prompt) - 1
        support[row, start : start + len(episode.completion)] = torch.stack(episode.support)
    return support


def token_logprobs(logprobs: Tensor, batch: EpisodeBatch) -> Tensor:
    """Log-probabilities (M,) of the tokens that were written, out of (M, V)."""
    return logprobs.gather(-1, batch.targets[batch.mask][:, None])[:, 0]


def clipped_objective(
    new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic bound (Schulman et al., 2017), per token; all arguments broadcast.

    The smaller of ``ratio * advantage`` and its clipped twin, for either sign of the advantage.

    Returns:
        The objective (to be maximised), and where clipping was active.
    """
    ratio = (new_logprobs - old_logprobs).exp()
    free = ratio * advantages
    clipped = ratio.clamp(1.0 - low, 1.0 + high) * advantages
    return torch.minimum(free, clipped), clipped < free


def kl_divergence(
    logprobs: Tensor,
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
        logprobs, reference: (M, V) log-probabilities of policy and reference.
        tokens: (M,) the sampled tokens.
        ratio: (M,) policy / old policy at the sampled token, with its gradient; ``k3`` alone uses
            it.
    """
    if estimator == "exact":
        inside = logprobs > -torch.inf  # 0 * log 0 = 0 outside the support
        gap = torch.where(inside, logprobs - reference, 0.0)
        return (logprobs.exp() * gap).sum(dim=-1)
    gap = (reference - logprobs).gather(-1, tokens[:, None])[:, 0]
    k3 = gap.exp() - gap - 1.0
    return k3 * ratio if estimator == "k3" else k3


@dataclass(frozen=True)
class LossSettings:
    """The numbers of the loss."""

    epsilon_low: float  # the ratio is clipped to 1 - epsilon_low ...
    epsilon_high: float  # ... and 1 + epsilon_high
    kl_coef: float  # weight of the KL to the reference
    kl_estimator: str  # see `kl_divergence`


@dataclass(frozen=True)
class LossTerms:
    """The summed loss of a micro-batch, and what it is made of, summed over tokens."""

    loss: Tensor
    kl: float
    entropy: float
    clipped: float  # number of tokens where clipping was active
    tokens: int


def grpo_loss(
    logprobs: Tensor, reference: Tensor | None, batch: EpisodeBatch, settings: LossSettings
) -> LossTerms:
    """Sum over tokens of weight x (KL coefficient x KL - clipped objective).

    Args:
        logprobs: (M, V) of the policy, with their gradient; see `policy.policy_logprobs`.
        reference: (M, V) of the frozen start; None if the KL coefficient is 0.
    """
    mask, tokens = batch.mask, batch.targets[batch.mask]
    new = token_logprobs(logprobs, batch)
    # At a single update the policy is the old one: a ratio of 1 that still has a gradient.
    old = new.detach() if batch.old_logprobs is None else batch.old_logprobs[mask]
    advantages = batch.advantages[:, None].expand(mask.shape)[mask]
    objective, clipped = clipped_objective(
        new, old, advantages, settings.epsilon_low, settings.epsilon_high
    )
    kl = torch.zeros_like(new)
    if reference is not None:
        ratio = (new - old).exp()
        kl = kl_divergence(logprobs, reference, tokens, ratio, settings.kl_estimator)
    loss = (batch.weights[mask] * (settings.kl_coef * kl - objective)).sum()
    return LossTerms(
        loss,
        float(kl.detach().sum()),
        float(entropy(logprobs.detach()).sum()),
        float(clipped.sum()),
        len(tokens),
    )


def entropy(logprobs: Tensor) -> Tensor:
    """Entropy (M,) of each row of log-probabilities (M, V), in nats."""
    return -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(-1)
