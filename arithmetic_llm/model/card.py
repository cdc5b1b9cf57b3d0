"""The model card: what a model is, what it has seen, how good it is, and how to use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from arithmetic_llm.corpus.coverage import Coverage
from arithmetic_llm.model.checkpoint import Checkpoint
from arithmetic_llm.model.tokenizer import BOS, END_THINK, EOS, THINK
from arithmetic_llm.runtime import readable_limit
from arithmetic_llm.task.solution import solve
from arithmetic_llm.task.text import SPECIAL_TOKENS, problem_text, prompt_text, sequence_text

Metrics = dict[str, Any]  # the content of an evaluation_metrics_*.json
EXAMPLE = "5 + (10 - 3)"

_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- arithmetic
- qwen3
---

# Arithmetic, step by step"""

_USE = """\
## How to use it

The tokenizer adds nothing by itself: the prompt begins with `{bos}` as text, has single spaces
around binary operators, and ends with `{think}` and no space after it. For `{example}` it is
`{prompt}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = "{prompt}"
written = model.generate(**tokenizer(prompt, return_tensors="pt"))  # greedy, by its own settings
print(tokenizer.decode(written[0]))
```

A model that is right writes

```
{answer}
```

Keep special tokens when decoding (`skip_special_tokens=False`, the default): `{close}` is one."""

_UNITS_FIRST = """\
Decode a text as a whole. Its tokens have the units of a number first, so what makes text of one
token after another (a stream, or a server that sends text) would show `723` as `327`."""


def card_text(checkpoint: Checkpoint, metrics: Metrics | None = None) -> str:
    """The card as Markdown with the Hub's header.

    Raises:
        KeyError, TypeError, ValueError: the metrics lack a figure, or it is of another form.
    """
    parts = [_HEAD, _what(checkpoint), _training(checkpoint), _evaluation(metrics), _usage()]
    parts += [_UNITS_FIRST] if checkpoint.tokenizer.units_first else []
    return "\n\n".join(parts) + "\n"


def _what(checkpoint: Checkpoint) -> str:
    model, config = checkpoint.model, checkpoint.model.config
    return (
        f"A decoder-only transformer of {model.parameter_count():,} parameters that solves "
        "arithmetic with `+`, `-` and\nparentheses and writes down each step. The architecture is "
        f"Qwen3: {config.num_layers} layers of {config.nhead} heads, width\n{config.d_model}, "
        f"{model.vocab_size} tokens, a context of {config.max_seq_length:,} tokens, fp32. It knows "
        "nothing but this task."
    )


def _training(checkpoint: Checkpoint) -> str:
    seen = checkpoint.trained_on
    lines = [*_seen(seen)] if seen else ["Nothing is known of the problems it was trained on."]
    stage = f"Last stage: {checkpoint.stage}, step {checkpoint.step:,}."
    return "\n".join(["## What it was trained on", "", stage, "", *lines])


def _seen(seen: Coverage) -> Iterator[str]:
    low, high = seen.all_numbers
    yield f"- numbers {low} to {high}"
    if seen.depths:
        yield f"- expression trees of depth {_listed(seen.depths)}"
    if seen.flat_terms:
        yield f"- flat sums of {_listed(seen.flat_terms)} numbers"
    yield f"- styles: {_counted(seen.styles)}"
    yield f"- splits of the problems: {_counted(seen.splits)}"


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())


def _usage() -> str:
    answer = sequence_text(problem_text(EXAMPLE), solve(EXAMPLE).text)
    return _USE.format(
        bos=SPECIAL_TOKENS[BOS],
        think=SPECIAL_TOKENS[THINK],
        close=SPECIAL_TOKENS[END_THINK],
        example=EXAMPLE,
        prompt=hub_prompt(EXAMPLE),
        answer=SPECIAL_TOKENS[BOS] + answer + SPECIAL_TOKENS[EOS],
    )


def hub_prompt(expression: str) -> str:
    """The prompt as text; its ids are those of `ArithmeticTokenizer.prompt_ids`."""
    return SPECIAL_TOKENS[BOS] + prompt_text(expression)


# ---------------------------------------------------------------------------------- figures


def _evaluation(metrics: Metrics | None) -> str:
    if metrics is None:
        return "## Evaluation\n\nNo evaluation came with this export."
    rows = [
        "| problems | samples | exact match | 95 % interval | parse | steps |",
        "|---|---|---|---|---|---|",
        *(_row(name, row) for name, row in _rows(metrics)),
    ]
    return "\n".join(["## Evaluation", "", _test(metrics), "", *rows, "", _MEANING])


_MEANING = """\
Exact match: the text ends by itself with one result, and it is the right one; parse: it ends so,
right or wrong; steps: of the steps needed, those right before the first wrong one. A star marks
problems of a kind that was never solved in training."""


def _test(metrics: Metrics) -> str:
    settings = metrics["settings"]
    if settings.get("test_file"):
        problems = f"All problems of the file `{settings['test_file']}`"
    else:
        low, high = settings["num_range"]
        problems = (
            f"Problems of the test split in {settings['style']} style, numbers {low} to {high}"
        )
    temperature = settings["temperature"]
    way = "greedy decoding" if temperature == 0 else f"sampled at temperature {temperature:g}"
    return f"{problems}; {way}, {readable_limit(settings)}."


def _rows(metrics: Metrics) -> Iterator[tuple[str, Metrics]]:
    named = [(f"depth {row['depth']}", row) for row in metrics["by_depth"]]
    named += [(f"{row['terms']} numbers", row) for row in metrics["by_terms"]]
    named += [("invalid", metrics["invalid"])] if metrics["invalid"] else []
    for name, row in named:
        yield name + (" *" if row["trained"] is False else ""), row
    yield "all", {**metrics, "samples": metrics["total_samples"]}


def _row(name: str, row: Metrics) -> str:
    figures = (row[key] for key in ("exact_match_accuracy", "parse_success_rate"))
    exact, parse = (_percent(figure) for figure in figures)
    interval = f"{row['low']:.1f} to {row['high']:.1f}"
    steps = _percent(row["step_validity_rate"])
    return f"| {name} | {row['samples']:,} | {exact} | {interval} | {parse} | {steps} |"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
