"""What a completion is worth: named, pure functions, to be weighted and added up.

To add one, write a function from `Attempt` to a number and register it:

    @reward("short")
    def short(attempt):
        return float(attempt.tokens < 100)

Then ``--rewards correct=1,short=0.1`` uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.verifier import Verdict


@dataclass(frozen=True)
class Attempt:
    """One completion as rewards see it; they know nothing of the policy."""

    verdict: Verdict
    tokens: int  # written, <eos> included
    max_tokens: int  # the length limit
    cut_off: bool  # it ended there


Reward = Callable[[Attempt], float]
REWARDS: dict[str, Reward] = {}


def reward(name: str) -> Callable[[Reward], Reward]:
    """Register a reward under the name that ``--rewards`` knows it by."""

    def register(function: Reward) -> Reward:
        REWARDS[name] = function
        return function

    return register


@reward("correct")
def correct(attempt: Attempt) -> float:
    """1 if the text ends with one final result, the right one; nothing if it was cut off."""
    return float(attempt.verdict.correct)


@reward("step_validity")
def step_validity(attempt: Attempt) -> float:
    """Share of the needed steps that are right before the first wrong one.

    Only the verified prefix counts, and no step is right where none is needed any more: a reward
    per step written is won by writing steps.
    """
    verdict = attempt.verdict
    if not verdict.needed_steps:
        return float(verdict.trace_correct)
    return verdict.valid_steps / verdict.needed_steps


@reward("format")
def format_(attempt: Attempt) -> float:
    """1 if the text ended by itself, with one final result, right or wrong."""
    return float(attempt.verdict.parseable)


@reward("length")
def length(attempt: Attempt) -> float:
    """0 for no text, down to -1 at the length limit."""
    return -attempt.tokens / attempt.max_tokens


def parse_rewards(spec: str) -> dict[str, float]:
    """``correct=1,format=0.1`` -> weights by name; a bare name weighs 1.

    Raises:
        UserError: an unknown name, one that comes twice, a weight that is no finite number, or no
            reward at all.
    """
    weights = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, _, number = part.partition("=")
        if name not in REWARDS:
            raise UserError(f"--rewards: no reward {name!r}; there are {', '.join(REWARDS)}")
        if name in weights:
            raise UserError(f"--rewards: {name!r} stands there twice; leave one out")
        weights[name] = _weight(name, number)
    if not weights:
        raise UserError(f"--rewards is empty; choose from {', '.join(REWARDS)}")
    return weights


def _weight(name: str, number: str) -> float:
    try:
        weight = float(number or 1)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--rewards: {number!r} is no weight for {name}")
    return weight


def score(attempt: Attempt, weights: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The weighted sum, and each reward before its weight."""
    parts = {name: REWARDS[name](attempt) for name in weights}
    return sum(weights[name] * value for name, value in parts.items()), parts
