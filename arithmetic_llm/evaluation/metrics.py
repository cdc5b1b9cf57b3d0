"""Metrics of an evaluation: what the outcomes of all its problems amount to.

A row of the metrics holds the problems of one exact depth, the flat sums of one number of terms, or
the invalid expressions; no problem is in two of them. Percentages run from 0 to 100 and each
accuracy stands with its 95 % Wilson interval. Nothing here runs a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from arithmetic_llm.corpus.coverage import Coverage, to_dict
from arithmetic_llm.evaluation.interval import wilson_interval
from arithmetic_llm.evaluation.judge import NEAR_TIE, Outcome


def percent(part: float, whole: float) -> float | None:
    """``part`` of ``whole`` in percent; None if there is no whole."""
    return round(100 * part / whole, 4) if whole else None


def accuracy(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Count the correct texts, with the 95 % interval in percent."""
    correct = sum(outcome.correct for outcome in outcomes)
    low, high = wilson_interval(correct, len(outcomes))
    return {
        "samples": len(outcomes),
        "correct": correct,
        "exact_match_accuracy": percent(correct, len(outcomes)),
        "low": round(100 * low, 4),
        "high": round(100 * high, 4),
    }


def quality(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Qualities behind the accuracy: whether texts can be read, steps hold, and where they end.

    ``step_validity_rate`` is the share of all needed steps that were written and right with no
    wrong step before them; None where no step is needed.
    """
    verdicts = [outcome.verdict for outcome in outcomes]
    count = len(outcomes)
    valid, needed = sum(v.valid_steps for v in verdicts), sum(v.needed_steps for v in verdicts)
    return {
        "parse_success_rate": percent(sum(v.parseable for v in verdicts), count),
        "step_validity_rate": percent(valid, needed),
        "exact_trace_rate": percent(sum(v.trace_correct for v in verdicts), count),
        "avg_generation_length": round(sum(o.tokens for o in outcomes) / count, 2)
        if count
        else None,
        "cut_off_rate": percent(sum(o.cut_off for o in outcomes), count),
        "beyond_context": sum(o.beyond_context for o in outcomes),
    }


def evaluation_metrics(outcomes: Sequence[Outcome], trained_on: Coverage | None) -> dict[str, Any]:
    """The content of ``evaluation_metrics_*.json``, but for the settings.

    ``exact_match_accuracy`` speaks of all problems, invalid ones included; ``trained_depths`` of
    those alone whose depth, numbers and style occurred in training.
    """
    overall = accuracy(outcomes)
    verdicts = [outcome.verdict for outcome in outcomes]
    return {
        "exact_match_accuracy": overall["exact_match_accuracy"],
        "low": overall["low"],
        "high": overall["high"],
        "total_samples": overall["samples"],
        "correct_samples": overall["correct"],
        "parseable_samples": sum(verdict.parseable for verdict in verdicts),
        **quality(outcomes),
        "trained_depths": accuracy(_of_trained_depths(outcomes, trained_on)),
        "by_depth": rows(outcomes, "depth", trained_on),
        "by_terms": rows(outcomes, "terms", trained_on),
        "invalid": _invalid_row(outcomes, trained_on),
        "errors": _count(verdict.error for verdict in verdicts),
        "trace_errors": _count(verdict.trace_error for verdict in verdicts),
        "near_ties": _near_ties(outcomes),
    }


def rows(
    outcomes: Sequence[Outcome], kind: str, trained_on: Coverage | None
) -> list[dict[str, Any]]:
    """One dict for each number of a kind of row, ascending; see `Row`.

    ``trained`` is None if the checkpoint does not say what it was trained on.
    """
    groups: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.problem.row.kind == kind:
            groups.setdefault(outcome.problem.row.number, []).append(outcome)
    return [
        {
            kind: number,
            **accuracy(group),
            "trained": all(trained_on.covers(o.problem) for o in group) if trained_on else None,
            **quality(group),
        }
        for number, group in sorted(groups.items())
    ]


def _of_trained_depths(outcomes: Sequence[Outcome], trained_on: Coverage | None) -> list[Outcome]:
    if not trained_on:
        return []
    by_depth = [outcome for outcome in outcomes if outcome.problem.depth is not None]
    return [outcome for outcome in by_depth if trained_on.covers(outcome.problem)]


def _invalid_row(outcomes: Sequence[Outcome], trained_on: Coverage | None) -> dict[str, Any] | None:
    found = rows(outcomes, "invalid", trained_on)
    return {name: value for name, value in found[0].items() if name != "invalid"} if found else None


def _count(errors: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(error for error in errors if error).most_common())


def _near_ties(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    smallest = min((outcome.margin for outcome in outcomes), default=float("inf"))
    return {
        "below": NEAR_TIE,
        "samples": sum(outcome.near_tie for outcome in outcomes),
        "smallest_margin": smallest if isfinite(smallest) else None,
    }


# ------------------------------------------------------------------------------ all of it


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation: what was written for every problem, and all that is needed to repeat it."""

    outcomes: tuple[Outcome, ...]
    trained_on: Coverage | None  # what the checkpoint says of its training; None if nothing
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # spent generating and judging

    @property
    def metrics(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; see `evaluation_metrics`."""
        tokens = sum(outcome.tokens for outcome in self.outcomes)
        return {
            **evaluation_metrics(self.outcomes, self.trained_on),
            "seconds": round(self.seconds, 2),
            "tokens_per_second": round(tokens / max(self.seconds, 1e-9)),
            "trained_on": to_dict(self.trained_on),
            "settings": self.settings,
        }

    @property
    def sample_outputs(self) -> list[dict[str, Any]]:
        """One entry for every problem, in the order of the test."""
        return [outcome.as_dict() for outcome in self.outcomes]
