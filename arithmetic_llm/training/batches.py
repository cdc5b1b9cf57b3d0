"""Text to token batches: tokenised samples, loss weights, and a plan of random, tight batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arithmetic_llm.config import ModelConfig
from arithmetic_llm.corpus.record import Record
from arithmetic_llm.distributed import gather_shares, is_mine
from arithmetic_llm.model.fused import BLOCK
from arithmetic_llm.model.tokenizer import BOS, EOS, PAD, THINK, UNK, ArithmeticTokenizer
from arithmetic_llm.runtime import UserError, moved
from arithmetic_llm.task.text import BEFORE_LINE, OPEN, in_turn

_CHUNK = 10_000  # records tokenised at a time
_ROUND_TO = 8  # batch widths are multiples of this: fewer distinct shapes run faster
# What a micro-batch may hold. Tokens bound what grows with the vocabulary (logits, sampling
# supports), bytes all else. On the CPU the documented step (--batch-size 32, depth 4, default
# model) then stays under 1.5 GiB, some 0.5 GiB of which are torch, weights, optimizer and corpus;
# the recipe's batches are never cut. An NVIDIA GPU has memory of its own and stands idle between
# small kernels, so a run may fill half of the card: two runs at a time, then, and on 24 GiB the
# batches of the GPU recipe whole.
_MOST_TOKENS, _MOST_TOKENS_ON_GPU = 16_384, 131_072  # padding included
_MOST_BYTES, _MOST_BYTES_OF_APPLE = 512 * 2**20, 4 * 2**30


@dataclass(frozen=True)
class LossWeights:
    """Weights of a token's loss by its place in the sequence; the solution's text counts 1."""

    prompt: float  # tokens up to and including <think>
    result: float  # the number after each step's "="


@dataclass(frozen=True)
class Batch:
    """Right-padded next-token prediction; padding and ignored tokens have weight 0."""

    input_ids: Tensor  # (B, T) long
    targets: Tensor  # (B, T) long; targets[:, t] follows input_ids[:, t]
    weights: Tensor  # (B, T) fp32
    counted: Tensor  # (N,) long; places in the flattened batch whose weight is above 0

    @classmethod
    def of(cls, ids: np.ndarray, weights: np.ndarray) -> Batch:
        """From padded sequences (B, T + 1) and the weight of each token as a target.

        What counts is found here, on the CPU: a GPU that is asked has to finish all else first.
        """
        tokens, weights = torch.from_numpy(ids), torch.from_numpy(weights)[:, 1:]
        return cls(tokens[:, :-1], tokens[:, 1:], weights, weights.flatten().nonzero()[:, 0])

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.input_ids.numel()

    @property
    def loss_denominator(self) -> float:
        """Sum of the weights: what the summed loss is divided by."""
        return float(self.weights.sum())

    def to(self, device: torch.device) -> Batch:
        parts = (self.input_ids, self.targets, self.weights, self.counted)
        return Batch(*(moved(part, device) for part in parts))


class TokenisedSamples:
    """All samples of a corpus in one flat array, ready to be cut into batches.

    Several processes share out the work, so all of them have to make it together.

    Attributes:
        ids: all token ids, one sample after the other.
        weights: the loss weight of each token as a target.
        starts: where each sample begins in ``ids``; one entry more than there are samples.
        kept: how many of the records are in it, in one sample or, as excerpts, in several.
        dropped: expressions of the records of which a sample would be longer than the context.

    Args:
        excerpt_tokens: a sample with more tokens comes as several, see `excerpts`; 0 = none does.
    """

    def __init__(
        self,
        records: Iterable[Record],
        tokenizer: ArithmeticTokenizer,
        max_seq_length: int,
        loss: LossWeights,
        excerpt_tokens: int = 0,
    ):
        of_chunk = partial(
            tokenised, tokenizer=tokenizer, context=max_seq_length, excerpt_tokens=excerpt_tokens
        )
        chunks = enumerate(_chunks(records, _CHUNK))  # processes share them out
        parts = gather_shares([of_chunk(chunk) for place, chunk in chunks if is_mine(place)])
        self.kept = sum(part.kept for part in parts)
        self.dropped = [expression for part in parts for expression in part.dropped]
        self.ids = np.concatenate([np.zeros(0, dtype=np.int32), *(part.ids for part in parts)])
        lengths = np.concatenate([np.zeros(1, dtype=np.int64), *(part.lengths for part in parts)])
        prompts = np.concatenate([np.zeros(0, dtype=np.int64), *(part.prompts for part in parts)])
        self.starts = np.cumsum(lengths)
        place = np.arange(len(self.ids)) - np.repeat(self.starts[:-1], self.lengths)
        in_prompt = place < np.repeat(prompts, self.lengths)
        self.weights = token_weights(self.ids, in_prompt, tokenizer, loss)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, ``<bos>`` and ``<eos>`` included."""
        return np.diff(self.starts)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The named samples as one right-padded batch."""
        width = _width(int(self.lengths[indices].max()))
        ids = np.full((len(indices), width + 1), PAD, dtype=np.int64)
        weights = np.zeros((len(indices), width + 1), dtype=np.float32)
        for row, index in enumerate(indices):
            start, end = self.starts[index], self.starts[index + 1]
            ids[row, : end - start] = self.ids[start:end]
            weights[row, : end - start] = self.weights[start:end]
        return Batch.of(ids, weights)


class Tokenised(NamedTuple):
    """Some records as samples, laid end to end."""

    ids: np.ndarray
    lengths: np.ndarray  # tokens of each sample
    prompts: np.ndarray  # tokens of each that its solution begins after
    kept: int
    dropped: list[str]


def tokenised(
    records: Sequence[Record], tokenizer: ArithmeticTokenizer, context: int, excerpt_tokens: int
) -> Tokenised:
    """Records as samples, but for those of which one would be longer than the context."""
    found: list[Piece] = []
    kept, dropped = 0, []
    encoded = tokenizer.encode_batch([record.sequence for record in records])
    for record, ids in zip(records, encoded, strict=True):
        _check(record, ids)
        pieces = _pieces(record, ids, tokenizer, excerpt_tokens)
        if max(len(piece) for _, piece in pieces) > context:
            dropped.append(record.expression)
        else:
            kept += 1
            found += pieces
    lengths = np.array([len(ids) for _, ids in found], dtype=np.int64)
    prompts = np.array([prompt for prompt, _ in found], dtype=np.int64)
    ids = np.fromiter(chain.from_iterable(ids for _, ids in found), np.int32, lengths.sum())
    return Tokenised(ids, lengths, prompts, kept, dropped)


Piece = tuple[int, list[int]]  # how many tokens its first step begins after, and all tokens


def _pieces(
    record: Record, ids: list[int], tokenizer: ArithmeticTokenizer, most: int
) -> list[Piece]:
    """A record as one sample or, if it has more than ``most`` tokens, as its `excerpts`.

    Args:
        ids: the tokens of the whole record.
    """
    begun = ids.index(THINK) + 1 if THINK in ids else len(tokenizer.encode(f" {record.problem}"))
    if not record.is_problem:  # it is an excerpt itself: nothing ends with it
        return [(begun + 1, [BOS, *ids])]
    whole = [(begun + 1, [BOS, *ids, EOS])]
    too_long = 0 < most < len(ids) + 2
    return (excerpts(record, tokenizer, most) if too_long else []) or whole


def excerpts(record: Record, tokenizer: ArithmeticTokenizer, most: int) -> list[Piece]:
    """A long sample cut between its steps, as documents are that are longer than a context.

    The first excerpt begins with the problem, each other one with the step before its first, and
    only the last has an answer and an end:

        <bos> Evaluate: ... <think> Step 1: ... Expression now: ...
        <bos> Step 8: ... Expression now: ... Step 9: ... Expression now: ... </think> Final ...

    Args:
        most: tokens of an excerpt; only one of a single step, behind the one before, may be longer.

    Returns:
        An empty list if there is no step, or if steps and expressions do not take turns.
    """
    parts = BEFORE_LINE.split(record.sequence)
    if not in_turn(parts[1:]):
        return []
    problem, *lines = tokenizer.encode_batch(parts)
    begin, found = [BOS, *problem], []
    for operation, expression in zip(lines[::2], lines[1::2], strict=True):
        step = [*operation, *expression]
        if found and len(found[-1][1]) + len(step) < most:
            found[-1][1].extend(step)
        else:
            found.append((len(begin), [*begin, *step]))
        begin = [BOS, *step]
    found[-1][1].append(EOS)
    return found


def token_weights(
    ids: np.ndarray, in_prompt: np.ndarray, tokenizer: ArithmeticTokenizer, loss: LossWeights
) -> np.ndarray:
    """The loss weight of each token of a flat array of samples, fp32.

    A result is the run of digits and signs after "=", which may be a token of its own or end one,
    with or without the space that follows; and the token behind the run, because how many digits a
    number has is arithmetic, too. With weights of 0.05 for the prompt and 3 for a result:

        <bos> Evaluate: ... <think> " Step " 1 ": " 7 " + " 5 " = " 1 2 " Expression now: " ...
          0     0.05        0.05      1     1  1   1   1   1   1    3 3         3           1

    Args:
        in_prompt: of each token whether it stands before its sample's first step.
    """
    if not len(ids):
        return np.zeros(0, dtype=np.float32)
    place = np.arange(len(ids))

    def latest(mark: np.ndarray) -> np.ndarray:
        """Last place up to each where ``mark`` holds; 0 where none does."""
        return np.maximum.accumulate(np.where(mark, place, 0))

    texts = [tokenizer.token(i) for i in range(tokenizer.vocab_size)]
    numeric = np.array([text.isdigit() or text == "-" for text in texts])[ids]
    blank = np.array([text == " " for text in texts])[ids]
    ends_with_equals = np.array([text.rstrip().endswith("=") for text in texts])[ids]
    word_before = latest(~(numeric | blank))  # where the last token that is no number stands
    in_result = numeric & ends_with_equals[word_before]
    in_result[1:] |= in_result[:-1]
    weights = np.where(in_prompt, loss.prompt, np.where(in_result, loss.result, 1.0))
    weights[ids == BOS] = 0.0  # nothing precedes it, so nothing can predict it
    return weights.astype(np.float32)


def plan_epoch(
    lengths: np.ndarray, batch_size: int, batch_tokens: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """One epoch's batches as arrays of sample indices: every sample once, in random order.

    Samples are shuffled, sorted by length within pools of some fifty batches, cut, and the batches
    shuffled. So a batch has little padding, and still any two samples of like length may meet.

    Args:
        batch_size: samples a batch, unless
        batch_tokens: tokens a batch at most, padding included, of an even number of samples where
            lengths allow it; a sample of more than half of them is a batch of its own.
    """

    def fits(rows: int, longest: int) -> bool:
        if not batch_tokens:
            return rows <= batch_size
        # A third only with room for a fourth: of two threads that compute a half each, one would
        # have two samples and the other wait for it.
        return (rows + rows % 2) * longest <= batch_tokens

    order = rng.permutation(len(lengths))
    per_batch = batch_size if not batch_tokens else max(1, int(batch_tokens / lengths.mean()))
    pool = 50 * per_batch
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        members = order[start : start + pool]
        members = members[np.argsort(lengths[members], kind="stable")]
        batches += _cut(members, lengths, fits)
    rng.shuffle(batches)
    return batches


def micro_batches(
    lengths: np.ndarray,
    indices: np.ndarray,
    shape: ModelConfig,
    device: torch.device,
    least: int = 1,
    most_rows: int | None = None,
    at_once: int = 1,
) -> list[np.ndarray]:
    """Cut a batch into parts that fit into memory; every index once, in order of length.

    A part of several rows has at most 16,384 tokens, padding included, and needs at most 512 MiB
    (`working_memory`), on CUDA 131,072 and half of the card; a single row is never cut.

    Args:
        lengths: tokens of each sample of the corpus, ``<bos>`` and ``<eos>`` included.
        indices: the samples of the batch.
        shape, device: of the model that reads it.
        least: parts to make at least, as far as there are rows.
        most_rows: rows of a part at most.
        at_once: parts, of this batch or others, that are computed side by side: they share memory.
    """
    most_tokens, most_bytes = most_at_once(device)

    def fits(rows: int, longest: int) -> bool:
        return (
            rows <= (most_rows or rows)
            and rows * _width(longest) <= most_tokens
            and working_memory(rows, _width(longest), shape) * at_once <= most_bytes
        )

    ordered = indices[np.argsort(lengths[indices], kind="stable")]
    pieces = np.array_split(ordered, max(1, min(least, len(ordered))))
    return [part for piece in pieces for part in _cut(piece, lengths, fits)]


def most_at_once(device: torch.device) -> tuple[int, int]:
    """Tokens and bytes that a micro-batch may hold; of a GPU half of its memory, in whole GiB."""
    if device.type != "cuda":
        return _MOST_TOKENS, _MOST_BYTES if device.type == "cpu" else _MOST_BYTES_OF_APPLE
    memory = torch.cuda.get_device_properties(device).total_memory
    return _MOST_TOKENS_ON_GPU, memory // 2**31 * 2**30


def working_memory(rows: int, width: int, shape: ModelConfig) -> int:
    """Bytes, about, that a training step takes for a micro-batch beside weights and optimizer.

    For each position a layer keeps 16 vectors of the model's width, 4 of the feed-forward's and a
    head's attention weights, of which `causal_attention` makes blocks up to the diagonal, as far as
    a window reaches; the backward pass has copies worth about 3 layers more.
    In fp32 it is 2 to 40 % above the peak that was measured (64 x 64 to 1 x 1,536 tokens, 3 to 6
    layers); bf16 takes two thirds of that, and with compiled functions a quarter less is kept.
    """
    seen = min(width, (width + BLOCK) // 2)  # positions, on average, to the end of one's own block
    if shape.attention_window:
        seen = min(seen, shape.attention_window + BLOCK)
    values = 16 * shape.d_model + 4 * shape.dim_feedforward + shape.nhead * seen
    return 4 * rows * width * (shape.num_layers + 3) * values


def _width(longest: int) -> int:
    """Positions of a batch: the last token is a target only."""
    return -(-(longest - 1) // _ROUND_TO) * _ROUND_TO


def _cut(
    members: np.ndarray, lengths: np.ndarray, fits: Callable[[int, int], bool]
) -> list[np.ndarray]:
    """Consecutive runs of ``members`` (sorted by length), each as long as it fits.

    Args:
        fits: whether so many rows, the longest of so many tokens, may be together.
    """
    runs, start = [], 0
    for end in range(1, len(members) + 1):
        if end == len(members) or not fits(end + 1 - start, int(lengths[members[end]])):
            runs.append(members[start:end])
            start = end
    return runs


def _check(record: Record, ids: list[int]) -> None:
    if UNK in ids:
        raise UserError(
            f"the tokenizer has no token for a character of {record.expression!r}; "
            "train it on this corpus with train_tokenizer.py"
        )
    if record.is_problem and THINK not in ids:
        raise UserError(f"{record.expression!r}: its solution has no {OPEN}; make the corpus anew")


def _chunks(records: Iterable[Record], size: int) -> Iterable[list[Record]]:
    chunk: list[Record] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
