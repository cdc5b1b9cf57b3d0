"""Folders that runs live in: their names, and which one a literal time stamp means."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arithmetic_llm.cli import build, contradicted, flag_of, parse_many, read_flags, read_json
from arithmetic_llm.distributed import from_main, is_restarted, job_name
from arithmetic_llm.runtime import UserError, checked

STAMP = "YYYYMMDD_HHMMSS"
FACTS = "run.json"  # what is needed to repeat a run
SETTINGS = {"config": "training_config.json", "model_config": "model_config.json"}
METRICS = "metrics.jsonl"
BEST = "best_model.pt"
FINISHED = "training_summary.json"  # written last: a run folder that holds it is finished


def new_run_folder(output_dir: str | Path, kind: str) -> Path:
    """Make ``output_dir/kind_YYYYMMDD_HHMMSS``; a name that is taken moves on by a second."""
    moment = datetime.datetime.now()
    while True:
        folder = Path(output_dir) / f"{kind}_{moment:%Y%m%d_%H%M%S}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not Path(output_dir).is_dir():
                raise UserError(f"{output_dir}: is a file; name a directory") from None
            moment += datetime.timedelta(seconds=1)


def resolve_stamp(path: str) -> str:
    """Replace a literal ``YYYYMMDD_HHMMSS`` by the newest finished run of exactly that kind.

    ``models/foundational_YYYYMMDD_HHMMSS/best_model.pt`` becomes the newest finished foundational
    run's; which one is printed. Any other path comes back as it is.
    """
    if STAMP not in path:
        return path
    return from_main(lambda: _newest(path))


def _newest(path: str) -> str:
    parts = Path(path).parts
    place = next(i for i, part in enumerate(parts) if STAMP in part)
    parent = Path(*parts[:place])
    pattern = re.compile(re.escape(parts[place]).replace(STAMP, r"\d{8}_\d{6}"))
    finished = sorted(f.name for f in _entries(parent) if pattern.fullmatch(f.name) and _done(f))
    if not finished:
        raise UserError(f"{path}: no finished run of that name in {parent}; run its stage first")
    chosen = Path(parent, finished[-1], *parts[place + 1 :])
    if STAMP in str(chosen):
        return _newest(str(chosen))
    print(f"{path} -> {chosen}")
    return str(chosen)


def resolve_paths(config: Any) -> Any:
    """A config with every literal time stamp in it resolved; see `resolve_stamp`.

    A run keeps this one, so that resuming it does not find a newer base.
    """
    values = dataclasses.asdict(config)
    stamped = {k: v for k, v in values.items() if isinstance(v, str) and STAMP in v}
    return dataclasses.replace(config, **{k: resolve_stamp(v) for k, v in stamped.items()})


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _done(entry: Path) -> bool:
    return entry.is_file() or (entry / FINISHED).is_file()


def step_checkpoints(folder: Path) -> list[Path]:
    """``checkpoint_step_N.pt`` files of a run, oldest first."""
    found = folder.glob("checkpoint_step_*.pt")
    numbered = [(int(m[1]), p) for p in found if (m := re.fullmatch(r"\D+(\d+)\.pt", p.name))]
    return [path for _, path in sorted(numbered)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics stream; one that a kill left unfinished is passed over."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [values for values in map(_values, lines) if values]


def _values(line: str) -> dict[str, Any] | None:
    """The values of a line of metrics; None if it is not one, or not a whole one."""
    try:
        values = json.loads(line)
        checked(int, checked(dict, values, "line")["step"], "step")
    except (KeyError, RecursionError, ValueError):
        return None
    return values


# -------------------------------------------------------------------- settings that a run keeps


def parse_run(
    sections: dict[str, type], argv: Sequence[str] | None, description: str
) -> tuple[Any, ...]:
    """Configs of a training stage, where ``--resume RUN`` brings the run's own settings.

    A flag that says otherwise than the run did is refused: a resumed run is the same run. Settings
    that a run has saved are never refused as void: they were void there, too.
    """
    given = read_flags(sections, argv, description)
    folder = given.pop("resume", "")
    if folder:
        return _of_run(folder, sections, given)
    configs = parse_many(sections, argv, description, _is_of_run, resolve_stamp)
    if configs[0].resume:
        raise UserError("resume: belongs on the command line, --resume RUN, not into a file")
    if is_restarted() and (folder := from_main(lambda: begun_by_this_job(configs[0].output_dir))):
        return _of_run(folder, sections, {})
    return configs


def begun_by_this_job(output_dir: str) -> str:
    """The newest run that this command has begun in this job of a launcher; empty if none.

    The launcher has restarted the processes, and they are to go on from where the last ones were.
    """
    own = {"job": job_name(), "command": sys.argv}
    folders = sorted(
        (facts.stat().st_mtime, str(facts.parent))
        for facts in Path(output_dir).glob(f"*/{FACTS}")
        if facts.with_name(SETTINGS["config"]).exists() and _said(facts, [*own]) == own
    )
    return folders[-1][1] if folders else ""


def _said(file: Path, names: Sequence[str]) -> dict[str, Any]:
    """What a JSON file says under some names; nothing if it is damaged."""
    try:
        said = read_json(file)
    except UserError:
        return {}
    return {name: said.get(name) for name in names}


def _is_of_run(file: str) -> bool:
    return Path(file).with_name(FACTS).is_file()


def _of_run(folder: str, sections: dict[str, type], given: dict[str, Any]) -> tuple[Any, ...]:
    if files := sections.keys() & given.keys():
        flag = flag_of(min(files))
        raise UserError(f"{flag}: {folder} has its own settings; leave it out with --resume")
    stage = _said(Path(folder) / FACTS, ["stage"]).get("stage")
    if stage and stage != sections["config"].STAGE:
        raise UserError(
            f"{folder}: is a run of stage {stage}; resume it with the script of that stage"
        )
    processes = given.pop("processes", None)  # it may go on with another number
    configs = []
    for name, cls in sections.items():
        configs.append(build(cls, read_json(Path(folder) / SETTINGS[name]), {}))
        for flag, theirs, ours in contradicted(configs[-1], given):
            raise UserError(
                f"{flag} {theirs}: {folder} runs with {ours}; leave it out, or start a new run"
            )
    more = {} if processes is None else {"processes": processes}
    return dataclasses.replace(configs[0], resume=folder, **more), *configs[1:]
