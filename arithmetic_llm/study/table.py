"""What the arms have reached, problem by problem, and whether they can be told apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from arithmetic_llm.evaluation.interval import wilson_interval
from arithmetic_llm.runtime import UserError, require_file
from arithmetic_llm.study.spec import EXACT, TRACE, Arm, Criterion, Study
from arithmetic_llm.study.stages import Stage, Trial
from arithmetic_llm.study.statistics import (
    CONFIDENCE,
    difference_interval,
    fisher,
    holm,
    hull,
    mcnemar,
    mean_interval,
    paired_interval,
    seeds_p,
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
    return entry["trace_error"] is None if measure == TRACE else entry["error"] not in NO_RESULT


NO_RESULT = ("unparseable", "cut_off")  # kinds of errors of a text without a result


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

    def interval(self, row: Criterion) -> Interval:
        """Around the mean: other problems would leave it in there, and so would other seeds.

        The seeds of a single model say nothing of how models vary.
        """
        count = len(self.models[0].marks(row).right)
        of_problems = wilson_interval(self.mean(row) * count, count)
        if len(self.models) == 1:
            return of_problems
        low, high = hull(of_problems, mean_interval(self.shares(row)))
        return max(0.0, low), min(1.0, high)


# ------------------------------------------------------------------------------------ two arms


class Difference(NamedTuple):
    """An arm beside the one it is compared with, in one row."""

    arm: Arm
    mean: float  # of the seeds, as a fraction
    low: float
    high: float
    units: int  # pairs of models: seeds, where the arms do not share theirs
    better: int | None  # problems that more seeds solve; None if the problems are not the same
    worse: int | None
    p: float  # by itself
    adjusted: float = 1.0  # among all arms of the row

    @property
    def verdict(self) -> str:
        if not self.units:
            return SAME
        if self.adjusted > 1 - CONFIDENCE:
            return ALIKE
        return BETTER if self.mean > 0 else WORSE


def differences(arms: Sequence[Reached], against: Reached, row: Criterion) -> list[Difference]:
    """Every arm beside one of them; p-values hold for the row as a whole."""
    found = [difference(arm, against, row) for arm in arms if arm is not against]
    found = [each for each in found if each]
    adjusted = holm([each.p for each in found if each.units])
    of_real = iter(adjusted)
    return [each._replace(adjusted=next(of_real)) if each.units else each for each in found]


def difference(arm: Reached, other: Reached, row: Criterion) -> Difference | None:
    """Two arms by the seeds that both have; None if there is none.

    They are told apart if chance is ruled out twice: that other seeds would turn it round, and
    that other problems would. With one pair of models only the latter can be looked at.
    """
    pairs = pairs_of(arm, other)
    if not pairs:
        return None
    pairs = [(a, b) for a, b in pairs if a.stage.hash != b.stage.hash]
    if not pairs:
        return Difference(arm.arm, 0.0, 0.0, 0.0, 0, None, None, 1.0)
    marks = [(a.marks(row), b.marks(row)) for a, b in pairs]
    by_seed = [a.share - b.share for a, b in marks]
    by_problem = problem_differences(marks)
    better, worse = (None, None) if by_problem is None else split(by_problem)
    p = unshared_p(marks) if by_problem is None else mcnemar(better, worse)
    ends = unshared_interval(marks) if by_problem is None else paired_interval(by_problem)
    if len(pairs) > 1:
        p, ends = max(p, seeds_p(by_seed)), hull(ends, mean_interval(by_seed))
    return Difference(arm.arm, fmean(by_seed), *ends, len(pairs), better, worse, p)


def pairs_of(arm: Reached, other: Reached) -> list[tuple[Evaluated, Evaluated]]:
    """Runs of the same seed; a pair of models that several seeds share counts once."""
    by_seed = {run.seed: run for run in other.runs}
    found = [(run, by_seed[run.seed]) for run in arm.runs if run.seed in by_seed]
    return list({(a.stage.hash, b.stage.hash): (a, b) for a, b in found}.values())


def problem_differences(marks: Sequence[tuple[Solved, Solved]]) -> list[float] | None:
    """Of each problem, the share of pairs in which only the first model solves it, less that of
    the second; None if not all were tested on the same problems.
    """
    if any(each.problems != marks[0][0].problems for pair in marks for each in pair):
        return None
    by_pair = [[x - y for x, y in zip(a.right, b.right, strict=True)] for a, b in marks]
    return [fmean(of_pairs) for of_pairs in zip(*by_pair, strict=True)]


def split(differences: Sequence[float]) -> tuple[int, int]:
    """How many differences are above 0, and how many below."""
    return sum(d > 0 for d in differences), sum(d < 0 for d in differences)


def averaged(marks: Sequence[tuple[Solved, Solved]]) -> list[tuple[float, int]]:
    """Of either side, how many problems its models solve on average, and of how many."""
    return [
        (fmean(each.count for each in side), round(fmean(len(each.right) for each in side)))
        for side in zip(*marks, strict=True)
    ]


def unshared_p(marks: Sequence[tuple[Solved, Solved]]) -> float:
    """Fisher's test of what is solved on average: several models see no more problems than one."""
    (right, of), (other, of_other) = averaged(marks)
    return fisher(min(of, round(right)), of, min(of_other, round(other)), of_other)


def unshared_interval(marks: Sequence[tuple[Solved, Solved]]) -> Interval:
    """Newcombe's interval of what is solved on average."""
    shares = [(right / of, *wilson_interval(right, of)) for right, of in averaged(marks)]
    return difference_interval(*shares)


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
