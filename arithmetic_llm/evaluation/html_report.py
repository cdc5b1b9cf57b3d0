"""The page that a pipeline ends with: what each stage reached, its pictures, its worst errors.

Made from the files that the stages left behind, so nothing here needs torch; it needs matplotlib
for the pictures, and does without them if that is not there.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from arithmetic_llm.cli import read_json
from arithmetic_llm.evaluation import panels, plots
from arithmetic_llm.evaluation.html import listed, page, table
from arithmetic_llm.evaluation.marks import Passage, passages, right_instead
from arithmetic_llm.evaluation.report import errors, footnote, notes, stage_rows, standing
from arithmetic_llm.runtime import UserError, atomic_write_text, processor
from arithmetic_llm.task.text import settled
from arithmetic_llm.task.verifier import verify

WORST = 3  # errors that are shown of each model
BEFORE, AFTER = 16, 2  # passages that are shown around the first wrong one
LONGEST = 400  # characters of a passage that are shown
WIDTH = 12.0  # inches


@dataclass(frozen=True)
class StageRecord:
    """A stage that has run: its command, its seconds, and the metrics that it wrote, if any."""

    name: str
    command: str
    seconds: float
    metrics_file: Path | None

    @cached_property
    def metrics(self) -> dict[str, Any] | None:
        """What the evaluation found."""
        return read_json(self.metrics_file) if self.metrics_file else None


def write_report(stages: Sequence[StageRecord], repeat: str, recipe: str, output: str) -> None:
    """Write the report of a pipeline.

    Args:
        repeat: the command that ran all of it.
        recipe: the folder with its configs.
    """
    evaluated = dict(evaluations(stages))
    parts = [
        "<h1>Report of a quickstart</h1>",
        _standings(evaluated),
        "<h2>Stages</h2>",
        _stage_table(stages),
        "<h2>Pictures</h2>",
        *_pictures([*evaluated.values()]),
        "<h2>Worst errors</h2>",
        f"<p>Of each model up to {WORST}: those with the fewest right steps of the steps needed, "
        "shorter problems first. The bar marks the first thing that is wrong; later steps are "
        "judged by what stands before them.</p>",
        *(_errors(*each) for each in evaluated.items()),
        "<h2>How to repeat it</h2>",
        _commands(stages, repeat),
        _circumstances([*evaluated.values()]),
        _recipe(recipe),
    ]
    atomic_write_text(output, page("Report of a quickstart", "\n".join(parts), _STYLE))


def evaluations(stages: Sequence[StageRecord]) -> Iterator[tuple[str, StageRecord]]:
    """Each evaluation, by the name of the stage before it, whose model it is of."""
    for before, stage in pairwise(stages):
        if stage.metrics_file:
            yield before.name, stage


def _standings(evaluated: Mapping[str, StageRecord]) -> str:
    return listed([f"{name}: {standing(stage.metrics)}" for name, stage in evaluated.items()])


def _stage_table(stages: Sequence[StageRecord]) -> str:
    rows = stage_rows([(stage.name, stage.metrics, stage.seconds) for stage in stages])
    return table(rows, names=2) + f'<p class="quiet">{escape(footnote(rows, column=1).strip())}</p>'


# ---------------------------------------------------------------------------------- pictures


def missing_pictures() -> str:
    """Why there can be no pictures; empty if there can."""
    try:
        plots.matplotlib("figure")
    except UserError as error:
        return str(error)
    return ""


def _pictures(evaluated: Sequence[StageRecord]) -> Iterator[str]:
    yield _figure(
        "Exact match with 95 % intervals, and the wrong answers by kind of error, side by side.",
        lambda: _drawn_evaluations(evaluated),
    )
    runs: dict[bool, list[str]] = {False: [], True: []}  # by whether they are GRPO's
    for stage in evaluated:
        runs[stage.metrics["settings"].get("stage") == "grpo"].append(_run_of(stage))
    for caption, folders in (("Supervised training.", runs[False]), ("GRPO.", runs[True])):
        if folders:
            yield _figure(caption, partial(_drawn_runs, folders))


def _run_of(stage: StageRecord) -> str:
    """The run folder of the model that was evaluated."""
    return str(Path(stage.metrics["settings"]["model_path"]).parent)


def _drawn_evaluations(evaluated: Sequence[StageRecord]) -> Any:
    files = [str(stage.metrics_file) for stage in evaluated]
    found = [panels.read_evaluation(file) for file in files]
    names = panels.evaluation_names(found, files)
    data = panels.accuracies(found), panels.error_shares(found)
    return plots.draw_evaluations(*data, names, WIDTH)


def _drawn_runs(folders: Sequence[str]) -> Any:
    groups = panels.grouped([*map(panels.read_run, folders)])
    return plots.draw_runs(panels.run_panels(groups), panels.group_names(groups), WIDTH)


def _figure(caption: str, draw: Callable[[], Any]) -> str:
    """A picture inside the page, its letters as outlines; or why there is none."""
    try:
        content = plots.picture_bytes(draw(), "svg", **{"svg.fonttype": "path"})
    except UserError as error:
        return f'<p class="quiet">{escape(caption)} No picture: {escape(str(error))}.</p>'
    data = base64.b64encode(content).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


# ------------------------------------------------------------------------------------ errors


def worst_mistakes(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst of the wrong answers: fewest right steps of those needed, then fewest needed.

    Args:
        samples: the content of ``sample_outputs_*.json``.
    """
    return sorted((sample for sample in samples if not sample["correct"]), key=_badness)[:WORST]


def _badness(sample: dict[str, Any]) -> tuple[float, int]:
    needed = sample["needed_steps"]
    return sample["valid_steps"] / max(needed, 1), needed


def _errors(name: str, stage: StageRecord) -> str:
    file = stage.metrics_file
    samples = json.loads(
        file.with_name(file.name.replace("evaluation_metrics", "sample_outputs")).read_text("utf-8")
    )
    metrics = stage.metrics
    wrong = metrics["total_samples"] - metrics["correct_samples"]
    said = [f"<h3>{escape(name)}: {wrong:,} wrong of {metrics['total_samples']:,}</h3>"]
    if metrics["errors"]:
        said.append(f"<pre>{escape(errors(metrics))}</pre>")
    said += [f"<p>{escape(note)}</p>" for note in notes(metrics)]
    return "\n".join([*said, *map(_worked, worst_mistakes(samples))])


def _worked(sample: dict[str, Any]) -> str:
    """A wrong answer as a worked trace."""
    expression, text, cut_off = (sample[k] for k in ("expression", "generated_text", "cut_off"))
    verdict = verify(expression, settled(text, cut_off), cut_off)
    said = "no result" if verdict.predicted is None else verdict.predicted
    heading = (
        f"<p><code><strong>{escape(expression)}</strong></code><br>"
        f"the model: {said}, exact: {verdict.answer}; {verdict.valid_steps:,} of "
        f"{verdict.needed_steps:,} steps right before the first error ({verdict.error})</p>"
    )
    right = f'<li class="instead">right here: {escape(right_instead(expression, verdict))}</li>'
    lines = _lines(passages(text, verdict), right)
    return f'<div class="worked">{heading}<ul>{"".join(lines)}</ul></div>'


def _lines(found: Sequence[Passage], right: str) -> Iterator[str]:
    """Passages around the first wrong one, which ``right`` follows."""
    place = next(i for i, passage in enumerate(found) if passage.first_wrong)
    start, end = max(0, place - BEFORE), place + AFTER + 1
    yield _skipped(start, "before")
    yield from map(_line, found[start : place + 1])
    yield right
    yield from map(_line, found[place + 1 : end])
    yield _skipped(len(found) - end, "after")


def _line(passage: Passage) -> str:
    kind = "wrong" if passage.wrong else "right"
    first = " first" if passage.first_wrong else ""
    text = escape(_clipped(passage.text))
    return f'<li class="{kind}{first}">{text} <span class="mark">{escape(passage.mark)}</span></li>'


def _clipped(text: str) -> str:
    text = text.strip()
    more = len(text) - LONGEST
    return f"{text[:LONGEST]} ... ({more:,} characters more)" if more > 0 else text


def _skipped(count: int, where: str) -> str:
    return f'<li class="quiet">({count:,} more {where})</li>' if count > 0 else ""


# --------------------------------------------------------------------------- how to repeat it


def _commands(stages: Sequence[StageRecord], repeat: str) -> str:
    lines = [f"# {stage.name}, {stage.seconds:,.0f} s\n{stage.command}" for stage in stages]
    return (
        f"<p>All of it:</p><pre>{escape(repeat)}</pre><p>Stage by stage:</p>"
        f"<pre>{escape(chr(10).join(lines))}</pre>"
    )


def _circumstances(evaluated: Sequence[StageRecord]) -> str:
    """The models that were evaluated, and versions and machine as the evaluations tell them."""
    rows = [["model", "step", "weights (SHA-256)", "test", "test (SHA-256)"]]
    for stage in evaluated:
        told = stage.metrics["settings"]
        hashes = [str(told.get(name, ""))[:16] for name in ("weights_hash", "sha256")]
        names = [told["model_path"], str(told["step"]), hashes[0], told["test_file"], hashes[1]]
        rows.append(names)
    told = evaluated[-1].metrics["settings"]
    machine = {
        **told["versions"],
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "evaluated on": f"{told['device']}, {told['precision']}, {told['threads']} threads",
    }
    facts = [["", ""], *([name, str(value)] for name, value in machine.items())]
    return f"<h2>Versions and machine</h2>{table(rows, 5)}<br>{table(facts, 2)}"


def _recipe(folder: str) -> str:
    files = sorted(Path(folder).glob("*.json"))
    shown = "".join(
        f"<h3>{escape(file.name)}</h3><pre>{escape(file.read_text('utf-8'))}</pre>"
        for file in files
    )
    return f"<details><summary>The recipe, {escape(folder)}</summary>{shown}</details>"


_STYLE = """
figure { margin: .5rem 0 1.2rem; } figure img { width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
.worked { break-inside: avoid; margin: 0 0 1.4rem; }
.worked ul { list-style: none; margin: .3rem 0; padding: 0; }
.worked li { font-family: ui-monospace, "DejaVu Sans Mono", "Liberation Mono", monospace;
  font-size: .8rem; padding: .1rem .6rem; border-left: 4px solid #00664c; overflow-wrap: anywhere; }
.worked li.wrong { border-left: 4px dashed #a33c00; }
.worked li.first { border-left: 10px solid #a33c00; font-weight: 600; }
.worked li.instead { border-left: 10px solid #a33c00; font-style: italic; }
.worked li.quiet { border-left: 4px dotted #ccc; }
"""
