"""One solution under the lens: each token's probability and runner-up, and what each head saw.

Shape letters: L layers, H heads, N tokens written, K kept; T and S as in the transformer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arithmetic_llm.evaluation.judge import Outcome
from arithmetic_llm.evaluation.solver import ArithmeticSolver
from arithmetic_llm.model.decode import evaluating
from arithmetic_llm.model.fused import Sight, attend
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError

CHUNK = 256  # tokens that are read at a time: bounds the memory of the attention weights
MOST_KEPT, MOST_WEIGHTS = 32, 350_000  # of a row, and of a trace: the page stays small
MOST_TOKENS = 2**16 - 1  # a position is written in two bytes


class TracedToken(NamedTuple):
    """A token that was written, and the one that would have been in its place."""

    text: str
    probability: float
    runner_up: str  # the likeliest of the others
    runner_up_probability: float


class Gaze(NamedTuple):
    """Where each head looked when a token was written: the largest attention weights of its row.

    The row of a token is that of the position before it, whose output chose it.
    """

    sources: Tensor  # (N, L, H, K) positions looked at
    weights: Tensor  # (N, L, H, K) falling; 0 where a row has fewer

    @property
    def kept(self) -> int:
        """Weights of a row, at most."""
        return self.weights.shape[-1]

    @property
    def covered(self) -> float:
        """The share of all attention that the kept weights make up, on average."""
        return self.weights.sum(-1).mean().item()


@dataclass(frozen=True)
class Trace:
    """A solution with what went on inside."""

    outcome: Outcome
    prompt: list[str]  # its tokens
    tokens: list[TracedToken]
    gaze: Gaze


def record_trace(solver: ArithmeticSolver, expression: str) -> Trace:
    """Solve an expression, then read prompt and solution once more, with an eye on the inside.

    Raises:
        UserError: as the solver; a text too long to be shown.
    """
    return trace_of(solver, *solver.attempt(expression))


def trace_of(
    solver: ArithmeticSolver, prompt: list[int], written: list[int], outcome: Outcome
) -> Trace:
    """The trace of a text that has been written and judged."""
    ids = [*prompt, *written]
    if len(ids) > MOST_TOKENS:
        raise UserError(
            f"a text of {len(ids):,} tokens is too long for a page; set --max-gen-length"
        )
    config = solver.model.config
    rows = config.num_layers * config.nhead * len(written)
    kept = max(1, min(MOST_KEPT, MOST_WEIGHTS // rows))
    logprobs, gaze = read_closely(solver.model, ids[:-1], len(written), kept)
    token = solver.tokenizer.token
    tokens = [
        TracedToken(token(own), p, token(other), q)
        for own, p, other, q in _with_runners_up(written, logprobs)
    ]
    return Trace(outcome, [*map(token, prompt)], tokens, gaze)


def _with_runners_up(
    written: list[int], logprobs: Tensor
) -> Iterator[tuple[int, float, int, float]]:
    """Each token, its probability, the likeliest other one, and the probability of that."""
    index = torch.tensor(written)[:, None]
    own = logprobs.gather(-1, index)[:, 0]
    best, other = logprobs.scatter(-1, index, -torch.inf).max(-1)
    columns = (own.exp(), other, best.exp())
    return zip(written, *(column.tolist() for column in columns), strict=True)


@torch.no_grad()
def read_closely(
    model: ArithmeticModel, ids: list[int], last: int, kept: int
) -> tuple[Tensor, Gaze]:
    """What the model makes of the last positions of a text.

    Args:
        last: N, how many positions.
        kept: K, how many attention weights of a row.

    Returns:
        Log-probabilities (N, vocabulary) of the token after each of them, and where they looked.
    """
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(model.config.num_layers)]

    logits, cache = [], model.new_cache(1)

    def see(layer: int, weights: Tensor) -> None:
        values, places = _largest(weights[0].transpose(0, 1), kept)
        seen[layer].append((values, cache.held[0][places]))

    with evaluating(model), observed(model, see):
        for chunk in torch.tensor([ids], device=model.device).split(CHUNK, dim=1):
            logits.append(model(chunk, cache)[0].float())
    logprobs = torch.cat(logits)[-last:].log_softmax(-1).cpu()
    by_layer = [[torch.cat(part)[-last:] for part in zip(*chunks, strict=True)] for chunks in seen]
    weights, sources = (torch.stack(part, dim=1).cpu() for part in zip(*by_layer, strict=True))
    return logprobs, Gaze(sources, weights)


def _largest(weights: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The largest of (T, H, S) weights and their places, (T, H, kept) each, zeros behind them."""
    values, places = weights.float().topk(min(kept, weights.shape[-1]), dim=-1)
    room = (0, kept - values.shape[-1])
    return F.pad(values, room), F.pad(places, room)


@contextlib.contextmanager
def observed(model: ArithmeticModel, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Attention weights (B, H, T, S) go to ``see(layer, weights)`` inside the block.

    Only what is read with a cache is seen. The weights are the model's own: `attend` mixes values
    by them, and mixing the rows of the unit matrix gives the weights themselves.
    """

    def watched(layer: int, q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
        unit = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device)
        see(layer, attend(q, k, unit.expand(*k.shape[:2], -1, -1), sight))
        return attend(q, k, v, sight)

    layers = [layer.self_attn for layer in model.model.layers]
    for index, layer in enumerate(layers):
        layer.attend = partial(watched, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.attend
