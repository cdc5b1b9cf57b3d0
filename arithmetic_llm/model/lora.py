"""Low-rank adapters (Hu et al., 2021): train a thin correction and leave the weights alone.

    y = W x + scale * B A dropout(x)        A (rank, in), B (out, rank), scale = alpha / rank

``B`` starts at zero, so a fresh adapter changes nothing, exactly.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from arithmetic_llm.config import LoRAConfig
from arithmetic_llm.model.transformer import ArithmeticModel, Linear
from arithmetic_llm.runtime import UserError

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "feedforward": ("gate_proj", "up_proj", "down_proj"),
}
CANDIDATES = tuple(name for group in GROUPS.values() for name in group)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank correction beside it."""

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.base_layer = base
        self.lora_A = Linear(base.in_features, config.lora_rank, bias=False)
        self.lora_B = Linear(config.lora_rank, base.out_features, bias=False)
        self.dropout = nn.Dropout(config.lora_dropout)
        self.scale = config.scale
        self.enabled = True
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not self.enabled:
            return y
        return y + self.lora_B(self.lora_A(self.dropout(x))) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with ``W + scale * B A``, multiplied in fp32."""
        base = self.base_layer
        layer = Linear(base.in_features, base.out_features, bias=False, device="meta")
        delta = self.lora_B.weight.float() @ self.lora_A.weight.float()
        weight = base.weight.float() + self.scale * delta
        if not weight.isfinite().all():
            raise UserError("the merged weights are not finite; train with a lower --lora-alpha")
        layer.weight = nn.Parameter(weight)
        return layer


def target_names(spec: str) -> tuple[str, ...]:
    """Module names of a comma-separated list of groups and single names.

    Raises:
        UserError: a word that is neither, or none at all.
    """
    names: dict[str, None] = {}
    for word in filter(None, (part.strip() for part in spec.split(","))):
        if word not in GROUPS and word not in CANDIDATES:
            known = [*GROUPS, *CANDIDATES]
            close = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise UserError(f"--lora-target-modules: no module matched {word!r}; {hint}")
        names.update(dict.fromkeys(GROUPS.get(word, (word,))))
    if not names:
        raise UserError(f"--lora-target-modules is empty; choose from {', '.join(GROUPS)}")
    return tuple(names)


def add_lora(model: ArithmeticModel, config: LoRAConfig) -> ArithmeticModel:
    """Freeze the model and wrap the targets of every layer, in place; returns the model.

    Embedding and head are never targets: they may be one tied matrix.
    """
    model.requires_grad_(False)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in target_names(config.lora_target_modules):
                if isinstance(linear := getattr(parent, name, None), nn.Linear):
                    setattr(parent, name, LoRALinear(linear, config))
    return model


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """The wrapped layers with their paths; empty for a model without adapter."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)]


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Make the model compute what its frozen base does, inside the block."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def lora_config(config: LoRAConfig) -> LoRAConfig:
    """LoRA settings alone, of a config that may have more."""
    names = [field.name for field in dataclasses.fields(LoRAConfig)]
    return LoRAConfig(**{name: getattr(config, name) for name in names})


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the adapter alone, ``<path>.lora_A.weight`` and ``<path>.lora_B.weight``."""
    return {
        f"{path}.{part}.weight": getattr(layer, part).weight.detach()
        for path, layer in lora_layers(model)
        for part in ("lora_A", "lora_B")
    }


def merge_adapter(model: ArithmeticModel) -> ArithmeticModel:
    """A plain copy of the model with every adapter merged; the model itself is untouched."""
    return _plain_copy(model, LoRALinear.merged)


def without_adapter(model: ArithmeticModel) -> ArithmeticModel:
    """A plain copy of the model as it was before it had an adapter, bit for bit."""
    return _plain_copy(model, lambda layer: layer.base_layer)


def _plain_copy(
    model: ArithmeticModel, plain: Callable[[LoRALinear], nn.Linear]
) -> ArithmeticModel:
    copied = copy.deepcopy(model)
    for path, layer in lora_layers(copied):
        parent, _, name = path.rpartition(".")
        setattr(copied.get_submodule(parent), name, plain(layer))
    return copied.requires_grad_(True)


def parameter_summary(model: ArithmeticModel) -> str:
    """Count of the parameters, ``861,568 parameters``, and how many train if not all do."""
    total = model.parameter_count()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trainable == total:
        return f"{total:,} parameters"
    return f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %) train"
