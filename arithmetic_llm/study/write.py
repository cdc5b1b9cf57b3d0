"""The results of a study as files: a table for other programs, and a page to read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from arithmetic_llm.evaluation.panels import clock_of, read_run
from arithmetic_llm.runtime import atomic_write_text
from arithmetic_llm.study.spec import Criterion, shown_value
from arithmetic_llm.study.table import (
    ALIKE,
    BETTER,
    SAME,
    WORSE,
    Difference,
    Evaluated,
    Reached,
    Results,
)

CSV, PAGE, PICTURE, GRID = "results.csv", "results.md", "results.png", "grid.png"


def write_results(results: Results, folder: Path, command: str, pictures: Sequence[str]) -> None:
    """Write ``results.csv`` and ``results.md``.

    Args:
        command: what repeats the study.
        pictures: names of the pictures in the folder.
    """
    atomic_write_text(folder / CSV, csv_text(results))
    atomic_write_text(folder / PAGE, page(results, command, pictures))


# --------------------------------------------------------------------------------- for programs


def csv_text(results: Results) -> str:
    """A line for every arm, seed and row; shares in percent, their Wilson intervals beside them."""
    places = list(dict.fromkeys(key for arm in results.arms for key in arm.arm.place))
    names = ["arm", *places, "seed", "row", "measure", "right", "problems"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "percent", "low", "high", "training_minutes", "evaluation"])
    for arm in results.arms:
        place = [shown_value(arm.arm.place.get(key, "")) for key in places]
        for run in arm.runs:
            minutes = training_minutes(run)
            for row in results.study.judged_by:
                writer.writerow(
                    [
                        arm.arm.name,
                        *place,
                        run.seed,
                        *figures(run, row),
                        minutes,
                        run.stage.folder.name,
                    ]
                )
    return text.getvalue()


def figures(run: Evaluated, row: Criterion) -> list[object]:
    """The columns of a row: its name, counts and shares."""
    marks = run.marks(row)
    shares = [f"{100 * share:.2f}" for share in (marks.share, *marks.interval)]
    return [*row, marks.count, len(marks.right), *shares]


def training_minutes(run: Evaluated) -> str:
    """Minutes that the training of the evaluated model took; nothing if it was not trained here."""
    model = run.stage.inputs.get("model_path")
    folder = model and not model.given and model.run_folder
    if not folder:
        return ""
    record = read_run(str(folder))
    return f"{clock_of(record).minutes[-1]:.1f}" if record.has_time else ""


# ------------------------------------------------------------------------------------ to be read


def page(results: Results, command: str, pictures: Sequence[str]) -> str:
    """The content of ``results.md``."""
    study = results.study
    parts = [
        f"# {study.name}\n\n{study.question}",
        f"Made by `{command}`; seeds {', '.join(map(str, study.seeds))}.",
        "## What the arms reach\n\n" + table_of_arms(results),
        *(differences_of(results, row) for row in study.judged_by if len(results.arms) > 1),
        what_failed(results),
        "\n\n".join(f"![{Path(name).stem}]({name})" for name in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_of_arms(results: Results) -> str:
    """Mean of the seeds, with its interval, for each arm and row."""
    rows = results.study.judged_by
    lines = [["arm", "models", *map(str, rows), "minutes"]]
    for arm in results.arms:
        cells = [percent_cell(results, arm, row) for row in rows]
        lines.append([arm.arm.name, str(len(arm.models)), *cells, minutes_cell(arm)])
    counts = {len(run.marks(rows[0]).right) for arm in results.arms for run in arm.runs}
    problems = " or ".join(f"{count:,}" for count in sorted(counts))
    note = (
        f"Percent with 95 % interval, mean of the models; the first such column is of {problems} "
        "problems. Other problems would leave the mean in there and, where models are several, so "
        "would other seeds. Minutes are those of training the model that is evaluated."
    )
    return markdown(lines) + "\n\n" + note


def percent_cell(results: Results, arm: Reached, row: Criterion) -> str:
    low, high = results.interval(arm, row)
    return f"{100 * arm.mean(row):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def minutes_cell(arm: Reached) -> str:
    found = [float(minutes) for run in arm.models if (minutes := training_minutes(run))]
    return f"{sum(found) / len(found):.1f}" if found else ""


def differences_of(results: Results, row: Criterion) -> str:
    """A row's differences as a table, and in words."""
    if not results.against:
        return f"## {row}\n\nNothing to compare with: {results.study.against} did not finish."
    found, name = results.compared(row), results.against.arm.name
    lines = [["arm", "points", "95 % interval", "models", "problems better, worse", "p", "verdict"]]
    lines += [cells_of(each) for each in found]
    words = "\n".join(f"- {line}" for line in in_words(found, name))
    return f"## {row}: beside {name}\n\n{markdown(lines)}\n\n{words}"


def cells_of(each: Difference) -> list[str]:
    if each.verdict == SAME:
        return [each.arm.name, "0.0", "", "", "", "", SAME]
    problems = "" if each.better is None else f"{each.better}, {each.worse}"
    return [
        each.arm.name,
        f"{100 * each.mean:+.1f}",
        f"{100 * each.low:+.1f} to {100 * each.high:+.1f}",
        "{} and {}".format(*each.models),
        problems,
        p_text(each.adjusted),
        each.verdict,
    ]


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def in_words(found: Sequence[Difference], name: str) -> Iterator[str]:
    """What the table amounts to, a sentence for each verdict."""
    for verdict, words in (
        (BETTER, f"better than {name}"),
        (WORSE, f"worse than {name}"),
        (ALIKE, f"cannot be told apart from {name}"),
        (SAME, f"the same runs as {name}"),
    ):
        names = "; ".join(each.arm.name for each in found if each.verdict == verdict)
        if names:
            yield f"{words}: {names}"
    if found and max(max(each.models) for each in found) == 1:
        yield "one model each: this says nothing of what other seeds would give"


def what_failed(results: Results) -> str:
    if not results.failed:
        return ""
    return "## Not finished\n\n" + "\n".join(f"- {name}" for name in results.failed)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first line is its head."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])
