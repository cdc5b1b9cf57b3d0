"""Drawing: the panels of runs and evaluations as one PNG or SVG.

Colours are those of Okabe and Ito (2008), which the colour-blind tell apart; line styles, markers
and hatches say the same once more, for print in black and white. matplotlib is an optional
requirement and imported when a picture is drawn.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arithmetic_llm.evaluation.panels import STEPS, Accuracies, ErrorShares, Line, Panel, Point
from arithmetic_llm.runtime import UserError, atomic_write

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++")
ENDINGS = (".png", ".svg")
WIDE = 6  # from so many panels on there are four in a row, else two
MOST_ROWS = 10  # with a name each
SETTINGS = {  # of matplotlib: text stays text in an SVG, and the same data is the same file
    "svg.fonttype": "none",
    "svg.hashsalt": "arithmetic_llm",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "savefig.dpi": 150,
}


def require_picture(path: str) -> str:
    """The path, if its ending is one of a picture that can be drawn."""
    if Path(path).suffix.lower() not in ENDINGS:
        raise UserError(f"{path}: the name of a picture ends in {' or '.join(ENDINGS)}")
    return path


def matplotlib(module: str) -> Any:
    """A module of matplotlib, imported when it is needed: it is an optional requirement."""
    try:
        return importlib.import_module(f"matplotlib.{module}".rstrip("."))
    except ImportError:
        raise UserError(
            "pictures need matplotlib; pip install -r requirements-extras.txt"
        ) from None


def save_picture(figure: Any, path: str) -> None:
    """Write a figure in the format of the file's name, whole or not at all."""
    content = picture_bytes(figure, Path(path).suffix.lower().removeprefix("."))
    with atomic_write(path) as file:
        file.write(content)


def picture_bytes(figure: Any, ending: str, **settings: Any) -> bytes:
    """A figure as PNG or SVG; ``settings`` of matplotlib go before `SETTINGS`."""
    buffer, dateless = io.BytesIO(), {"Date": None} if ending == "svg" else {}
    with matplotlib("").rc_context(SETTINGS | settings):
        figure.savefig(buffer, format=ending, metadata=dateless)
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Any:
    """An empty figure; sizes in inches."""
    return matplotlib("figure").Figure(figsize=(width, height), layout="constrained")


def as_label(name: str) -> str:
    """A name as it is: matplotlib hides what begins with ``_`` and sets ``$...$`` as a formula."""
    return ("./" if name.startswith("_") else "") + name.replace("$", r"\$")


def look(sequence: Sequence[Any], index: int) -> Any:
    """A colour, style or marker by its index, from the start again after the last."""
    return sequence[index % len(sequence)]


# -------------------------------------------------------------------------------- training runs


def draw_runs(panels: Sequence[Panel], names: Sequence[str], width: float) -> Any:
    """All panels of some groups of runs, the groups' names above.

    Colour and line style tell the groups apart, markers the parts of a panel. If there is only one
    group, all three tell the parts.
    """
    with matplotlib("").rc_context(SETTINGS):
        columns = 4 if len(panels) > WIDE else min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure = new_figure(width, rows * width / columns * 0.75 + 0.2 * len(names))
        for place, panel in enumerate(panels):
            draw_panel(figure.add_subplot(rows, columns, place + 1), panel, len(names))
        if len(names) == 1:
            figure.suptitle(as_label(names[0]))
        else:
            handles = [_sample(group, None) for group in range(len(names))]
            labels = [*map(as_label, names)]
            figure.legend(handles, labels, handlelength=4, loc="outside upper left", frameon=False)
        return figure


def draw_panel(axes: Any, panel: Panel, groups: int) -> None:
    """One panel with its labels, and a legend if it shows several parts."""
    parts = panel.parts
    for line in panel.lines:
        part = parts.index(line.part)
        _draw_line(axes, line, *((line.group, part) if groups > 1 else (part, part)))
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.log:
        axes.set_yscale("log")
    if panel.y_label.startswith("%") and len({y for line in panel.lines for y in line.y}) == 1:
        axes.set_ylim(-3, 103)  # matplotlib would zoom in on a flat line, beyond 0 or 100
    axes.xaxis.get_major_locator().set_params(nbins=5, integer=panel.x_label == STEPS)
    if len(parts) > 1:
        looks = [(None if groups > 1 else i, i) for i in range(len(parts))]
        axes.legend([_sample(*each) for each in looks], parts, fontsize=7)


def _draw_line(axes: Any, line: Line, group: int, part: int) -> None:
    colour, style = look(COLOURS, group), look(STYLES, group)
    every = max(1, len(line.x) // 8)
    axes.plot(
        line.x,
        line.y,
        color=colour,
        linestyle=style,
        marker=look(MARKERS, part),
        markevery=every,
        markersize=4,
        linewidth=1.3,
    )
    if (line.low, line.high) != (line.y, line.y):
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)


def _sample(group: int | None, part: int | None) -> Any:
    """A line for a legend: colour and style of a group, marker of a part, or both."""
    looks = {"color": "dimgray", "linestyle": ""}
    if group is not None:
        looks = {"color": look(COLOURS, group), "linestyle": look(STYLES, group)}
    marker = "" if part is None else look(MARKERS, part)
    return matplotlib("lines").Line2D([], [], marker=marker, markersize=4, **looks)


# ---------------------------------------------------------------------------------- evaluations


def draw_evaluations(
    accuracies: Accuracies, errors: ErrorShares, names: Sequence[str], width: float
) -> Any:
    """Accuracy by row beside the kinds of errors, for each evaluation."""
    with matplotlib("").rc_context(SETTINGS):
        figure = new_figure(width, 0.42 * width + 0.2 * len(names))
        left, right = figure.subplots(1, 2)
        for index, points in enumerate(accuracies.points):
            _draw_points(left, points, index, len(names))
        every = -(-len(accuracies.rows) // MOST_ROWS)
        left.set_xticks(range(0, len(accuracies.rows), every), accuracies.rows[::every])
        left.set(title="exact match by row", ylabel="% of problems, 95 % interval")
        left.set(ylim=(-3, 103), xlim=(-0.5, len(accuracies.rows) - 0.5))
        left.set_xlabel("exact depth, or numbers of a flat sum")
        _draw_errors(right, errors)
        handles = [_dot(index, filled=True) for index in range(len(names))]
        labels = [f"{_letter(index)}: {as_label(name)}" for index, name in enumerate(names)]
        if any(not point.trained for points in accuracies.points for point in points):
            handles, labels = [*handles, _dot(None, False)], [*labels, UNTRAINED]
        figure.legend(handles, labels, loc="outside upper left", frameon=False)
        return figure


UNTRAINED = "hollow: never solved in training (depth, numbers or style)"


def _letter(index: int) -> str:
    """``A``, ``B``, ...: a model's name on the axis, where there is no room for a path."""
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _draw_points(axes: Any, points: Sequence[Point], index: int, count: int) -> None:
    """The points of an evaluation, each row's side by side with those of the others."""
    offset = (index - (count - 1) / 2) * min(0.15, 0.8 / count)
    for point in points:
        axes.errorbar(
            point.row + offset,
            point.rate,
            yerr=[[max(0, point.rate - point.low)], [max(0, point.high - point.rate)]],
            capsize=3,
            elinewidth=1.2,
            **_dot_looks(index, point.trained),
        )


def _dot_looks(index: int | None, filled: bool) -> dict[str, Any]:
    colour = "dimgray" if index is None else look(COLOURS, index)
    marker = look(MARKERS, index or 0)
    fill = colour if filled else "white"
    return {"color": colour, "marker": marker, "markerfacecolor": fill, "linestyle": ""}


def _dot(index: int | None, filled: bool) -> Any:
    return matplotlib("lines").Line2D([], [], **_dot_looks(index, filled))


def _draw_errors(axes: Any, errors: ErrorShares) -> None:
    """One bar for each evaluation, its kinds of errors stacked."""
    places = range(len(errors.shares))
    bottoms = [0.0] * len(errors.shares)
    for index, kind in enumerate(errors.kinds):
        heights = [shares[index] for shares in errors.shares]
        # Light enough for black hatches to show.
        looks = {"color": (look(COLOURS, index), 0.6), "hatch": look(HATCHES, index)}
        axes.bar(places, heights, 0.6, bottoms, label=kind, edgecolor="black", **looks)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(places, [_letter(place) for place in places])
    axes.set(title="errors by kind", ylabel="% of problems", xlabel="model", xlim=(-1, len(places)))
    if errors.kinds:
        axes.legend(reverse=True, loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    else:
        axes.text(0.5, 0.5, "no errors", transform=axes.transAxes, ha="center")
