"""Data of the pictures: what each panel shows, as plain lists, from the JSON files of runs and
evaluations. Nothing here draws, and nothing needs torch.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from arithmetic_llm.cli import read_json
from arithmetic_llm.evaluation.report import named_rows
from arithmetic_llm.folders import METRICS, SETTINGS, read_lines
from arithmetic_llm.runtime import UserError, checked, reason

TOKENS, MINUTES, STEPS = "tokens (millions, padding included)", "minutes", "optimizer steps"
# Settings that decide no figure of a run but where it lies, beside the seed.
BESIDE_THE_POINT = {"seed", "output_dir", "resume"}
LIMIT = "max_gen_length"  # GRPO measures it on prompts of the seed, so that it differs a little
SLACK = 1.1


class Quantity(NamedTuple):
    """What a panel of training runs shows."""

    title: str
    unit: str
    names: str  # pattern of the figures' names in metrics.jsonl; each match is a part
    against_time: bool = False  # against tokens and against minutes, and not against steps
    log: bool = False
    factor: float = 1.0  # from the figure to the unit


QUANTITIES = (
    Quantity("training loss (GRPO: surrogate)", "nats a token", "loss", True, log=True),
    Quantity("held-out loss", "nats a token", "eval_loss", True, log=True),
    Quantity("held-out exact match", "% of problems", "eval_exact", True, factor=100),
    Quantity("held-out reward", "reward a completion", "eval_reward", True),
    Quantity("learning rate", "rate", "learning_rate|muon_learning_rate"),
    Quantity("gradient before clipping", "L2 norm", "grad_norm", log=True),
    Quantity("reward by part", "reward a completion", "reward|rewards/.+"),
    Quantity("right attempts", "% of attempts", "accuracy", factor=100),
    Quantity("dead groups", "% of groups", "frac_reward_zero_std", factor=100),
    Quantity("length of attempts", "tokens", "completions/mean_length"),
    Quantity("attempts cut off", "% of attempts", "completions/clipped_ratio", factor=100),
    Quantity("entropy", "nats a token", "entropy"),
    Quantity("KL divergence to the start", "nats a token", "kl"),
    Quantity(
        "held-out exact match by depth",
        "% of problems",
        r"eval_exact_(depth_\d+|terms_\d+|invalid)",
        factor=100,
    ),
)


class Line(NamedTuple):
    """A line of a panel; ``low`` to ``high`` is its band, ``y`` itself if there is none."""

    group: int  # index of the runs it comes from
    part: str  # what of them it shows, if the panel shows several parts
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


class Panel(NamedTuple):
    """One pair of axes with its lines."""

    title: str
    x_label: str
    y_label: str
    log: bool
    lines: list[Line]

    @property
    def parts(self) -> list[str]:
        """Parts that it shows, in order."""
        return list(dict.fromkeys(line.part for line in self.lines))


# -------------------------------------------------------------------------------- training runs


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder has it."""

    name: str
    settings: dict[str, Any]  # of the run and the model; empty if the folder has none
    lines: list[dict[str, Any]]  # of metrics.jsonl

    @property
    def has_time(self) -> bool:
        """Whether every line of training tells its seconds."""
        return all(seconds_of(line) is not None for line in self.lines if "loss" in line)


def read_run(folder: str) -> RunRecord:
    """The run in a folder.

    Raises:
        UserError: there is none, or its metrics.jsonl holds no line of a run.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; name one that holds {METRICS}")
    if not (path / METRICS).is_file():
        raise UserError(f"{path}: is no run folder, it has no {METRICS}")
    lines = [line for line in read_lines(path / METRICS) if _is_of_a_run(line)]
    if not lines:
        raise UserError(f"{path / METRICS}: no line of a run in it (yet); let the run go on first")
    files = [path / file for file in SETTINGS.values()]
    settings = [read_json(file) for file in files if file.is_file()]
    return RunRecord(str(path), {k: v for each in settings for k, v in each.items()}, lines)


def _is_of_a_run(line: dict[str, Any]) -> bool:
    told = [number(line.get(name)) for name in ("loss", "eval_exact")]
    return 0 <= line["step"] < 2**53 and told != [None, None]  # as a float, a step is exact


def grouped(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The runs in order, those together that differ in nothing but the seed."""
    groups: list[list[RunRecord]] = []
    for run in runs:
        group = next((group for group in groups if _is_another_seed(run, group)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def _is_another_seed(run: RunRecord, group: Sequence[RunRecord]) -> bool:
    seeds = [other.settings.get("seed") for other in group]
    alike = bool(run.settings) and _recipe(run) == _recipe(group[0])
    return alike and _is_near(run, group[0]) and run.settings.get("seed") not in seeds


def _recipe(run: RunRecord) -> dict[str, Any]:
    return {k: v for k, v in run.settings.items() if k not in BESIDE_THE_POINT | {LIMIT}}


def _is_near(run: RunRecord, other: RunRecord) -> bool:
    """Whether both have about the same length limit, or none."""
    low, high = sorted(number(each.settings.get(LIMIT)) or 0.0 for each in (run, other))
    return high <= SLACK * low


def group_names(groups: Sequence[Sequence[RunRecord]]) -> list[str]:
    """A name for each group: its first run's, and the seeds if there are several."""
    names = short_names([group[0].name for group in groups])
    return [
        name if len(group) == 1 else f"{name} and others: seeds {_seeds(group)} (mean, min to max)"
        for name, group in zip(names, groups, strict=True)
    ]


def _seeds(group: Sequence[RunRecord]) -> str:
    return ", ".join(str(run.settings.get("seed")) for run in group)


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or all of it where that part is another's, too."""
    count = Counter(Path(path).name for path in paths)
    return [Path(path).name if count[Path(path).name] == 1 else path for path in paths]


# ---- how far a run was at a step


def number(value: Any) -> float | None:
    """The value, if it is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def seconds_of(line: dict[str, Any]) -> float | None:
    """Seconds a step: ``seconds``, or the parts that older GRPO runs tell, without validation."""
    if "seconds" in line:
        return number(line["seconds"])
    parts = [number(line.get(f"seconds_{part}")) for part in ("generating", "training")]
    return None if None in parts else sum(parts)


class Clock(NamedTuple):
    """How far a run was at each line of its training: steps, and the tokens and minutes till then.

    A line tells of the steps since the line before, in means: ``seconds`` a step, validations
    included, and ``tokens_per_second``. So minutes add up ``steps * seconds / 60``, and tokens
    ``steps * seconds * tokens_per_second``. Steps that no line tells of (a resumed run lost it)
    count as those of the next line; between two lines both grow evenly.
    """

    steps: list[float]
    tokens: list[float]  # millions
    minutes: list[float]

    def at(self, step: float, column: str) -> float:
        """``tokens`` or ``minutes`` at a step."""
        values = getattr(self, column)
        i = bisect_left(self.steps, step)
        if i == len(self.steps):
            return values[-1]
        if self.steps[i] == step:
            return values[i]
        share = (step - self.steps[i - 1]) / (self.steps[i] - self.steps[i - 1])
        return values[i - 1] + share * (values[i] - values[i - 1])


def clock_of(run: RunRecord) -> Clock:
    """Tokens and minutes of a run that tells its seconds."""
    clock = Clock([0.0], [0.0], [0.0])
    for line in sorted((x for x in run.lines if "loss" in x), key=lambda x: x["step"]):
        seconds = (line["step"] - clock.steps[-1]) * seconds_of(line)
        speed = number(line.get("tokens_per_second")) or 0.0
        clock.tokens.append(clock.tokens[-1] + seconds * speed / 1e6)
        clock.minutes.append(clock.minutes[-1] + seconds / 60)
        clock.steps.append(line["step"])
    return clock


# ---- panels


def run_panels(groups: Sequence[Sequence[RunRecord]]) -> list[Panel]:
    """Every panel that has something to show.

    What is shown against tokens and minutes is shown against steps if a run does not tell its
    seconds, so that all runs can be compared.

    Raises:
        UserError: there is none.
    """
    timed = all(run.has_time for group in groups for run in group)
    found = [
        _panel(quantity, axis, groups)
        for quantity in QUANTITIES
        for axis in ((TOKENS, MINUTES) if quantity.against_time and timed else (STEPS,))
    ]
    if not any(panel.lines for panel in found):
        raise UserError("nothing to draw: runs of several seeds have no step in common")
    return [panel for panel in found if panel.lines]


def _panel(quantity: Quantity, axis: str, groups: Sequence[Sequence[RunRecord]]) -> Panel:
    lines = [
        line
        for index, group in enumerate(groups)
        for name in _names(quantity, group)
        if (line := _line(index, name, group, axis, quantity.factor)).x
    ]
    log = quantity.log and all(value > 0 for line in lines for value in line.low)
    return Panel(quantity.title, axis, quantity.unit, log, lines)


def _names(quantity: Quantity, group: Sequence[RunRecord]) -> list[str]:
    """Figures of a group that a quantity is made of, as they first occur."""
    names = dict.fromkeys(name for run in group for line in run.lines for name in line)
    return [name for name in names if re.fullmatch(quantity.names, name)]


def _line(index: int, name: str, group: Sequence[RunRecord], axis: str, factor: float) -> Line:
    """Mean of a figure over the runs of a group, from the least to the greatest.

    Only steps that all of them tell are shown: else the mean would jump where one ends.
    """
    curves = [_curve(run, name, axis) for run in group]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    points = [[curve[step] for curve in curves] for step in steps]
    ys = [[factor * y for _, y in of_runs] for of_runs in points]
    x = [fmean(x for x, _ in of_runs) for of_runs in points]
    part = re.sub("^rewards/|^eval_exact_", "", name).replace("_", " ")
    return Line(index, part, x, [*map(fmean, ys)], [*map(min, ys)], [*map(max, ys)])


def _curve(run: RunRecord, name: str, axis: str) -> dict[int, tuple[float, float]]:
    """x and y of a figure by the step."""
    place = _places(run, axis)
    values = [(line["step"], number(line.get(name))) for line in run.lines]
    return {step: (place(step), y) for step, y in values if y is not None}


def _places(run: RunRecord, axis: str) -> Callable[[int], float]:
    """Where on an axis a step of a run lies."""
    if axis == STEPS:
        return float
    clock = clock_of(run)
    return lambda step: clock.at(step, "tokens" if axis == TOKENS else "minutes")


# ---------------------------------------------------------------------------------- evaluations


class Point(NamedTuple):
    """Accuracy in a row of an evaluation, in percent, with its 95 % interval."""

    row: int  # index of the row's name
    rate: float
    low: float
    high: float
    trained: bool  # False: never solved in training; what is not known counts as trained


class Accuracies(NamedTuple):
    """Names of the rows of all evaluations, and the points of each evaluation."""

    rows: list[str]
    points: list[list[Point]]


class ErrorShares(NamedTuple):
    """Kinds of errors, and of each evaluation the share of each kind in percent of its problems."""

    kinds: list[str]
    shares: list[list[float]]


class EvaluationRecord(NamedTuple):
    """An evaluation as its file has it."""

    name: str
    metrics: dict[str, Any]


_ROW = {"exact_match_accuracy": float, "low": float, "high": float}


def read_evaluation(file: str) -> EvaluationRecord:
    """The evaluation in a file, by the name of its model.

    Raises:
        UserError: the file is missing, damaged, or of another kind.
    """
    metrics = read_json(file)
    try:
        checked(int, metrics["total_samples"], "total_samples")
        checked(dict[str, int], metrics["errors"], "errors")
        for kind in ("by_depth", "by_terms"):
            checked(list[dict], metrics[kind], kind)
        for name, row in named_rows(metrics):
            for key, form in _ROW.items():
                checked(form, row[key], f"{key} of {name}")
        settings = checked(dict, metrics["settings"], "settings")
        model = checked(str, settings.get("model_path", Path(file).stem), "model_path")
    except (KeyError, TypeError, ValueError) as error:
        why = reason(error)
        raise UserError(f"{file}: no evaluation_metrics_*.json of an evaluation ({why})") from None
    return EvaluationRecord("/".join(Path(model).parts[-2:]), metrics)


def evaluation_names(evaluations: Sequence[EvaluationRecord], files: Sequence[str]) -> list[str]:
    """The model of each evaluation, with its file where one model was evaluated twice."""
    count = Counter(evaluation.name for evaluation in evaluations)
    return [
        evaluation.name if count[evaluation.name] == 1 else f"{evaluation.name} ({file})"
        for evaluation, file in zip(evaluations, short_names(files), strict=True)
    ]


def accuracies(evaluations: Sequence[EvaluationRecord]) -> Accuracies:
    """Accuracy by row: exact depths, then numbers of terms, then invalid expressions."""
    tables = [dict(_plain_rows(evaluation.metrics)) for evaluation in evaluations]
    names = sorted({name for table in tables for name in table}, key=_place_of_row)
    return Accuracies(
        names,
        [
            [_point(names.index(name), table[name]) for name in names if name in table]
            for table in tables
        ],
    )


def _plain_rows(metrics: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows by their names without a star: another model may have seen them."""
    return ((name.removesuffix(" *"), row) for name, row in named_rows(metrics))


def _place_of_row(name: str) -> tuple[int, int]:
    """``depth 3`` before ``depth 10``, then ``7 terms``, then ``invalid``."""
    digits = re.search(r"\d+", name)
    kind = 0 if name.startswith("depth") else 1 if digits else 2
    return kind, int(digits[0]) if digits else 0


def _point(index: int, row: dict[str, Any]) -> Point:
    trained = row["trained"] is not False
    return Point(index, row["exact_match_accuracy"], row["low"], row["high"], trained)


def error_shares(evaluations: Sequence[EvaluationRecord]) -> ErrorShares:
    """Errors by kind, the kind that is most frequent in all together first."""
    total: Counter[str] = Counter()
    for evaluation in evaluations:
        total.update(evaluation.metrics["errors"])
    kinds = [kind for kind, _ in total.most_common()]
    return ErrorShares(
        kinds,
        [
            [
                100
                * evaluation.metrics["errors"].get(kind, 0)
                / max(evaluation.metrics["total_samples"], 1)
                for kind in kinds
            ]
            for evaluation in evaluations
        ],
    )
