"""The one decoder: evaluation, the solver, the API and rollouts all write their text here."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arithmetic_llm.model.tokenizer import EOS, PAD
from arithmetic_llm.model.transformer import ArithmeticModel, KVCache
from arithmetic_llm.threads import map_at_once, setting_on_error


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
# On a CPU, some sixty positions take hardly longer than one, and some thousand are all that a core
# has use for at a time.
FEW_POSITIONS, MOST_POSITIONS = 64, 1024
LONGEST_DRAFT, LONGEST_ON_GPU = 128, 48
LEAST_ROWS = 8  # that are worth a thread of their own
LOOKED_UP = 8  # most tokens of a draft that is looked up
LONGEST_MATCH = 4  # tokens; longer matches draft no better in traces of depth 4

# What a row might write next, right or wrong, given its name and all tokens that it has written.
Guess = Callable[[int, list[int]], Sequence[int]]


@dataclass
class Completion:
    """Text that the model wrote after one prompt."""

    tokens: list[int] = field(default_factory=list)  # the final <eos> included
    logprobs: list[float] = field(default_factory=list)  # nats, of the distribution sampled from
    finish_reason: Literal["eos", "length"] = "length"
    # Smallest gap between the two best logits, if greedy: a near-tie if ~1e-5.
    margin: float = math.inf
    support: list[Tensor] = field(default_factory=list)  # (vocabulary,) bool a token, if truncated

    def add(self, emission: Emission) -> None:
        """Append what a decoding step has given for this row."""
        self.tokens += emission.tokens
        self.logprobs += emission.logprobs
        self.margin = min(self.margin, *emission.margins)
        self.support += emission.support
        if self.tokens[-1] == EOS:
            self.finish_reason = "eos"


@dataclass(frozen=True)
class Emission:
    """Tokens that one decoding step gives for one row: those of a draft that are right, and one."""

    row: int  # index into the prompts
    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    support: list[Tensor]  # (vocabulary,) bool a token: what truncation has left; or nothing


def generate(
    model: ArithmeticModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams = GREEDY,
    batch_size: int = 64,
    on_done: Callable[[int, Completion], None] = lambda row, completion: None,
    guess: Guess | None = None,
    rows: Sequence[int] | None = None,
) -> list[Completion]:
    """Complete every prompt; results stand in the order of the prompts.

    Prompts of similar length share a batch, the longest first. ``batch_size`` and ``guess``
    change the speed and the memory, never a result: rows do not see each other, and each row draws
    its own random numbers from ``(seed, row)``.

    Of several batches each thread of a CPU decodes a part. Threads that share each operation wait
    for each other, and with other work on the machine that is most of what they do.

    Args:
        prompts: token ids, each non-empty, of any lengths.
        max_new_tokens: most tokens written after any prompt or after each, ``<eos>`` included.
        on_done: called with the row of each prompt and its completion as soon as that is finished,
            one at a time, by any thread.
        guess: what each row might write next, see `decode`.
        rows: of the prompts to complete, in the order of the results; None = all.
    """
    completions = {row: Completion() for row in (range(len(prompts)) if rows is None else rows)}
    limits = _each(max_new_tokens, len(prompts))
    order = sorted(completions, key=lambda row: -len(prompts[row]))
    threads, part = _parts(len(order), batch_size, model.device)
    stopped, reporting = threading.Event(), threading.Lock()

    def report(row: int) -> None:
        with reporting:
            on_done(row, completions[row])

    @setting_on_error(stopped)
    def complete(batch: Sequence[int]) -> None:
        texts, most = [prompts[row] for row in batch], [limits[row] for row in batch]
        for emission in decode(model, texts, most, sampling, batch, guess):
            if stopped.is_set():
                return
            completion = completions[emission.row]
            completion.add(emission)
            if completion.finish_reason == "eos":
                report(emission.row)
        for row in batch:
            if completions[row].finish_reason == "length":
                report(row)

    batches = [order[start : start + part] for start in range(0, len(order), part)]
    # What `decode` does in each thread would end with the first. Ctrl-C comes to this one alone.
    with evaluating(model), setting_on_error(stopped):
        deque(map_at_once(complete, batches, threads), maxlen=0)
    return [*completions.values()]


def _parts(rows: int, batch_size: int, device: torch.device) -> tuple[int, int]:
    """How many threads are to decode so many rows, and how many rows at a time each.

    A single batch is left to all threads: cut up, it would end with one thread alone.
    """
    if device.type != "cpu" or rows <= batch_size:
        return 1, batch_size
    threads = max(1, min(torch.get_num_threads(), batch_size // LEAST_ROWS))
    return threads, math.ceil(batch_size / threads)


def decode(
    model: ArithmeticModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams = GREEDY,
    row_ids: Sequence[int] | None = None,
    guess: Guess | None = None,
) -> Iterator[Emission]:
    """Write all prompts at once, yielding the tokens as they come.

    A row stops after ``<eos>`` or its ``max_new_tokens``; the iterator ends when all have stopped.

    The next tokens of a row are drafted (Leviathan et al., 2023): guessed, or else looked up, which
    is what followed when the row's last tokens stood in its text before. One forward pass checks a
    whole draft: the token of each place is chosen as ever, and the first choice that is not the
    drafted one is the last that counts. So drafts decide how many passes a text takes, and never
    the text, be it greedy or sampled.

    Args:
        row_ids: the rows' names in what is yielded, in the random streams and for ``guess``
            (default 0, 1, ...).
        guess: asked at the start of a row, and again whenever its last answer was wrong or is used
            up.
    """
    limits = _each(max_new_tokens, len(prompts))
    if not any(limits):
        return
    names = range(len(prompts)) if row_ids is None else row_ids
    draws = _uniforms(sampling, names, max(limits))
    rows = [TextRow(*row, guess) for row in zip(names, prompts, draws, limits, strict=True)]
    with evaluating(model):
        cache = _read_prompts(model, prompts)
        _drop_finished(rows, cache)  # those that may write nothing
        gained = math.inf  # tokens that a row got from the last pass, on average
        while rows:
            most = _longest_draft(len(rows), gained, model.device)
            drafts = [row.draft(most) for row in rows]
            # Each row reads its last token, the only one that is certain and not in the cache, and
            # its draft. The padding behind a shorter draft is read as well, and never looked at.
            ids = _padded([[row.last, *draft] for row, draft in zip(rows, drafts, strict=True)])
            uniform = torch.stack([row.uniforms(ids.shape[1]) for row in rows])
            choice = _choose(_forward(model, ids, cache), sampling, uniform)
            read = zip(rows, choice.tokens.tolist(), drafts, strict=True)
            counts = [row.accept(tokens, draft) for row, tokens, draft in read]
            # The pass has left the whole draft in the cache, but lengths alone say what counts
            # there: moving them on by what was accepted forgets the rest. The last token accepted
            # is not in it yet; the next pass reads that first.
            cache.lengths = cache.lengths + torch.tensor(counts, device=model.device)
            gained = sum(counts) / len(counts)
            yield from _emissions(rows, choice, counts)
            _drop_finished(rows, cache)


def _each(limit: int | Sequence[int], rows: int) -> Sequence[int]:
    """The limit of each row."""
    return [limit] * rows if isinstance(limit, int) else limit


class TextRow:
    """A text in the making, prompt and all, and what might come next.

    Tokens are kept as the characters of these numbers: a search in a string is fast.
    """

    def __init__(
        self, name: int, prompt: Sequence[int], draws: Tensor, limit: int, guess: Guess | None
    ):
        self.name, self.draws, self.limit, self.guess = name, draws, limit, guess
        self.text, self.start = _letters(prompt), len(prompt)
        self.guessed: list[int] = []  # what the last guess says beyond the text; it may be wrong

    @property
    def last(self) -> int:
        """The last token."""
        return ord(self.text[-1])

    @property
    def written(self) -> int:
        """Number of tokens behind the prompt."""
        return len(self.text) - self.start

    @property
    def done(self) -> bool:
        """Nothing more is to be written."""
        return self.written == self.limit or (self.written > 0 and self.last == EOS)

    def draft(self, most: int) -> list[int]:
        """What might come next, within the limit: its last token is not drafted but chosen."""
        most = min(most, self.limit - self.written - 1)
        if self.guess and not self.guessed:
            self.guessed = [*self.guess(self.name, _tokens(self.text[self.start :]))]
        return self.guessed[:most] or _tokens(look_up(self.text, min(most, LOOKED_UP)))

    def uniforms(self, width: int) -> Tensor:
        """(width,) the random numbers of the next places."""
        return self.draws[self.written : self.written + width]

    def accept(self, tokens: list[int], draft: list[int]) -> int:
        """Append the tokens that count: up to the first that was not drafted or ends the text.

        Args:
            tokens: the choice after the last token, and after each drafted one.

        Returns:
            How many count, 1 at least.
        """
        right = 0
        while right < len(draft) and tokens[right] == draft[right] != EOS:
            right += 1
        new = tokens[: right + 1]
        self.text += _letters(new)
        self.guessed = self.guessed[len(new) :] if self.guessed[: len(new)] == new else []
        return len(new)


def _letters(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


def _tokens(letters: str) -> list[int]:
    return [*map(ord, letters)]


def look_up(text: str, most: int) -> str:
    """What followed where the end of a text stood before: the longest, then the latest match.

    ``7+3=10,7+`` with ``most`` = 3 gives ``3=1``; without a match there is nothing.
    """
    for length in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
        place = text.rfind(text[-length:], 0, len(text) - 1)
        if place >= 0:
            return text[place + length : place + length + most]
    return ""


def _longest_draft(rows: int, gained: float, device: torch.device) -> int:
    """Most tokens of a draft in a batch of so many rows.

    Args:
        gained: tokens that a row has had from a pass of late. Twice as many are drafted: where
            drafts are right they grow at once, where they are wrong little is read in vain.
    """
    if device.type != "cpu":
        return LONGEST_ON_GPU
    useful = max(2 * gained, FEW_POSITIONS // rows)
    # One position is for the last token: a CPU computes sixteen of a row at once (kernels.c).
    return int(max(1, min(useful, MOST_POSITIONS // rows - 1, LONGEST_DRAFT - 1)))


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, longest) token ids, `PAD` behind the end of each row."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])


def _emissions(rows: list[TextRow], choice: Choice, counts: list[int]) -> Iterator[Emission]:
    """The tokens that count, row by row."""
    tokens, logprobs, margins = (part.tolist() for part in choice[:3])
    for i, (row, n) in enumerate(zip(rows, counts, strict=True)):
        support = [] if choice.support is None else [*choice.support[i, :n].clone().cpu()]
        yield Emission(row.name, tokens[i][:n], logprobs[i][:n], margins[i][:n], support)


def _drop_finished(rows: list[TextRow], cache: KVCache) -> None:
    """Forget the rows that are done; the last row moves into the place of each."""
    for place in reversed(range(len(rows))):
        if rows[place].done:
            cache.remove(place)
            rows[place] = rows[-1]
            rows.pop()


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
def _read_prompts(model: ArithmeticModel, prompts: Sequence[Sequence[int]]) -> KVCache:
    """A cache that holds each prompt but its last token, which the first pass reads.

    Prompts that are alike, as those of a group of rollouts, are read once and copied.
    """
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    ids = _padded([*places])[:, :-1].to(model.device)
    lengths = torch.tensor([len(prompt) - 1 for prompt in places], device=model.device)
    cache = model.new_cache(len(places))
    if ids.shape[1]:
        model.hidden_states(ids, cache, lengths)
    cache.keep(torch.tensor([places[tuple(prompt)] for prompt in prompts], device=model.device))
    return cache


@torch.no_grad()
def _forward(model: ArithmeticModel, ids: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, T, vocabulary) after each token; how many of them the cache keeps is up to you."""
    nothing = torch.zeros_like(cache.lengths)
    return model.lm_head(model.hidden_states(ids.to(model.device), cache, nothing)).float()


def _uniforms(sampling: SamplingParams, rows: Sequence[int], steps: int) -> Tensor:
    """(rows, steps and more) numbers in [0, 1): row i's depend on the seed and on i alone.

    Behind the limit stand zeros, for the places of a draft or of padding that nobody looks at.
    """
    if sampling.greedy:
        return torch.zeros(1, 1).expand(len(rows), steps + LONGEST_DRAFT)
    draws = [np.random.default_rng((sampling.seed, row)).random(steps) for row in rows]
    return F.pad(torch.from_numpy(np.stack(draws)), (0, LONGEST_DRAFT))


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
        # Apple's GPUs have no fp64.
        drawn_on = "cpu" if logits.device.type == "mps" else logits.device
        cumulative = logprobs.to(drawn_on).double().exp().cumsum(dim=-1)
        # Scaled to the last sum, which rounding may leave a little off 1.
        threshold = uniform.to(drawn_on)[..., None] * cumulative[..., -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[..., 0].to(logits.device)
    chosen = logprobs.gather(-1, tokens[..., None])[..., 0]
    gap = best[..., 0] - best[..., 1]
    margins = gap if sampling.greedy else torch.full_like(gap, torch.inf)
    support = logprobs > -torch.inf if sampling.truncated else None
    return Choice(tokens, chosen, margins, support)


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
