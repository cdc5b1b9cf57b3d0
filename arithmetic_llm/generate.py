"""The one decoder: evaluation, the solver, the API and rollouts all write their text here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arithmetic_llm.model import ArithmeticModel, KVCache
from arithmetic_llm.tokenizer import EOS, PAD


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy."""

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0  # keep the smallest set that holds this much probability; 1 = all
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncated(self) -> bool:
        """Some tokens may be cut from the distribution."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0)


GREEDY = Sampling()
COMPACT_AT = 1 / 8  # share of finished rows from which copying the cache without them pays


@dataclass
class Completion:
    """What the model wrote after one prompt."""

    tokens: list[int] = field(default_factory=list)  # the final <eos> included
    logprobs: list[float] = field(default_factory=list)  # nats, of the distribution sampled from
    finish_reason: Literal["eos", "length"] = "length"
    margin: float = float("inf")  # smallest gap between the two best logits: a near-tie if ~1e-5
    support: list[Tensor] = field(default_factory=list)  # (vocabulary,) bool a token, if truncated

    def add(self, emission: Emission, place: int) -> None:
        """Append what one decoding step has given for this row."""
        self.tokens.append(emission.tokens[place])
        self.logprobs.append(emission.logprobs[place])
        self.margin = min(self.margin, emission.margins[place])
        if emission.support is not None:
            self.support.append(emission.support[place])
        if self.tokens[-1] == EOS:
            self.finish_reason = "eos"


@dataclass(frozen=True)
class Emission:
    """One decoding step: a token for every row that is still being written."""

    rows: list[int]  # indices into the prompts
    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    support: Tensor | None = None  # (rows, vocabulary) bool: what truncation has left


def generate(
    model: ArithmeticModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    batch_size: int = 64,
    on_done: Callable[[int, Completion], None] = lambda row, completion: None,
) -> list[Completion]:
    """Complete every prompt; results stand in the order of the prompts.

    Prompts of similar length share a batch, the longest first. ``batch_size`` changes the speed and
    the memory, never a result: rows do not see each other, and each row draws its own random
    numbers from ``(seed, row)``.

    Args:
        prompts: token ids, each non-empty, of any lengths.
        max_new_tokens: most tokens written after a prompt, ``<eos>`` included.
        on_done: called with the row of each prompt and its completion as soon as that is finished.
    """
    completions = [Completion() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [prompts[row] for row in rows]
        for emission in decode(model, batch, max_new_tokens, sampling, rows):
            for place, row in enumerate(emission.rows):
                completions[row].add(emission, place)
                if completions[row].finish_reason == "eos":
                    on_done(row, completions[row])
        for row in rows:
            if completions[row].finish_reason == "length":
                on_done(row, completions[row])
    return completions


def decode(
    model: ArithmeticModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    row_ids: Sequence[int] | None = None,
) -> Iterator[Emission]:
    """Write all prompts at once, yielding each step's tokens as they come.

    A row stops after ``<eos>``; the iterator ends when all rows have stopped
    or ``max_new_tokens`` are written. ``row_ids`` name the rows in what is yielded and in the
    random streams (default 0, 1, 2, ...).
    """
    row_ids = list(range(len(prompts)) if row_ids is None else row_ids)
    draws = _uniforms(sampling, row_ids, max_new_tokens)
    cache = model.new_cache(len(prompts))
    with evaluating(model):
        logits = _prefill(model, prompts, cache)
        index = torch.arange(len(prompts))  # which prompt each row of the cache belongs to
        done = torch.zeros(len(prompts), dtype=torch.bool)
        for step in range(max_new_tokens):
            choice = _choose(logits, sampling, draws[index, step])
            yield _emission(choice, [row_ids[i] for i in index.tolist()], ~done)
            tokens = choice.tokens
            done |= tokens.cpu() == EOS
            if done.all() or step == max_new_tokens - 1:
                return
            if done.float().mean() > COMPACT_AT:
                going = (~done).nonzero().flatten()
                index, done = index[going], done[going]
                going = going.to(tokens.device)
                tokens = tokens[going]
                cache.keep(going)
            logits = _forward(model, tokens[:, None], cache, None)


def _emission(choice: Choice, names: list[int], live: Tensor) -> Emission:
    """What the rows that are still being written have got."""
    live = live.to(choice.tokens.device)
    return Emission(
        [name for name, alive in zip(names, live.tolist(), strict=True) if alive],
        choice.tokens[live].tolist(),
        choice.logprobs[live].tolist(),
        choice.margins[live].tolist(),
        None if choice.support is None else choice.support[live].cpu(),
    )


@contextlib.contextmanager
def evaluating(model: ArithmeticModel) -> Iterator[None]:
    """Dropout off inside the block, and back as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _prefill(model: ArithmeticModel, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.full((len(prompts), int(lengths.max())), PAD)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    return _forward(model, ids.to(model.device), cache, lengths.to(model.device))


@torch.no_grad()
def _forward(model: ArithmeticModel, ids: Tensor, cache: KVCache, lengths: Tensor | None) -> Tensor:
    """Logits (B, vocabulary) after each row's last real token."""
    hidden = model.hidden_states(ids, cache, lengths)
    if lengths is not None:
        hidden = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
    return model.lm_head(hidden.flatten(0, -2)).float()


def _uniforms(sampling: Sampling, rows: Sequence[int], steps: int) -> Tensor:
    """(rows, steps) numbers in [0, 1): row i's depend on the seed and on i alone."""
    if sampling.greedy:
        return torch.zeros(1, 1).expand(len(rows), steps)
    draws = [np.random.default_rng((sampling.seed, row)).random(steps) for row in rows]
    return torch.from_numpy(np.stack(draws))


class Choice(NamedTuple):
    """The next token of each row (B,), its log-probability, and how close the runner-up was."""

    tokens: Tensor
    logprobs: Tensor
    margins: Tensor
    support: Tensor | None  # (B, vocabulary)


def _choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Choice:
    best = logits.topk(2, dim=-1).values
    logprobs = truncated_logprobs(logits, sampling)
    if sampling.greedy:
        tokens = logits.argmax(dim=-1)
    else:
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        # Scaled to the last sum, which rounding may leave a little off 1.
        threshold = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    support = logprobs > -torch.inf if sampling.truncated else None
    return Choice(tokens, chosen, best[:, 0] - best[:, 1], support)


def truncated_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities of the distribution that tokens are drawn from.

    Temperature first, then top-k, then the nucleus (Holtzman et al., 2020): the likeliest tokens
    until their probability reaches ``top_p``, the one that crosses it included. What is cut has
    ``-inf`` and the rest sums to 1. Greedy decoding reports the plain softmax.

    Args:
        logits: (..., vocabulary), fp32.
    """
    if sampling.greedy:
        return logits.log_softmax(dim=-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        weakest = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    if sampling.top_p < 1.0:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = probs.cumsum(dim=-1) - probs
        cut = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits.log_softmax(dim=-1)
