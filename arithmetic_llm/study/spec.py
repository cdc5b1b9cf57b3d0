"""A study as a student writes it: a JSON file, read and checked, and the arms that it spans."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from arithmetic_llm.cli import read_json, shown
from arithmetic_llm.runtime import UserError, checked

README = "see studies/README.md"
EXACT, TRACE, PARSE = MEASURES = ("exact match", "whole trace", "parse")
ROW = re.compile(r"(all|invalid|depth \d+|\d+ terms)(?:: (.+))?")
Settings = dict[str, Any]  # flags of a stage by name, or of an arm by "stage.flag"


class Criterion(NamedTuple):
    """What an arm is judged by: a share of some of the test problems."""

    problems: str  # "all", "depth 4", "7 terms" or "invalid"
    measure: str  # one of `MEASURES`

    def __str__(self) -> str:
        return self.problems if self.measure == EXACT else ": ".join(self)


class Arm(NamedTuple):
    """One choice of settings, to be run with every seed."""

    name: str
    settings: Settings  # by "stage.flag"
    place: dict[str, Any] = {}  # noqa: RUF012  where it lies in the grid: value by flag


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study; the fields are the keys of its file, and their defaults."""

    name: str
    question: str
    base: str = "configs/cpu"
    stages: dict[str, Settings] = field(default_factory=dict)
    arms: dict[str, Settings] = field(default_factory=dict)
    vary: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    seeded: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=lambda: ["all"])
    against: str = ""
    file: str = ""  # where it was read; no key

    @property
    def judged_by(self) -> list[Criterion]:
        """The rows, taken apart."""
        return [_row(text, self.file) for text in self.rows]


FORMS = {
    "name": str,
    "question": str,
    "base": str,
    "stages": dict[str, dict],
    "arms": dict[str, dict],
    "vary": dict[str, object],
    "seeds": list[int],
    "seeded": list[str],
    "rows": list[str],
    "against": str,
}
KEYS = [*FORMS, "quick"]


# ------------------------------------------------------------------------------------- reading


def read_study(file: str, quick: bool = False) -> Study:
    """The study in a file, if ``quick`` with what its key of that name changes.

    Raises:
        UserError: a key that is unknown, missing, or holds what it cannot; one line.
    """
    content = {"name": Path(file).stem, **read_json(file)}
    changes = content.pop("quick", {})
    _check_keys(file, content)
    if not isinstance(changes, dict):
        raise UserError(f"{file}: quick: must be an object with keys of a study; {README}")
    _check_keys(file, changes, "quick: ")
    if not content.get("question"):
        raise UserError(f"{file}: question: is missing; say in a sentence what is to be found out")
    study = Study(**(merged(content, changes) if quick else content), file=file)
    _check_values(study)
    return study


def _check_keys(file: str, content: Mapping[str, Any], place: str = "") -> None:
    """Refuse keys that are none, and values of another form."""
    allowed = [key for key in FORMS if not (place and key == "name")]
    for key, value in content.items():
        if key not in allowed:
            raise UserError(f"{file}: {place}unknown key {key!r}; the keys are {', '.join(KEYS)}")
        try:
            checked(FORMS[key], value, key)
        except ValueError as error:
            raise UserError(f"{file}: {place}{error}; {README}") from None


def _check_values(study: Study) -> None:
    """Refuse what no study can be made of."""
    file, names = study.file, [arm.name for arm in arms_of(study)]
    if not re.fullmatch(r"[\w-]+", study.name):
        raise UserError(f"{file}: name: {study.name!r} names a folder; use letters, digits, _")
    for key, values in (("seeds", study.seeds), ("rows", study.rows)):
        if not values or len({*values}) < len(values):
            raise UserError(f"{file}: {key}: {values}: name at least one, each once")
    if min(study.seeds) < 0:
        raise UserError(f"{file}: seeds: {min(study.seeds)}: must be at least 0")
    for text in study.rows:
        _row(text, file)
    if study.against and study.against not in names:
        there = ", ".join(map(repr, names))
        raise UserError(f"{file}: against: there is no arm {study.against!r}; there are {there}")


def merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A study with changes: settings of its stages one by one, every other key as a whole."""
    stages = {name: dict(settings) for name, settings in content.get("stages", {}).items()}
    for name, settings in changes.get("stages", {}).items():
        stages[name] = {**stages.get(name, {}), **settings}
    return {**content, **changes, "stages": stages}


def _row(text: str, file: str) -> Criterion:
    found = ROW.fullmatch(text)
    measure = found and (found[2] or EXACT)
    if measure not in MEASURES:
        raise UserError(
            f"{file}: rows: {text!r} is none; write all, depth 4, 7 terms or invalid, and behind a "
            f"colon and a space one of {', '.join(MEASURES)}"
        )
    return Criterion(found[1], measure)


# ---------------------------------------------------------------------------------------- arms


def arms_of(study: Study) -> list[Arm]:
    """The arms with a name of their own, then those of the grid; the base itself if there is none.

    Raises:
        UserError: values that are none, or two arms of one name.
    """
    try:
        arms = [Arm(name, settings) for name, settings in study.arms.items()]
        arms += grid(study.vary) if study.vary else []
        arms = arms or [Arm("base", {})]
        for arm in arms:
            for key in arm.settings:
                _require_stage_and_flag(key)
    except ValueError as error:
        raise UserError(f"{study.file}: {error}") from None
    twice = [name for name, count in Counter(arm.name for arm in arms).items() if count > 1]
    if twice:
        raise UserError(f"{study.file}: two arms are called {twice[0]!r}; give one another name")
    return arms


def _require_stage_and_flag(key: str) -> None:
    if not re.fullmatch(r"\w+\.\w+", key):
        raise ValueError(f"{key!r}: write STAGE.FLAG, such as lora.lora_rank")


def grid(vary: Mapping[str, Any]) -> list[Arm]:
    """Every combination of the values of all keys; flags in one key go together.

    Raises:
        ValueError: a key or its values are none.
    """
    axes = [[*_choices(key, spec)] for key, spec in vary.items()]
    return [
        Arm(_name(parts, axes), {k: v for part in parts for k, v in part.items()}, _place(parts))
        for parts in itertools.product(*axes)
    ]


def _choices(key: str, spec: Any) -> Iterator[Settings]:
    """Settings that a key of ``vary`` stands for, one after the other."""
    flags, values = [flag.strip() for flag in key.split(",")], values_of(key, spec)
    for flag in flags:
        _require_stage_and_flag(flag)
    for value in values:
        several = value if len(flags) > 1 else [value]
        if not isinstance(several, list) or len(several) != len(flags):
            raise ValueError(f"vary: {key}: {value!r} needs {len(flags)} values, one for each flag")
        yield dict(zip(flags, several, strict=True))


def values_of(key: str, spec: Any) -> list[Any]:
    """Values of a list, or of a range: from, to, and what to add (step) or multiply by (times)."""
    if isinstance(spec, list) and spec:
        return spec
    keys = {*spec} if isinstance(spec, dict) else set()
    numbers = keys and all(type(value) in (int, float) for value in spec.values())
    if numbers and keys in ({"from", "to", "step"}, {"from", "to", "times"}):
        grows = spec.get("step", 0) > 0 or (spec.get("times", 0) > 1 and spec["from"] > 0)
        if grows and spec["from"] <= spec["to"]:
            return [*_range(**{("start" if k == "from" else k): v for k, v in spec.items()})]
    raise ValueError(
        f"vary: {key}: {spec!r} is neither a list of values nor a range that grows, such as "
        '{"from": 1, "to": 32, "times": 2} or {"from": 0, "to": 0.6, "step": 0.2}'
    )


def _range(start: float, to: float, step: float = 0, times: float = 1) -> Iterator[float]:
    """From start to the last value that is not above ``to``, but for rounding."""
    for i in itertools.count():
        value = start * times**i + step * i
        if value > to + 1e-9 * max(abs(start), abs(to)):
            return
        yield value if isinstance(value, int) else round(value, 12)


def _name(parts: Sequence[Settings], axes: Sequence[Sequence[Settings]]) -> str:
    """``lora_rank 8, attention``: the values, with the flag's name where they are numbers."""
    return ", ".join(
        _words(flag, value)
        for part, axis in zip(parts, axes, strict=True)
        for flag, value in _telling(part, axis).items()
    )


def _telling(part: Settings, axis: Sequence[Settings]) -> Settings:
    """The first flag of those that go together, if it alone tells the values apart."""
    (first, value), *_ = part.items()
    alone = len({shown_value(each[first]) for each in axis}) == len(axis)
    return {first: value} if alone else part


def _words(flag: str, value: Any) -> str:
    short = flag.partition(".")[2]
    in_words = isinstance(value, str) and not value.startswith("{")
    return shown_value(value) if in_words else f"{short} {shown_value(value)}"


def shown_value(value: Any) -> str:
    """A value as it stands on a command line."""
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    return shown(tuple(value)) if isinstance(value, list) else str(value)


def _place(parts: Sequence[Settings]) -> dict[str, Any]:
    """The first flag of each axis with its value; with its stage, if two have the same name."""
    firsts = [next(iter(part.items())) for part in parts]
    shorts = [flag.partition(".")[2] for flag, _ in firsts]
    return {
        short if shorts.count(short) == 1 else flag: value
        for short, (flag, value) in zip(shorts, firsts, strict=True)
    }
