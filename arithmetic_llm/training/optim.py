"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from arithmetic_llm.config import RunConfig


def learning_rate_factor(config: RunConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at ``step`` (0-based): linear warm-up, then the schedule."""
    warmup = min(config.warmup_steps, total_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    left = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.schedule]
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * left


def learning_rates(optimizer: MuonAdamW, scale: float) -> dict[str, float]:
    """The rates that a step at ``scale`` uses, under their names in the config."""
    names = {False: "learning_rate", True: "muon_learning_rate"}
    return {names[group["muon"]]: group["lr"] * scale for group in optimizer.param_groups}


def build_optimizer(
    model: nn.Module, config: RunConfig, precision: torch.dtype = torch.float32
) -> MuonAdamW:
    """The optimizer that ``config`` asks for, over the parameters that require a gradient.

    Weight decay applies to matrices only, never to norms. With ``muon`` the matrices inside the
    layers follow Muon; embedding, head and norms follow AdamW, as its authors advise.

    Args:
        precision: of Muon's matrix products.
    """
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    use_muon = config.optimizer == "muon"
    groups: dict[tuple[bool, float], list[Tensor]] = defaultdict(list)
    for name, parameter in trainable:
        by_muon = use_muon and parameter.ndim == 2 and ".layers." in name
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups[by_muon, decay].append(parameter)
    groups_of_settings = [
        {
            "params": parameters,
            "muon": by_muon,
            "lr": config.muon_learning_rate if by_muon else config.learning_rate,
            "weight_decay": decay,
            "betas": (0.9, config.adam_beta2),
        }
        for (by_muon, decay), parameters in groups.items()
    ]
    return MuonAdamW(groups_of_settings, precision)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the groups marked ``muon``, AdamW for the others.

    Muon takes the momentum of a weight matrix and replaces it by the nearest matrix with all
    singular values 1, so that rare directions learn as fast as common ones. ``scale`` in
    :meth:`step` is the schedule's factor on every group's peak rate ``lr``.

    Args:
        precision: of Muon's matrix products, see `orthogonalise`.
    """

    def __init__(self, groups: Iterable[dict], precision: torch.dtype = torch.float32):
        self.precision = precision
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "muon": False}
        super().__init__(groups, {**defaults, "betas": (0.9, 0.95), "momentum": 0.95})

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:  # type: ignore[override]
        """One update; ``scale`` multiplies each group's learning rate."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            update = self._muon if group["muon"] else self._adamw
            rate = group["lr"] * scale
            torch._foreach_mul_(parameters, 1.0 - rate * group["weight_decay"])
            update(parameters, rate, group)

    @staticmethod
    def _kept(group: dict) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["muon"] else ("exp_avg", "exp_avg_sq")

    def make_room(self) -> None:
        """Make room for what is remembered of each weight, where there is none yet."""
        for group in self.param_groups:
            for name in self._kept(group):
                self._buffers(group["params"], name)

    def count_from(self, updates: int) -> None:
        """Go on as after so many updates."""
        for group in self.param_groups:
            if not group["muon"]:
                self.state[group["params"][0]]["step"] = updates

    def _adamw(self, parameters: list[Tensor], rate: float, group: dict) -> None:
        """Loshchilov & Hutter, 2019; the decay is done in :meth:`step`."""
        beta1, beta2 = group["betas"]
        gradients = [p.grad for p in parameters]
        means, squares = (self._buffers(parameters, name) for name in self._kept(group))
        count = self._count(group["params"])
        torch._foreach_lerp_(means, gradients, 1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)
        scale = torch._foreach_sqrt(squares)
        torch._foreach_div_(scale, math.sqrt(1.0 - beta2**count))
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_addcdiv_(parameters, means, scale, -rate / (1.0 - beta1**count))

    def _muon(self, parameters: list[Tensor], rate: float, group: dict) -> None:
        """Nesterov momentum, then orthogonalisation of all matrices of one shape at once."""
        gradients = [p.grad for p in parameters]
        (momenta,) = (self._buffers(parameters, name) for name in self._kept(group))
        torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])
        # Nesterov: the gradient again, before the momentum that already holds it.
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, parameter in enumerate(parameters):
            by_shape[parameter.shape].append(index)
        for (rows, columns), indices in by_shape.items():
            # One product for all matrices of a shape: each alone is too small to fill a core.
            directions = orthogonalise(torch.stack([updates[i] for i in indices]), self.precision)
            # Tall matrices move further, so that a step changes outputs alike for every shape.
            step = -rate * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_([parameters[i] for i in indices], list(directions), alpha=step)

    def _buffers(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        for parameter in parameters:
            self.state[parameter].setdefault(name, torch.zeros_like(parameter))
        return [self.state[parameter][name] for parameter in parameters]

    def _count(self, parameters: list[Tensor]) -> int:
        """Updates so far, this one included; kept in the state so that it is saved with it."""
        state = self.state[parameters[0]]
        state["step"] = state.get("step", 0) + 1
        return state["step"]


def orthogonalise(
    matrices: Tensor, precision: torch.dtype = torch.float32, iterations: int = 5
) -> Tensor:
    """Nearly ``U V^T`` of each matrix's singular value decomposition, by Newton-Schulz iteration.

    The quintic's coefficients (Jordan et al., 2024) push every singular value into about
    [0.7, 1.2], which is close enough for an update and needs only matrix products.

    Args:
        matrices: (N, rows, columns).
        precision: of the products; bf16 makes differences of 1e-7 some of 1e-3.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(precision)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        # a x + (b gram + c gram^2) x, with the sums inside the products
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
