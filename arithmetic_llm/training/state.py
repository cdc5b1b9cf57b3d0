"""What workers tell one another of their weights and optimizers, as one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arithmetic_llm.training.run import Run


def weights_and_moments(worker: Run) -> list[Tensor]:
    """All that an update changes, moments of zero where there has been none."""
    worker.optimizer.make_room()
    return [*worker.trained, *moments(worker)]


def moments(worker: Run) -> list[Tensor]:
    """What the optimizer remembers of each weight, in the same order every time."""
    states = [worker.optimizer.state.get(weight, {}) for weight in worker.trained]
    kept = [value for state in states for _, value in sorted(state.items())]
    return [value for value in kept if isinstance(value, Tensor)]


def end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector, a copy of them."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def copy_to(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Set tensors to others of their shapes."""
    torch._foreach_copy_(list(tensors), list(values))


def in_one_piece(tensors: Sequence[Tensor]) -> Tensor:
    """Lay tensors end to end in memory; returns the vector that they are parts of from now on."""
    vector = end_to_end(tensors)
    for tensor, part in zip(tensors, parts_of(vector, tensors), strict=True):
        tensor.data = part
    return vector


def on_their_own(tensors: Sequence[Tensor]) -> None:
    """Undo `in_one_piece`: a part that is saved or sent would take all of the vector with it."""
    for tensor in tensors:
        tensor.data = tensor.data.clone()


def parts_of(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector that belong to each of the tensors, in their shapes."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
