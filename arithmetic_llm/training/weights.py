"""How much the loss of each token counts, by its place in its sample."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from arithmetic_llm.model.tokenizer import BOS, THINK, ArithmeticTokenizer


@dataclass(frozen=True)
class LossWeights:
    """Weights of a token's loss by its place in the sequence; the solution's text counts 1."""

    prompt: float  # tokens up to and including <think>
    result: float  # the number after each step's "="
    decision: float = 1.0  # what tells how the solution goes on, see `token_weights`


def token_weights(
    ids: np.ndarray, in_prompt: np.ndarray, tokenizer: ArithmeticTokenizer, loss: LossWeights
) -> np.ndarray:
    """The loss weight of each token of a flat array of samples, fp32.

    A result is the run of digits and signs after "=", which may be a token of its own or end one,
    with or without the space that follows; and the token behind the run, because how many digits a
    number has is arithmetic, too.

    Decisions are few among the many tokens that are copied: the one after ``<think>`` (a step, or
    an error), and what stands where a new expression first differs from the one before, the
    result in its new place, with the token behind it, where copying begins anew.

    With weights of 0.05 for the prompt, 3 for a result and 5 for a decision:

        <bos> Evaluate: ... <think> " Step " 1 ": " 7 " + " 5 " = " 2 1 " Expression now: "
          0     0.05        0.05      5      1  1   1   1   1   1   3 3         3

        4 " - " 2 1 " Step " 2 ": " 4 ...
        1   1   5 5     5    1  1   1

    Args:
        in_prompt: of each token whether it stands before its sample's first step.
    """
    if not len(ids):
        return np.zeros(0, dtype=np.float32)
    tokens = _Tokens(ids, [tokenizer.token(i) for i in range(tokenizer.vocab_size)])
    weights = np.where(in_prompt, loss.prompt, np.where(_results(tokens), loss.result, 1.0))
    weights[_decisions(tokens) & ~in_prompt] = loss.decision
    weights[ids == BOS] = 0.0  # nothing precedes it, so nothing can predict it
    return weights.astype(np.float32)


class _Tokens:
    """Of what kind each token is, as arrays of truth values."""

    def __init__(self, ids: np.ndarray, texts: list[str]):
        def those(pattern: str) -> np.ndarray:
            return np.array([bool(re.fullmatch(pattern, text)) for text in texts])[ids]

        self.ids = ids
        self.place = np.arange(len(ids))
        self.blank = those(" ")
        self.numeric = those("[0-9]+|-")
        self.word = ~self.blank & ~those(r" ?[0-9+\-()]+ ?")
        self.ends_with_equals = those(r"(?s:.*)= ?")

    def latest(self, mark: np.ndarray) -> np.ndarray:
        """Last place up to each where ``mark`` holds; 0 where none does."""
        return np.maximum.accumulate(np.where(mark, self.place, 0))


def _results(tokens: _Tokens) -> np.ndarray:
    """The numbers after "=", each with the token behind it."""
    before = tokens.latest(~(tokens.numeric | tokens.blank))
    found = tokens.numeric & tokens.ends_with_equals[before]
    found[1:] |= found[:-1]
    return found


def _decisions(tokens: _Tokens) -> np.ndarray:
    """The tokens after ``<think>``; the numbers of `_departures`, each with the token behind it."""
    number = np.cumsum(~tokens.numeric)
    placed = np.zeros(number[-1] + 1, dtype=bool)
    placed[number[_departures(tokens) & tokens.numeric]] = True
    found = tokens.numeric & placed[number]
    found[1:] |= found[:-1] | (tokens.ids[:-1] == THINK)
    return found


def _departures(tokens: _Tokens) -> np.ndarray:
    """Where each new expression first differs from the expression before its step.

    Between words there are runs of digits, operators and parentheses, and four from one expression
    to the next: ``E1`` Step ``1`` : ``a + b`` = ``c`` Expression now: ``E2``.
    """
    text_before = tokens.latest(~tokens.blank)
    begins = ~tokens.word & ~tokens.blank
    begins[1:] &= tokens.word[text_before[:-1]]
    starts = tokens.place[begins]
    if len(starts) < 5:
        return np.zeros(len(tokens.ids), dtype=bool)
    is_result = tokens.ends_with_equals[text_before[starts - 1]]
    is_new = np.concatenate([[False], is_result[:-1]])
    run = np.cumsum(begins) - 1
    within = tokens.place - starts[run]
    copied_from = starts[np.maximum(run - 4, 0)] + within
    in_new = is_new[run] & ~tokens.word & ~tokens.blank
    differs = in_new & (tokens.ids[np.minimum(copied_from, len(run) - 1)] != tokens.ids)
    before = np.concatenate([[0], tokens.latest(differs)[:-1]])
    return differs & (before < starts[run])
