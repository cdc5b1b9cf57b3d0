"""Results as text: the summary of one evaluation, and the table that a pipeline ends with.

Everything is made from the plain metrics that `metrics.EvaluationResult` stores as JSON, so that
an old evaluation is shown like a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arithmetic_llm.runtime import readable_limit

GOOD, EXCELLENT, READABLE = 60.0, 80.0, 90.0  # percent; the last one of texts with a result
# From so many problems of trained depths on they have a sentence: their 95 % interval is at most
# 20 points wide, as "good" itself is. With fewer the rate would be chance.
ENOUGH = 100

_ERROR_HINTS = {
    "arithmetic": "a step's result is wrong: more training, or more one-step drills",
    "wrong_reduction": "not the operation whose turn it was: more problems of these depths",
    "wrong_copy": "the expression was copied wrongly: more training on these depths and styles",
    "unparseable": "the text has lost its form: train longer, or check the corpus",
    "cut_off": "right as far as it went: raise --max-gen-length",
}

Metrics = dict[str, Any]

# -------------------------------------------------------------------------- one evaluation


def summary_text(metrics: Metrics) -> str:
    """The content of ``evaluation_summary_*.txt``."""
    parts = [
        heading("EVALUATION SUMMARY", metrics["settings"]),
        overall(metrics),
        depth_table(metrics),
        errors(metrics),
        *notes(metrics),
        f"Where the model stands: {standing(metrics)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(title: str, settings: dict[str, Any]) -> str:
    """Heading: the model, the test and the way of decoding."""
    model = settings.get("model_path", "a model in memory")
    lines = [title, "=" * len(title), f"Model     {model}"]
    if "stage" in settings:
        lines[-1] += f" ({settings['stage']}, step {settings['step']:,})"
    return "\n".join([*lines, f"Test      {_test(settings)}", f"Decoding  {_decoding(settings)}"])


def _test(settings: dict[str, Any]) -> str:
    if settings.get("test_file"):
        return settings["test_file"]
    if "style" not in settings:
        return "problems given by the caller"
    size = (
        f"2 to {settings['flat_terms']} numbers"
        if settings["style"] == "flat"
        else f"depth {settings['min_depth']} to {settings['max_depth']}"
    )
    low, high = settings["num_range"]
    return (
        f"{settings['style']} problems of the test split, {size}, numbers {low} to {high}, "
        f"invalid rate {settings['invalid_rate']:g}, seed {settings['seed']}"
    )


def _decoding(settings: dict[str, Any]) -> str:
    greedy = settings["temperature"] == 0
    how = "greedy" if greedy else f"sampled at temperature {settings['temperature']:g}"
    if not greedy and settings["top_k"]:
        how += f", top-k {settings['top_k']}"
    if not greedy and settings["top_p"] < 1:
        how += f", top-p {settings['top_p']:g}"
    return f"{how}, {readable_limit(settings)}, {settings['precision']} on {settings['device']}"


def overall(metrics: Metrics) -> str:
    """The figures over all problems, invalid ones included."""
    trained = metrics["trained_depths"]
    lines = [
        ("Exact match", _share(metrics, metrics["correct_samples"], metrics["total_samples"])),
        ("  trained depths", _share(trained, trained["correct"], trained["samples"])),
        ("Parse success", _percent(metrics["parse_success_rate"])),
        ("Step validity", _percent(metrics["step_validity_rate"])),
        ("Whole trace right", _percent(metrics["exact_trace_rate"])),
        ("Cut off", _percent(metrics["cut_off_rate"])),
        ("Mean length", f"{metrics['avg_generation_length']:.1f} tokens"),
        ("Time", f"{metrics['seconds']:.1f} s, {metrics['tokens_per_second']:,} tokens/s"),
    ]
    return "\n".join(f"{name:<19}{value}" for name, value in lines)


def depth_table(metrics: Metrics) -> str:
    """A line for each exact depth, number of terms, and for the invalid expressions."""
    rows = [["", "samples", "correct", "exact match", "95 % interval", "parse", "steps", "cut off"]]
    rows += [
        [
            name,
            f"{row['samples']:,}",
            f"{row['correct']:,}",
            _percent(row["exact_match_accuracy"]),
            _interval(row),
            _percent(row["parse_success_rate"]),
            _percent(row["step_validity_rate"]),
            _percent(row["cut_off_rate"]),
        ]
        for name, row in named_rows(metrics)
    ]
    return _table(rows) + footnote(rows)


def errors(metrics: Metrics) -> str:
    """Kinds of errors in the wrong answers, the most frequent first."""
    if not metrics["errors"]:
        return "Errors: none"
    lines = [
        f"  {kind:<17}{count:>6,}  {_ERROR_HINTS[kind]}"
        for kind, count in metrics["errors"].items()
    ]
    return "\n".join(["Errors, by the first thing that went wrong:", *lines])


def notes(metrics: Metrics) -> list[str]:
    """Limits of the metrics: problems seen in training, long texts, near-ties."""
    settings, ties, found = metrics["settings"], metrics["near_ties"], []
    if settings.get("in_train_split"):
        found.append(
            f"Note: {settings['in_train_split']:,} of the {metrics['total_samples']:,} problems "
            "belong to the train split; the model may have seen them."
        )
    if metrics["beyond_context"]:
        found.append(
            f"Note: {metrics['beyond_context']:,} texts ran beyond the trained context of "
            f"{settings['context']:,} tokens."
        )
    if ties["samples"]:
        found.append(
            f"Note: {ties['samples']:,} texts hang on a near-tie (smallest gap between two logits "
            f"{ties['smallest_margin']:.1e}); another machine or batch size may write them "
            "differently."
        )
    return found


def standing(metrics: Metrics) -> str:
    """Standing of the model in words, by the exact match over all problems.

    Trained depths have a sentence of their own if enough of the problems are of them.
    """
    total, trained = metrics["total_samples"], metrics["trained_depths"]
    word, bound = _grade(metrics["exact_match_accuracy"])
    words = f"{word}, {_match('overall', metrics, total)}; {bound}."
    if ENOUGH <= trained["samples"] < total:
        words += f" It reaches {_match('on trained depths', trained, trained['samples'])}."
    readable = metrics["parse_success_rate"]
    if readable <= READABLE:
        words += f" Only {readable:.1f} % of its texts end with a result; that should pass 90 %."
    return words


def _grade(rate: float) -> tuple[str, str]:
    """The word for an exact match in percent, and where that word begins and ends."""
    if rate >= EXCELLENT:
        return "excellent", f"{EXCELLENT:.0f} % and above is"
    if rate >= GOOD:
        return "good", f"{GOOD:.0f} to {EXCELLENT:.0f} % is"
    return "not there yet", f"good is from {GOOD:.0f} %"


def _match(where: str, metrics: dict[str, Any], samples: int) -> str:
    interval = f"95 % interval {metrics['low']:.1f} to {metrics['high']:.1f} %"
    rate = metrics["exact_match_accuracy"]
    return f"{rate:.1f} % exact match {where} ({samples:,} problems, {interval})"


# ------------------------------------------------------------------------- a whole pipeline

Stage = tuple[str, Metrics | None, float]  # name, metrics if it was evaluated, seconds it took


def stage_table(stages: Sequence[Stage]) -> str:
    """Table of what each stage of a pipeline took and reached, by exact depth."""
    rows = stage_rows(stages)
    return _table(rows, names=2) + footnote(rows, column=1)


def stage_rows(stages: Sequence[Stage]) -> list[list[str]]:
    """The cells of that table, its head first."""
    rows = [["stage", "", "exact match", "95 % interval", "parse", "steps", "seconds"]]
    for name, metrics, seconds in stages:
        for place, line in enumerate(_stage_lines(metrics)):
            first, last = (name, f"{seconds:,.0f}") if place == 0 else ("", "")
            rows.append([first, *line, last])
    total = sum(seconds for _, _, seconds in stages)
    return [*rows, ["all stages", "", "", "", "", "", f"{total:,.0f}"]]


def _stage_lines(metrics: Metrics | None) -> list[list[str]]:
    if metrics is None:
        return [["", "", "", "", ""]]
    return [
        [
            name,
            _percent(row["exact_match_accuracy"]),
            _interval(row),
            _percent(row["parse_success_rate"]),
            _percent(row["step_validity_rate"]),
        ]
        for name, row in [*named_rows(metrics), ("all", metrics)]
    ]


# ---------------------------------------------------------------------------------- pieces


def named_rows(metrics: Metrics) -> list[tuple[str, dict[str, Any]]]:
    """Every row with its name; a star marks what the checkpoint never saw in training."""
    rows = [(f"depth {row['depth']}", row) for row in metrics["by_depth"]]
    rows += [(f"{row['terms']} terms", row) for row in metrics["by_terms"]]
    rows += [("invalid", metrics["invalid"])] if metrics["invalid"] else []
    return [(name + (" *" if row["trained"] is False else ""), row) for name, row in rows]


def footnote(rows: Sequence[Sequence[str]], column: int = 0) -> str:
    """Meaning of the star, on a line of its own, if a row of a table has one."""
    starred = any(row[column].endswith("*") for row in rows)
    return "\n* never solved in training (depth, numbers or style)" if starred else ""


def _share(metrics: dict[str, Any], correct: int, samples: int) -> str:
    if not samples:
        return "none tested"
    rate = _percent(metrics["exact_match_accuracy"])
    return f"{rate}  {_interval(metrics)}  {correct:,} of {samples:,}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _interval(metrics: dict[str, Any]) -> str:
    return f"[{metrics['low']:.2f}, {metrics['high']:.2f}]"


def _table(rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Columns two spaces apart: the first ``names`` of them to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        padded = [c.ljust(w) if i < names else c.rjust(w) for i, (c, w) in enumerate(cells)]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, rows))
