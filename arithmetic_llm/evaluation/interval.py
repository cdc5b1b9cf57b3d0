"""The interval that every share of some problems stands with."""

from __future__ import annotations

from math import sqrt


def wilson_interval(correct: float, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share (JASA 22, 1927), as fractions; 95 % by default.

    Unlike the normal approximation it is right near 0 and 1: 0 of 10 may still be 27.8 %.
    """
    if samples == 0:
        return 0.0, 1.0
    share, spread = correct / samples, z * z / samples
    center = (share + spread / 2) / (1 + spread)
    half = sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)
