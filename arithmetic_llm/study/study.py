"""A study from its file to its results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from arithmetic_llm.config import StudyConfig
from arithmetic_llm.distributed import cores
from arithmetic_llm.evaluation.plots import save_picture
from arithmetic_llm.runtime import UserError, pasted, readable_seconds
from arithmetic_llm.study import figures
from arithmetic_llm.study.plan import Trial, plan
from arithmetic_llm.study.runner import expected_seconds, run_stages
from arithmetic_llm.study.spec import read_study
from arithmetic_llm.study.stages import Stage
from arithmetic_llm.study.table import Results, results_of
from arithmetic_llm.study.write import GRID, PAGE, PICTURE, write_results


def study_from(config: StudyConfig) -> int:
    """Run a study and write its results; returns the exit code: 1 if an arm has failed.

    Raises:
        UserError: the study is wrong, or nothing of it could be finished.
    """
    study = read_study(config.study, config.quick)
    folder = Path(config.output_dir) / (study.name + ("_quick" if config.quick else ""))
    kept = Path(config.stages_dir) if config.stages_dir else folder / "stages"
    trials = plan(study, kept, config.base)
    stages = stages_of(trials)
    jobs = config.jobs or cores()
    print(outline(trials, stages, jobs))
    if config.dry_run:
        print("\n".join(f"$ {pasted(s.words)}" for s in stages if s.kind and not s.done))
        return 0
    failures = run_stages(stages, jobs, study.name)
    results = results_of(study, trials)
    if not results.arms:
        raise UserError(f"{config.study}: nothing could be finished; the reasons are above")
    write_results(results, folder, command_of(config), draw(results, folder))
    print(f"results in {folder / PAGE}")
    for name in results.failed:
        print(f"not finished: {name}", file=sys.stderr)
    return 1 if failures else 0


def stages_of(trials: Sequence[Trial]) -> list[Stage]:
    """Every stage once, each behind those that it needs."""
    found = {s.hash: s for trial in trials for s in trial.evaluation.with_inputs()}
    return list(found.values())


def outline(trials: Sequence[Trial], stages: Sequence[Stage], jobs: int) -> str:
    """What there is to do, in a line."""
    arms = len({trial.arm.name for trial in trials})
    seeds = len({trial.seed for trial in trials})
    left = [stage for stage in stages if not stage.done]
    seconds = sum(map(expected_seconds, left)) / jobs
    done = len(stages) - len(left)
    return (
        f"{arms} arms, {seeds} seeds: {len(stages)} stages, {done} of them done, {jobs} at a time"
        + (f"; perhaps {readable_seconds(seconds)}" if left else "")
    )


def draw(results: Results, folder: Path) -> list[str]:
    """Draw the pictures; returns their names. Without matplotlib says so, and there are none."""
    pictures = {PICTURE: figures.draw_results, GRID: figures.draw_grid}
    try:
        for name, drawn in pictures.items():
            save_picture(drawn(results), str(folder / name))
    except UserError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return []
    return [*pictures]


def command_of(config: StudyConfig) -> str:
    """The command that repeats the study."""
    base = ["--base", config.base] if config.base else []
    more = [*(["--quick"] if config.quick else []), *base]
    return pasted(["run_study.py", Path(config.study).as_posix(), *more])
