"""From a study's file to the stages of each arm and seed, all commands checked beforehand."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

from arithmetic_llm.cli import flag_of, parse_many, read_json
from arithmetic_llm.folders import FINISHED, SETTINGS, resolve_stamp
from arithmetic_llm.runtime import UserError, require_file, sha256_file
from arithmetic_llm.study.kinds import KINDS, ROOT, STAGE_OF, TRAINED
from arithmetic_llm.study.spec import Arm, Settings, Study, arms_of
from arithmetic_llm.study.stages import Stage, new_stage

PRODUCT = re.compile(r"\{(\w+)\}")
LIKE, GIVEN, JOIN = "like", "given", "join"  # settings of a stage that are no flags


class Trial(NamedTuple):
    """An arm with a seed, and the stage that evaluates it."""

    arm: Arm
    seed: int
    evaluation: Stage


def plan(study: Study, folder: Path, base: str = "") -> list[Trial]:
    """Every arm with every seed, as stages below ``folder``; all commands are checked.

    Args:
        base: a recipe or finished run in place of the study's own.

    Raises:
        UserError: a stage, flag or value that does not exist; the file, the arm and the stage are
            named.
    """
    planner = Planner(study, folder, base or study.base)
    trials = [
        Trial(arm, seed, planner.evaluation_of(arm, seed))
        for arm in arms_of(study)
        for seed in study.seeds
    ]
    for trial in trials:
        planner.require_use_of_base(trial)
    return trials


class Planner:
    """Finds the stages of arms; what agrees in everything is one and the same stage."""

    def __init__(self, study: Study, folder: Path, base: str):
        self.study, self.folder, self.base = study, folder, base
        self.known: dict[str, Stage] = {}
        self.stages = {name: {} for name in KINDS} | study.stages
        path = _found(resolve_stamp(base))
        self.recipe, self.run = path, ""
        if (path / FINISHED).is_file():
            self.recipe, self.run = ROOT / "configs" / "cpu", STAGE_OF[_stage_in(path)]
            self.stages |= given_by(path, self.run)
        elif not any((path / f).is_file() for k in KINDS.values() for f in k.recipe.values()):
            raise self.refusal(
                f"base: {base} is neither a recipe, such as configs/cpu, nor the "
                "folder of a finished run"
            )
        for name in study.seeded:
            self.kind_of(name)

    def refusal(self, text: str) -> UserError:
        """The error that a text makes, with the study's file before it."""
        return UserError(f"{self.study.file}: {text}")

    def require_use_of_base(self, trial: Trial) -> None:
        """Refuse a finished run that an arm does not start from: it would train another one."""
        stages = trial.evaluation.with_inputs()
        if self.run and not any(stage.given and stage.name == self.run for stage in stages):
            raise self.refusal(
                f"base: {self.base} is a run of stage {self.run}, from which arm "
                f"{trial.arm.name!r} does not start; name another run, or a recipe"
            )

    def kind_of(self, name: str) -> str:
        """The kind of a stage: its own name, or what it is like."""
        kind = str(self.stages.get(name, {}).get(LIKE, name))
        if kind not in KINDS and not self.stages.get(name, {}).keys() & {GIVEN, JOIN}:
            raise self.refusal(
                f'there is no stage {name!r}; write one into "stages" that is "like" one of '
                f"{', '.join(KINDS)}"
            )
        return kind

    def evaluation_of(self, arm: Arm, seed: int) -> Stage:
        """The stage that evaluates an arm with a seed."""
        chosen = dict(self.stages)
        for key, value in arm.settings.items():
            name, _, flag = key.partition(".")
            self.kind_of(name)
            if GIVEN in chosen[name]:
                raise self.refusal(
                    f"arm {arm.name!r}: {key} cannot vary, since {name} is given; leave out one"
                )
            chosen[name] = {**chosen[name], flag: value}
        seeded = self.study.seeded or [n for n in chosen if self.kind_of(n) in TRAINED]
        for name in seeded:
            if "seed" in chosen[name]:
                raise self.refusal(
                    f"arm {arm.name!r}: {name}.seed comes from the study's seeds; leave it out, or "
                    'name the stages that they are for under "seeded"'
                )
            chosen[name] = {**chosen[name], "seed": seed}
        evaluation = self.resolve("evaluation", chosen, arm)
        self.require_rows(evaluation, arm)
        return evaluation

    def require_rows(self, evaluation: Stage, arm: Arm) -> None:
        """Refuse a row that the arm's test cannot have, before hours are spent on it."""
        test = evaluation.inputs.get("test_file")
        settings = test.effective if test else {}
        most = settings.get("max_depth")
        least = 1 if settings.get("drill_rate") else settings.get("min_depth") or 1
        for row in self.study.judged_by:
            name, _, depth = row.problems.partition(" ")
            if name == "depth" and most and not least <= int(depth) <= most:
                there = f"the test has depth {least} to {most}"
                raise self.refusal(f"arm {arm.name!r}: rows: {row.problems}: {there}")

    def resolve(
        self, name: str, chosen: dict[str, Settings], arm: Arm, way: tuple[str, ...] = ()
    ) -> Stage:
        """A stage by its name, with all that it needs."""
        if name in way:
            raise self.refusal(f"stage {name!r} needs itself: {' -> '.join((*way, name))}")
        kind, settings = self.kind_of(name), dict(chosen.get(name, {}))
        settings.pop(LIKE, "")
        if GIVEN in settings:
            return self.keep(self.given(name, kind, str(settings[GIVEN])))
        joined = JOIN in settings
        values = self.parts(name, settings) if joined else {**KINDS[kind].inputs, **settings}
        inputs = {
            flag: self.resolve(found[1], chosen, arm, (*way, name))
            for flag, value in values.items()
            if (found := PRODUCT.fullmatch(str(value)))
        }
        if joined:
            return self.keep(new_stage("joined", None, {}, inputs, {}, self.folder))
        own = {f: value for f, value in values.items() if f not in inputs and value is not None}
        return self.checked(name, arm, self.command(kind, own, inputs))

    def parts(self, name: str, settings: Settings) -> Settings:
        """The stages that another one joins, by their place."""
        parts = settings[JOIN]
        if not (isinstance(parts, list) and parts and all(map(PRODUCT.fullmatch, map(str, parts)))):
            raise self.refusal(
                f"stage {name}: {JOIN}: {parts!r} is no list of stages, such as "
                '["{one}", "{other}"]'
            )
        return {str(place): part for place, part in enumerate(parts)}

    def given(self, name: str, kind: str, path: str) -> Stage:
        """What stands at a path as a stage that is done."""
        try:
            file = Path(resolve_stamp(path))
            file = file / "tokenizer.json" if file.is_dir() else file
            digest = sha256_file(require_file(file, kind))
        except UserError as error:
            raise self.refusal(f"stage {name}: {error}") from None
        return Stage(kind, digest, file.parent, given=str(file))

    def require(self, file: Path, what: str) -> None:
        """Refuse a file that is not there."""
        try:
            require_file(file, "config")
        except UserError as error:
            raise self.refusal(f"{what}: {error}") from None

    def command(self, name: str, settings: Settings, inputs: dict[str, Stage]) -> Stage:
        """A stage that runs a script."""
        kind = KINDS[name]
        files = {flag: self.recipe / file for flag, file in kind.recipe.items()}
        named = {flag: _found(str(settings.pop(flag))) for flag in files.keys() & settings.keys()}
        for flag, file in named.items():
            self.require(file, f"stage {name}: {flag}")
        recipe = {flag: f.as_posix() for flag, f in (files | named).items() if f.is_file()}
        if kind.trains:
            settings.setdefault("threads", 1)
        return new_stage(name, kind, settings, inputs, recipe, self.folder)

    def checked(self, name: str, arm: Arm, stage: Stage) -> Stage:
        """The stage, when its script's settings have read its command without running it."""
        if stage.hash in self.known:
            return self.known[stage.hash]
        sections = dict(zip(("config", "model_config"), stage.kind.configs, strict=False))
        try:
            if stage.kind.output in stage.settings:
                raise UserError(f"{flag_of(stage.kind.output)}: the study sees to it; leave it out")
            with contextlib.redirect_stderr(io.StringIO()):  # notes on what gives way
                parse_many(sections, stage.words[1:], "")
        except UserError as error:
            raise self.refusal(f"arm {arm.name!r}, stage {name}: {error}") from None
        return self.keep(stage)

    def keep(self, stage: Stage) -> Stage:
        """The one stage of this hash."""
        return self.known.setdefault(stage.hash, stage)


# ------------------------------------------------------------------------------------ what is there


def _found(path: str) -> Path:
    """A path from here or, if it is only there, from the folder of the scripts."""
    return ROOT / path if not Path(path).exists() and (ROOT / path).exists() else Path(path)


def _stage_in(run: Path) -> str:
    stage = read_json(run / FINISHED).get("stage")
    if stage not in STAGE_OF:
        raise UserError(f"{run / FINISHED}: stage: {stage!r} is none of {', '.join(STAGE_OF)}")
    return stage


def given_by(run: Path, name: str) -> dict[str, Settings]:
    """The stages that a finished run stands for: its model and its tokenizer."""
    settings = read_json(run / SETTINGS["config"])
    path = settings.get("tokenizer_path") or settings.get("tokenizer", "")
    places = [Path(path), *(parent / path for parent in run.resolve().parents)]
    tokenizer = next((place for place in places if place.exists()), None)
    if tokenizer is None:
        raise UserError(f"{run}: its tokenizer {path} is not there; start the study where it is")
    model = run / Path(KINDS[name].product).name
    return {name: {GIVEN: str(model)}, "tokenizer": {GIVEN: str(tokenizer)}}
