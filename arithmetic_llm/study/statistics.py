"""Statistics of differences between arms: what chance alone would do, exactly where it can be said.

Shares are fractions. Every p-value is two-sided; intervals are at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from statistics import variance
from typing import NamedTuple

CONFIDENCE = 0.95


# --------------------------------------------------------------------------------- seeds as units


def t_tail(t: float, freedom: int) -> float:
    """The chance that Student's t is further from 0 than ``t``, for whole degrees of freedom.

    Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if freedom == 1:
        total = 0.0
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)


@cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """How far from 0 Student's t is in all but 5 % of cases."""
    return bisected(lambda t: t_tail(t, freedom) - (1 - confidence), 0.0, 1e6)


def hull(*intervals: tuple[float, float]) -> tuple[float, float]:
    """The least interval that holds all of them."""
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def bisected(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses 0."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


class Spread(NamedTuple):
    """How much the models of an arm vary from seed to seed."""

    deviation: float
    freedom: int  # degrees of freedom that it is known with

    def error(self, count: int) -> float:
        """Standard error of a mean of so many models."""
        return self.deviation / math.sqrt(count)


def pooled_spread(groups: Iterable[Sequence[float]]) -> Spread | None:
    """The spread within all groups together, as if each varied alike; None if none has two values.

    The few seeds of a single group hardly show how they vary; those of all of them do.
    """
    several = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    if not freedom:
        return None
    squares = sum((len(group) - 1) * variance(group) for group in several)
    return Spread(math.sqrt(squares / freedom), freedom)


def student_interval(center: float, error: float, freedom: int) -> tuple[float, float]:
    """Student's interval around a mean or a difference of means."""
    half = t_quantile(freedom) * error
    return center - half, center + half


def student_p(center: float, error: float, freedom: int) -> float:
    """Student's test of a mean or a difference of means against 0."""
    if error == 0:
        return 1.0 if center == 0 else 0.0
    return t_tail(center / error, freedom)


# ----------------------------------------------------------------------------- problems as units


def mcnemar(better: int, worse: int) -> float:
    """McNemar's exact test: of the problems that tell two models apart, how many went each way.

    The chance of a split at least as uneven if each of them went either way like a coin.
    """
    count, least = better + worse, min(better, worse)
    tail = sum(math.comb(count, k) for k in range(least + 1)) / 2**count
    return min(1.0, 2 * tail)


def fisher(right: int, of: int, other_right: int, of_other: int) -> float:
    """Fisher's exact test of two shares of different problems.

    The chance of a table no likelier than this one, given its margins.
    """
    total, successes = of + of_other, right + other_right
    least = max(0, successes - of_other)
    ways, counts = math.comb(of, least) * math.comb(of_other, successes - least), []
    for k in range(least, min(of, successes) + 1):  # each from the one before: binomials are slow
        counts.append(ways)
        ways = ways * (of - k) * (successes - k) // ((k + 1) * (of_other - successes + k + 1))
    limit = counts[right - least]
    return sum(count for count in counts if count <= limit) / math.comb(total, successes)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values for all of several tests together (Holm, 1979), in the order given."""
    adjusted, worst = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = worst
    return adjusted


def difference_interval(
    share: tuple[float, float, float], other: tuple[float, float, float]
) -> tuple[float, float]:
    """Newcombe's interval for the difference of two shares of different problems (1998, method 10).

    Args:
        share: the share with the bounds of its Wilson interval; so ``other``.
    """
    (p, low, high), (q, other_low, other_high) = share, other
    below = math.hypot(p - low, other_high - q)
    above = math.hypot(high - p, q - other_low)
    return p - q - below, p - q + above


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Interval for the difference of two shares of the same problems.

    Agresti and Min's (2005): Wald's with half a problem more for each way that two models can solve
    it or not, so that no difference among a few problems is not taken for none at all.

    Args:
        differences: of each problem, 1 if only the first solves it, -1 if only the second, else 0;
            of several pairs of models, their mean.
    """
    mean, error = _paired_mean(differences)
    half = normal_quantile() * error
    return mean - half, mean + half


def paired_p(differences: Sequence[float]) -> float:
    """Test of the same difference against 0, which agrees with `paired_interval`.

    Used where a side has several models. McNemar's count will not do there: with one model beside
    three, most problems favour one side by chance alone.
    """
    mean, error = _paired_mean(differences)
    return math.erfc(abs(mean) / error / math.sqrt(2))


def _paired_mean(differences: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, with two problems more; see `paired_interval`."""
    count = len(differences) + 2
    mean = sum(differences) / count
    return mean, math.sqrt(((sum(d * d for d in differences) + 1) / count - mean**2) / count)


def normal_quantile(confidence: float = CONFIDENCE) -> float:
    """How far from 0 a standard normal value is in all but 5 % of cases."""
    return bisected(lambda z: math.erfc(z / math.sqrt(2)) - (1 - confidence), 0.0, 40.0)
