"""What the arms have reached, problem by problem, and whether they can be told apart."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from arithmetic_llm.evaluation.interval import wilson_interval
from arithmetic_llm.runtime import UserError, require_file
from arithmetic_llm.study.plan import Trial
from arithmetic_llm.study.spec import EXACT, TRACE, Arm, Criterion, Study
from arithmetic_llm.study.stages import Stage
from arithmetic_llm.study.statistics import (
    CONFIDENCE,
    Spread,
    difference_interval,
    fisher,
    holm,
    hull,
    mcnemar,
    paired_interval,
    paired_p,
    pooled_spread,
    student_interval,
    student_p,
)

Interval = tuple[float, float]  # as fractions
BETTER, WORSE, ALIKE, SAME = "better", "worse", "cannot be told apart", "the same runs"


# ------------------------------------------------------------------------------- one evaluation


class Solved(NamedTuple):
    """Some problems of one evaluation, and which of them a measure counts as right."""

    problems: list[str]
    right: list[bool]

    @property
    def count(self) -> int:
        return sum(self.right)

    @property
    def share(self) -> float:
        """The fraction that is right."""
        return self.count / len(self.right)

    @property
    def interval(self) -> Interval:
        """Wilson's, which is about the problems alone."""
        return wilson_interval(self.count, len(self.right))


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation, read from its folder."""

    seed: int
    stage: Stage

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """One for every problem, as ``sample_outputs_*.json`` has it."""
        metrics = Path(self.stage.product)
        name = metrics.name.replace("evaluation_metrics", "sample_outputs")
        path = require_file(metrics.with_name(name), "sample outputs")
        return json.loads(path.read_text(encoding="utf-8"))

    @cached_property
    def rows(self) -> list[str]:
        """The problems' rows, depths ascending."""
        found = {row_of(entry) for entry in self.entries}
        return sorted(found, key=lambda row: (not row.startswith("depth"), len(row), row))

    def marks(self, row: Criterion) -> Solved:
        """The problems of a row.

        Raises:
            UserError: there is none.
        """
        chosen = [e for e in self.entries if row.problems in ("all", row_of(e))]
        if not chosen:
            there = ", ".join(["all", *self.rows])
            raise UserError(f"rows: the test has no {row.problems}; it has {there}")
        return Solved([e["expression"] for e in chosen], [is_right(e, row.measure) for e in chosen])


def row_of(entry: dict[str, Any]) -> str:
    """The row of a problem, as the evaluation's report names it."""
    if entry["ground_truth"] == "ERROR":
        return "invalid"
    return f"{entry['terms']} terms" if entry["depth"] is None else f"depth {entry['depth']}"


def is_right(entry: dict[str, Any], measure: str) -> bool:
    """Whether a measure counts a problem."""
    if measure == EXACT:
        return entry["correct"]
    return entry["trace_error"] is None if measure == TRACE else entry["predicted"] is not None


# ---------------------------------------------------------------------------------------- an arm


@dataclass(frozen=True)
class Reached:
    """What an arm has reached with the seeds that were finished."""

    arm: Arm
    runs: list[Evaluated]

    @property
    def models(self) -> list[Evaluated]:
        """The runs, those of one and the same stage once: they are one model."""
        return list({run.stage.hash: run for run in self.runs}.values())

    def shares(self, row: Criterion) -> list[float]:
        """What each model reaches."""
        return [run.marks(row).share for run in self.models]

    def mean(self, row: Criterion) -> float:
        return fmean(self.shares(row))

    def tests(self, row: Criterion) -> set[tuple[str, ...]]:
        """The problems that its models were tested on: one test, unless each had another."""
        return {tuple(model.marks(row).problems) for model in self.models}

    def by_problem(self, row: Criterion) -> list[float]:
        """Of each problem, the share of the models that solve it."""
        rights = [model.marks(row).right for model in self.models]
        return [fmean(solved) for solved in zip(*rights, strict=True)]

    def interval(self, row: Criterion, spread: Spread | None) -> Interval:
        """Around the mean: other problems would leave it in there, and so would other seeds.

        Args:
            spread: how models vary from seed to seed; a single model does not.
        """
        ends = wilson_interval(*averaged(self, row))
        if spread and len(self.models) > 1:
            error = spread.error(len(self.models))
            ends = hull(ends, student_interval(self.mean(row), error, spread.freedom))
        return max(0.0, ends[0]), min(1.0, ends[1])


def averaged(arm: Reached, row: Criterion) -> tuple[float, int]:
    """How many problems the models of an arm solve on average, and of how many."""
    count = round(fmean(len(model.marks(row).right) for model in arm.models))
    return arm.mean(row) * count, count


# ------------------------------------------------------------------------------------ two arms


class Difference(NamedTuple):
    """An arm beside the one it is compared with, in one row."""

    arm: Arm
    mean: float  # of the models, as a fraction
    low: float
    high: float
    models: tuple[int, int]  # of the arm, and of the other
    better: int | None  # problems that more models solve; None if the problems, or the numbers
    worse: int | None  # of models, differ
    p: float  # by itself
    adjusted: float = 1.0  # among all arms of the row

    @property
    def verdict(self) -> str:
        if not any(self.models):
            return SAME
        if self.adjusted > 1 - CONFIDENCE:
            return ALIKE
        return BETTER if self.mean > 0 else WORSE


def spread_of(arms: Sequence[Reached], row: Criterion, of: Reached) -> Spread | None:
    """How models vary from seed to seed, by all arms that were tested on the same problems as one.

    What is hard varies by many points and what is easy by a tenth of one, so arms with another
    test say nothing here. None if none of these has several models.
    """
    return pooled_spread(arm.shares(row) for arm in arms if arm.tests(row) == of.tests(row))


def differences(arms: Sequence[Reached], against: Reached, row: Criterion) -> list[Difference]:
    """Every arm beside one of them; p-values hold for the row as a whole."""
    spread = spread_of(arms, row, against)
    found = [
        difference(arm, against, row, (spread_of(arms, row, arm), spread))
        for arm in arms
        if arm is not against
    ]
    adjusted = iter(holm([each.p for each in found if any(each.models)]))
    return [each._replace(adjusted=next(adjusted)) if any(each.models) else each for each in found]


def difference(
    arm: Reached, other: Reached, row: Criterion, spreads: tuple[Spread | None, Spread | None]
) -> Difference:
    """Two arms.

    They are told apart if chance is ruled out twice: that other seeds would turn it round, and
    that other problems would. Of two single models only the latter can be said.

    Args:
        spreads: how models of the arm vary from seed to seed, and models of the other.
    """
    if {m.stage.hash for m in arm.models} == {m.stage.hash for m in other.models}:
        return Difference(arm.arm, 0.0, 0.0, 0.0, (0, 0), None, None, 1.0)
    mean, models = arm.mean(row) - other.mean(row), (len(arm.models), len(other.models))
    p, ends, *better_worse = by_problems(arm, other, row, models)
    several = [(s, n) for s, n in zip(spreads, models, strict=True) if s and n > 1]
    if several:
        error = math.hypot(*(spread.error(count) for spread, count in several))
        freedom = min(spread.freedom for spread, _ in several)
        p = max(p, student_p(mean, error, freedom))
        ends = hull(ends, student_interval(mean, error, freedom))
    low, high = max(-1.0, ends[0]), min(1.0, ends[1])
    return Difference(arm.arm, mean, low, high, models, *better_worse, p)


def by_problems(
    arm: Reached, other: Reached, row: Criterion, models: tuple[int, int]
) -> tuple[float, Interval, int | None, int | None]:
    """What other problems would do: p, the interval, and how many are solved better and worse."""
    if len(arm.tests(row) | other.tests(row)) > 1:
        return unshared_p(arm, other, row), unshared_interval(arm, other, row), None, None
    pairs = zip(arm.by_problem(row), other.by_problem(row), strict=True)
    found = [share - other_share for share, other_share in pairs]
    p, ends, (better, worse) = paired_p(found), paired_interval(found), split(found)
    if models == (1, 1):
        p = mcnemar(better, worse)
    return p, ends, *((better, worse) if models[0] == models[1] else (None, None))


def split(differences: Sequence[float]) -> tuple[int, int]:
    """How many differences are above 0, and how many below."""
    return sum(d > 1e-9 for d in differences), sum(d < -1e-9 for d in differences)


def unshared_p(arm: Reached, other: Reached, row: Criterion) -> float:
    """Fisher's test of what is solved on average: several models see no more problems than one."""
    (right, of), (other_right, of_other) = averaged(arm, row), averaged(other, row)
    return fisher(round(right), of, round(other_right), of_other)


def unshared_interval(arm: Reached, other: Reached, row: Criterion) -> Interval:
    """Newcombe's interval of what is solved on average."""
    sides = [averaged(each, row) for each in (arm, other)]
    return difference_interval(*((right / of, *wilson_interval(right, of)) for right, of in sides))


# --------------------------------------------------------------------------------- the whole study


@dataclass(frozen=True)
class Results:
    """All that is finished of a study."""

    study: Study
    arms: list[Reached]
    failed: list[str]  # what did not finish: "arm, seed N"

    @property
    def against(self) -> Reached | None:
        """The arm that the others are compared with: the first, unless the study names one."""
        name = self.study.against
        return next((arm for arm in self.arms if name in ("", arm.arm.name)), None)

    def interval(self, arm: Reached, row: Criterion) -> Interval:
        """Around an arm's mean; see `Reached`."""
        return arm.interval(row, spread_of(self.arms, row, arm))

    def compared(self, row: Criterion) -> list[Difference]:
        """Every other arm beside that one."""
        return differences(self.arms, self.against, row) if self.against else []


def results_of(study: Study, trials: Sequence[Trial]) -> Results:
    """What is finished of the trials.

    Raises:
        UserError: a row that the test does not have.
    """
    arms: dict[str, Reached] = {}
    for trial in trials:
        if trial.evaluation.done:
            reached = arms.setdefault(trial.arm.name, Reached(trial.arm, []))
            reached.runs.append(Evaluated(trial.seed, trial.evaluation))
    missing = [f"{t.arm.name}, seed {t.seed}" for t in trials if not t.evaluation.done]
    results = Results(study, list(arms.values()), missing)
    for row in study.judged_by:
        for arm in results.arms:
            try:
                arm.shares(row)
            except UserError as error:
                raise UserError(f"{study.file}: {error}") from None
    return results
