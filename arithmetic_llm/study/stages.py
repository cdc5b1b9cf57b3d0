"""A stage: a numbered script with its settings and inputs, as a command with a hash.

The hash is that of its script, its settings, the content of its recipe file and the hashes of its
inputs. Two arms that agree on all that share the stage, and so its folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arithmetic_llm.cli import flag_of, read_json
from arithmetic_llm.folders import SETTINGS, STAMP
from arithmetic_llm.study.kinds import CORPUS, Kind
from arithmetic_llm.study.spec import Settings, shown_value

DONE = "done.json"  # written last: a stage whose folder holds it is finished


@dataclass(frozen=True)
class Stage:
    """A command that makes something, by its hash; or something given, which has no command."""

    name: str  # of its kind
    hash: str
    folder: Path
    kind: Kind | None = None  # None: given, or joined from its inputs
    settings: Settings = field(default_factory=dict)
    inputs: dict[str, Stage] = field(default_factory=dict)
    recipe: dict[str, str] = field(default_factory=dict)
    given: str = ""

    @property
    def done(self) -> bool:
        """Whether its product is there."""
        return bool(self.given) or (self.folder / DONE).is_file()

    @property
    def target(self) -> str:
        """The path of what it makes, for a command: the literal time stamp means the newest."""
        return self.given or str(self.folder / (self.kind.product if self.kind else CORPUS))

    @property
    def product(self) -> str:
        """The path of what it has made."""
        parts = Path(self.target).relative_to(self.folder) if not self.given else None
        if parts is None or STAMP not in str(parts):
            return self.target
        found = sorted(self.folder.glob(str(parts).replace(STAMP, "*_*")))
        return str(found[-1] if found else self.target)

    @property
    def run_folder(self) -> Path | None:
        """The folder of its training run, if that has begun."""
        if not (self.kind and self.kind.trains):
            return None
        pattern = f"{self.kind.runs}/{SETTINGS['config']}"
        return max((path.parent for path in self.folder.glob(pattern)), default=None)

    @property
    def words(self) -> list[str]:
        """The command: script and arguments."""
        words = [self.kind.script, *self.kind.fixed]
        for flag, file in self.recipe.items():
            words += [flag_of(flag), file]
        for flag, value in self.settings.items():
            words += words_of(flag, value)
        for flag, stage in self.inputs.items():
            words += [flag_of(flag), stage.target]
        to = self.folder if self.kind.output == "output_dir" else self.folder / CORPUS
        return [*words, flag_of(self.kind.output), str(to)]

    @property
    def effective(self) -> Settings:
        """Settings, those of the recipe included, as far as they are given at all."""
        files = [read_json(file) for file in self.recipe.values()]
        return {k: v for each in [*files, self.settings] for k, v in each.items()}

    def with_inputs(self) -> Iterator[Stage]:
        """All stages that it needs, each before those that need it, itself last."""
        for stage in self.inputs.values():
            yield from stage.with_inputs()
        yield self


def words_of(flag: str, value: Any) -> list[str]:
    """A setting as words of a command line."""
    if isinstance(value, bool):
        return [flag_of(flag if value else f"no_{flag}")]
    if isinstance(value, list):
        return [flag_of(flag), *map(str, value)]
    return [flag_of(flag), shown_value(value)]


def new_stage(
    name: str,
    kind: Kind | None,
    settings: Settings,
    inputs: dict[str, Stage],
    recipe: dict[str, str],
    folder: Path,
) -> Stage:
    """A stage with its hash and a folder of that name."""
    stage = Stage(name, "", folder, kind, settings, inputs, recipe)
    command = [kind.script, *kind.fixed] if kind else []
    made_of = {flag: each.hash for flag, each in inputs.items()}
    content = json.dumps([command, stage.effective, made_of], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return replace(stage, hash=digest, folder=folder / f"{name}_{digest[:12]}")
