"""Pictures of a study, in the style of the package's other pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from arithmetic_llm.evaluation.plots import (
    COLOURS,
    MARKERS,
    SETTINGS,
    STYLES,
    as_label,
    look,
    matplotlib,
    new_figure,
)
from arithmetic_llm.study.spec import EXACT, Criterion, shown_value
from arithmetic_llm.study.table import Reached, Results

WIDTH = 9.0  # inches
MOST_COLUMNS = 3
UNIT = "% of problems, 95 % interval"


class Series(NamedTuple):
    """Arms that differ in one number alone."""

    name: str
    x: list[float]
    arms: list[Reached]


# ---------------------------------------------------------------------------------------- the data


def numeric_axis(arms: Sequence[Reached]) -> str:
    """The flag that arms are drawn against: the first with three numbers or more; or nothing."""
    for flag in dict.fromkeys(flag for arm in arms for flag in arm.arm.place):
        values = [arm.arm.place[flag] for arm in arms if flag in arm.arm.place]
        if all(type(value) in (int, float) for value in values) and len({*values}) >= 3:
            return flag
    return ""


def series_of(arms: Sequence[Reached], flag: str) -> list[Series]:
    """The arms of the grid by all that is not the flag, each series ascending."""
    groups: dict[str, list[Reached]] = {}
    for arm in arms:
        if flag in arm.arm.place:
            rest = [shown_value(v) for name, v in arm.arm.place.items() if name != flag]
            groups.setdefault(", ".join(rest), []).append(arm)
    found = []
    for name, group in groups.items():
        group = sorted(group, key=lambda arm: arm.arm.place[flag])
        found.append(Series(name, [arm.arm.place[flag] for arm in group], group))
    return found


def depth_grid(arms: Sequence[Reached]) -> tuple[list[str], list[list[float | None]]]:
    """Rows of the test, and of each arm the share that is right in each; None where it has none."""
    rows = list(dict.fromkeys(row for arm in arms for run in arm.runs for row in run.rows))
    return rows, [
        [
            arm.mean(Criterion(row, EXACT)) if all(row in run.rows for run in arm.runs) else None
            for row in rows
        ]
        for arm in arms
    ]


# --------------------------------------------------------------------------------------- drawing


def draw_results(results: Results) -> Any:
    """A panel for each row that counts: arms against a number that varies, or one below another."""
    flag = numeric_axis(results.arms)
    with matplotlib("").rc_context(SETTINGS):
        figure = draw_against(results, flag) if flag else draw_below_each_other(results)
        figure.suptitle(as_label(results.study.name))
        return figure


def draw_against(results: Results, flag: str) -> Any:
    """The arms against the values of a flag."""
    figure, panels = panels_of(results, 3.4)
    for axes, row in panels:
        draw_lines(axes, results, row, flag)
    figure.supylabel(UNIT)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_below_each_other(results: Results) -> Any:
    """The arms one below another."""
    figure, panels = panels_of(results, 0.8 + 0.28 * len(results.arms), sharey=True)
    for axes, row in panels:
        draw_dots(axes, results, row)
    figure.supxlabel(UNIT)
    return figure


def panels_of(
    results: Results, height: float, sharey: bool = False
) -> tuple[Any, list[tuple[Any, Criterion]]]:
    """A figure with a panel of so many inches for each row, under its name."""
    rows = results.study.judged_by
    columns = min(MOST_COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    figure = new_figure(WIDTH, lines * height + 0.6)
    every = figure.subplots(lines, columns, squeeze=False, sharey=sharey).flat
    for axes in every[len(rows) :]:
        axes.set_visible(False)
    panels = [*zip(every, rows, strict=False)]
    for axes, row in panels:
        axes.set_title(str(row))
    return figure, panels


def draw_lines(axes: Any, results: Results, row: Criterion, flag: str) -> None:
    """Series against a flag's value; arms beside the grid as level lines, intervals shaded."""
    series = series_of(results.arms, flag)
    values = sorted({x for each in series for x in each.x})
    doubles = values[0] > 0 and values[-1] >= 8 * values[0]
    for index, each in enumerate(series):
        shares, bars = points(results, each.arms, row)
        aside = 0.012 * (index - (len(series) - 1) / 2)  # of the width, so that bars stand apart
        by = (values[-1] / values[0]) ** aside if doubles else (values[-1] - values[0]) * aside
        x = [x * by if doubles else x + by for x in each.x]
        looks = {**line_looks(index), "marker": look(MARKERS, index), "capsize": 3}
        axes.errorbar(x, shares, yerr=bars, label=as_label(each.name or flag), **looks)
    beside = [arm for arm in results.arms if flag not in arm.arm.place]
    for index, arm in enumerate(beside, len(series)):
        axes.axhline(100 * arm.mean(row), label=as_label(arm.arm.name), **line_looks(index))
        low, high = results.interval(arm, row)
        axes.axhspan(100 * low, 100 * high, color=look(COLOURS, index), alpha=0.12, linewidth=0)
    if doubles:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [shown_value(value) for value in values])
    axes.minorticks_off()
    axes.set(xlabel=flag)


def line_looks(index: int) -> dict[str, Any]:
    """Colour and style of a line."""
    return {"color": look(COLOURS, index), "linestyle": look(STYLES, index)}


def draw_dots(axes: Any, results: Results, row: Criterion) -> None:
    """The arms one below another, each with its interval and, small, its seeds."""
    places = range(len(results.arms))
    shares, bars = points(results, results.arms, row)
    for place, arm in zip(places, results.arms, strict=True):
        seeds = [100 * share for share in arm.shares(row)]
        axes.plot(seeds, [place] * len(seeds), "|", color="dimgray", markersize=10)
        mean, bar = [shares[place]], [[bars[0][place]], [bars[1][place]]]
        axes.errorbar(mean, [place], xerr=bar, marker="o", color=COLOURS[0], capsize=3)
    axes.set_yticks(places, [as_label(arm.arm.name) for arm in results.arms])
    axes.set(ylim=(len(results.arms) - 0.5, -0.5))
    axes.margins(x=0.1)


def points(
    results: Results, arms: Sequence[Reached], row: Criterion
) -> tuple[list[float], list[list[float]]]:
    """Percentages, and how far their intervals reach below and above."""
    shares = [100 * arm.mean(row) for arm in arms]
    ends = [[100 * end for end in results.interval(arm, row)] for arm in arms]
    below = [max(0.0, share - low) for share, (low, _) in zip(shares, ends, strict=True)]
    above = [max(0.0, high - share) for share, (_, high) in zip(shares, ends, strict=True)]
    return shares, [below, above]


def draw_grid(results: Results) -> Any:
    """Exact match by arm and row of the test, in shades of grey with the number in each."""
    rows, shares = depth_grid(results.arms)
    with matplotlib("").rc_context({**SETTINGS, "axes.grid": False}):
        figure = new_figure(2.5 + 0.7 * len(rows), 1.2 + 0.3 * len(shares))
        axes = figure.subplots()
        filled = [[-1.0 if share is None else 100 * share for share in line] for line in shares]
        axes.imshow(filled, cmap="gray", vmin=-40, vmax=100, aspect="auto")
        for y, line in enumerate(filled):
            for x, value in enumerate(line):
                text = percent_text(value)
                axes.text(x, y, text, ha="center", va="center", color=ink(value))
        axes.set_xticks(range(len(rows)), rows, rotation=30)
        axes.set_yticks(range(len(shares)), [as_label(arm.arm.name) for arm in results.arms])
        axes.set_title("exact match, % of problems")
        return figure


def percent_text(value: float) -> str:
    """A share in whole percent, for which 100 is all and not nearly all; "-" for none."""
    if 99.5 <= value < 100:
        return f"{math.floor(10 * value) / 10}"
    return "-" if value < 0 else f"{value:.0f}"


def ink(value: float) -> str:
    """A colour that can be read on the shade of a value."""
    return "black" if value > 35 else "white"
