"""The reference model: the frozen start, which the KL penalty holds the policy near to."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from arithmetic_llm.grpo.loss import EpisodeBatch
from arithmetic_llm.grpo.policy import policy_logprobs
from arithmetic_llm.model.lora import disable_adapter, lora_layers
from arithmetic_llm.model.transformer import ArithmeticModel


class Reference:
    """The frozen start of the policy: a copy, or the policy itself with its adapter disabled."""

    def __init__(self, policy: ArithmeticModel, needed: bool):
        self.needed, self.adapted = needed, bool(lora_layers(policy))
        self.model = policy
        if needed and not self.adapted:
            self.model = copy.deepcopy(policy).requires_grad_(False).eval()

    @torch.no_grad()
    def logprobs(self, batch: EpisodeBatch, temperature: float) -> Tensor | None:
        """Log-probabilities (M, V) like the policy's; None if the KL counts nothing.

        With an adapter the model is the policy: the caller turns its dropout off.
        """
        if not self.needed:
            return None
        with disable_adapter(self.model):
            return policy_logprobs(self.model, batch, temperature)
