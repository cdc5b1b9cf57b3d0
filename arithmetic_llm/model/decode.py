"""The one decoder: evaluation, the solver, the API and rollouts all write their text here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arithmetic_llm.model.tokenizer import EOS, PAD
from arithmetic_llm.model.transformer import ArithmeticModel, KVCache


@dataclass(frozen=True)
class SamplingParams:
    """Settings by which the next token is chosen; the default is greedy."""

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


GREEDY = SamplingParams()
COMPACT_AT = 1 / 8  # share of finished rows from which copying the cache without them pays
GUESSED, LOOKED_UP = 48, 8  # most tokens of a draft: a guess may be right to its end
LONGEST_MATCH = 4  # tokens; longer matches draft no better in traces of depth 4


@dataclass
class Completion:
    """Text that the model wrote after one prompt."""

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
    sampling: SamplingParams = GREEDY,
    batch_size: int = 64,
    on_done: Callable[[int, Completion], None] = lambda row, completion: None,
    guesses: Sequence[Sequence[int]] | None = None,
) -> list[Completion]:
    """Complete every prompt; results stand in the order of the prompts.

    Prompts of similar length share a batch, the longest first. ``batch_size`` and ``guesses``
    change the speed and the memory, never a result: rows do not see each other, and each row draws
    its own random numbers from ``(seed, row)``.

    Args:
        prompts: token ids, each non-empty, of any lengths.
        max_new_tokens: most tokens written after a prompt, ``<eos>`` included.
        on_done: called with the row of each prompt and its completion as soon as that is finished.
        guesses: what each row might write, right or wrong; see `decode`.
    """
    completions = [Completion() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [prompts[row] for row in rows]
        guessed = [guesses[row] for row in rows] if guesses else None
        for emission in decode(model, batch, max_new_tokens, sampling, rows, guessed):
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
    sampling: SamplingParams = GREEDY,
    row_ids: Sequence[int] | None = None,
    guesses: Sequence[Sequence[int]] | None = None,
) -> Iterator[Emission]:
    """Write all prompts at once, yielding the tokens as they come.

    A row stops after ``<eos>`` or ``max_new_tokens``; the iterator ends when all have stopped.

    The next tokens of a row are drafted (Leviathan et al., 2023): from its guess as long as it
    writes just that, else by looking up what followed when its last tokens stood in its text
    before. One forward pass checks a whole draft: the token of each place is chosen as ever, and
    the first choice that is not the drafted one is the last that counts. So drafts decide how many
    passes a text takes, and never the text, be it greedy or sampled.

    Args:
        row_ids: the rows' names in what is yielded and in the random streams (default 0, 1, ...).
        guesses: tokens that each row might write, for instance a right solution.
    """
    row_ids = list(range(len(prompts)) if row_ids is None else row_ids)
    draws = _uniforms(sampling, row_ids, max_new_tokens)
    texts = Texts(prompts, max_new_tokens, guesses or [[]] * len(prompts))
    cache = model.new_cache(len(prompts))
    with evaluating(model):
        _read_prompts(model, prompts, cache)
        while not texts.done.all():
            # Finished rows cost as much as others, but copying the cache without them costs, too.
            if texts.done.float().mean() > COMPACT_AT:
                cache.keep(texts.drop_finished().to(model.device))
            drafts = texts.drafts()
            # Row by row: the last token that is certain, then the draft; -1 is no token to read.
            logits = _forward(model, torch.cat((texts.last, drafts.clamp(min=PAD)), dim=1), cache)
            choice = _choose(logits, sampling, texts.of_places(draws, logits.shape[1]))
            counts = texts.accept(choice.tokens.cpu(), drafts)
            # The pass has left the whole draft in the cache, but lengths alone say what counts
            # there: moving them on by what was accepted forgets the rest. The last token accepted
            # is not in it yet; the next pass reads that first.
            cache.lengths = cache.lengths + counts.to(model.device)
            yield from _emissions(choice, [row_ids[i] for i in texts.index.tolist()], counts)


class Texts:
    """Rows in the making: B rows of tokens, prompt and all, each of its own length.

    All tensors are on the CPU; what happens to the tokens there is small beside a forward pass.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        guesses: Sequence[Sequence[int]],
    ):
        self.limit = max_new_tokens
        self.index = torch.arange(len(prompts))  # which prompt each row belongs to
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
        self.written = torch.zeros_like(self.lengths)
        self.done = self.written >= max_new_tokens
        longest = max(map(len, prompts), default=0)
        self.ids = _padded(prompts, longest + max_new_tokens)
        self.guesses = _padded(guesses, max(map(len, guesses), default=0) + 1)
        self.on_guess = torch.tensor([bool(guess) for guess in guesses], dtype=torch.bool)

    @property
    def last(self) -> Tensor:
        """(B, 1) the last token of each row."""
        return self.ids.gather(1, self.lengths[:, None] - 1)

    def drafts(self) -> Tensor:
        """(B, T) what might come next; -1 where nothing is drafted."""
        guessing = (self.on_guess & ~self.done).any()
        left = int((self.limit - self.written[~self.done]).max()) - 1
        most = min(GUESSED if guessing else LOOKED_UP, left)
        looked_up = F.pad(
            look_up(self.ids, self.lengths, min(most, LOOKED_UP)), (0, most), value=-1
        )
        if not guessing:
            return looked_up[:, :most]
        places = self.written[:, None] + torch.arange(most)
        guessed = self._guess_at(places, torch.arange(len(places))[:, None])
        return torch.where(self.on_guess[:, None], guessed, looked_up[:, :most])

    def _guess_at(self, places: Tensor, rows: Tensor) -> Tensor:
        """The guessed tokens; -1, which ends every guess, behind it."""
        return self.guesses[rows, places.clamp(max=self.guesses.shape[1] - 1)]

    def of_places(self, draws: Tensor, width: int) -> Tensor:
        """(B, width) the random numbers of each row's next tokens, of (prompts, tokens)."""
        places = self.written[:, None] + torch.arange(width)
        return draws[self.index[:, None], places.clamp(max=draws.shape[1] - 1)]

    def accept(self, tokens: Tensor, drafts: Tensor) -> Tensor:
        """Append the tokens that count: to the first that was not drafted, or ends the row.

        Args:
            tokens: (B, T + 1) the choice after the last token, and after each drafted one.
            drafts: (B, T).

        Returns:
            (B,) how many of each row count; 0 for finished rows.
        """
        counts = 1 + (tokens[:, :-1] == drafts).cumprod(dim=1).sum(dim=1)
        ends = (tokens == EOS).long()
        counts = torch.minimum(counts, (ends.cumsum(dim=1) == ends).sum(dim=1))  # none before it
        counts = torch.minimum(counts, self.limit - self.written).masked_fill(self.done, 0)
        steps = torch.arange(tokens.shape[1])
        rows, places = (steps < counts[:, None]).nonzero(as_tuple=True)
        new = tokens[rows, places]
        self.ids[rows, self.lengths[rows] + places] = new
        missed = self._guess_at(self.written[rows] + places, rows) != new
        self.on_guess[rows[missed]] = False
        self.lengths, self.written = self.lengths + counts, self.written + counts
        ended = (counts > 0) & (self.last[:, 0] == EOS)
        self.done = self.done | ended | (self.written == self.limit)
        return counts

    def drop_finished(self) -> Tensor:
        """Forget the rows that are done; returns the places of those that stay."""
        going = (~self.done).nonzero()[:, 0]
        for name in ("index", "lengths", "written", "done", "ids", "guesses", "on_guess"):
            setattr(self, name, getattr(self, name)[going])
        return going


def _padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """(B, width) token ids, -1 behind the end of each row."""
    ids = torch.full((len(rows), width), -1)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return ids


def look_up(ids: Tensor, lengths: Tensor, most: int) -> Tensor:
    """Followers of a row's last tokens where they stood before: the longest, then the latest match.

    ``7 + 3 = 10 , 7 +`` with ``most`` = 3 gives ``3 = 10``.

    Args:
        ids: (B, W) tokens; lengths: (B,) how many of each row count.

    Returns:
        (B, most) tokens, -1 where there is no match, or none of its followers is known.
    """
    ids = ids[:, : int(lengths.max())]
    width, last = ids.shape[1], lengths[:, None] - 1
    place = torch.arange(width)
    matching, matched = place < last, torch.zeros_like(ids)  # up to each place, in tokens
    for back in range(min(LONGEST_MATCH, width)):
        same = ids == ids.gather(1, (last - back).clamp(min=0))
        matching = matching & F.pad(same, (back, 0))[:, :width]
        matched += matching
    best = (matched * width + place).argmax(dim=1, keepdim=True)
    following = best + 1 + torch.arange(most)
    known = (following <= last) & (matched.gather(1, best) > 0)
    return torch.where(known, ids.gather(1, following.clamp(max=width - 1)), -1)


def _emissions(choice: Choice, names: Sequence[int], counts: Tensor) -> Iterator[Emission]:
    """The tokens that count, those of one place at a time."""
    for place in range(int(counts.max())):
        live = counts > place
        rows = live.nonzero()[:, 0].tolist()
        at = live.to(choice.tokens.device)
        yield Emission(
            [names[row] for row in rows],
            choice.tokens[at, place].tolist(),
            choice.logprobs[at, place].tolist(),
            choice.margins[at, place].tolist(),
            None if choice.support is None else choice.support[at, place].cpu(),
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


@torch.no_grad()
def _read_prompts(model: ArithmeticModel, prompts: Sequence[Sequence[int]], cache: KVCache) -> None:
    """Fill the cache with every prompt but its last token, which the first pass reads."""
    lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    if len(prompts) and (longest := int(lengths.max())):
        ids = _padded([prompt[:-1] for prompt in prompts], longest).clamp(min=PAD)
        model.hidden_states(ids.to(model.device), cache, lengths)


@torch.no_grad()
def _forward(model: ArithmeticModel, ids: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, T, vocabulary) after each token; how many of them the cache keeps is up to you."""
    nothing = torch.zeros_like(cache.lengths)
    return model.lm_head(model.hidden_states(ids.to(model.device), cache, nothing)).float()


def _uniforms(sampling: SamplingParams, rows: Sequence[int], steps: int) -> Tensor:
    """(rows, steps) numbers in [0, 1): row i's depend on the seed and on i alone."""
    if sampling.greedy:
        return torch.zeros(1, 1).expand(len(rows), steps)
    draws = [np.random.default_rng((sampling.seed, row)).random(steps) for row in rows]
    return torch.from_numpy(np.stack(draws))


class Choice(NamedTuple):
    """The next tokens (B, T), their log-probabilities, and how close the runners-up were."""

    tokens: Tensor
    logprobs: Tensor
    margins: Tensor
    support: Tensor | None  # (B, T, vocabulary)


def _choose(logits: Tensor, sampling: SamplingParams, uniform: Tensor) -> Choice:
    """Choose by ``logits`` (B, T, vocabulary) and, unless greedy, random numbers (B, T)."""
    best = logits.topk(2, dim=-1).values
    logprobs = truncated_logprobs(logits, sampling)
    if sampling.greedy:
        tokens = logits.argmax(dim=-1)
    else:
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        # Scaled to the last sum, which rounding may leave a little off 1.
        threshold = uniform.to(logits.device)[..., None] * cumulative[..., -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[..., 0]
    chosen = logprobs.gather(-1, tokens[..., None])[..., 0]
    support = logprobs > -torch.inf if sampling.truncated else None
    return Choice(tokens, chosen, best[..., 0] - best[..., 1], support)


def truncated_logprobs(logits: Tensor, sampling: SamplingParams) -> Tensor:
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
