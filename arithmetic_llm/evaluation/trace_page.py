"""The page of one solution, for lectures: `trace.Trace` -> HTML that stands alone."""

from __future__ import annotations

import base64
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from html import escape
from itertools import accumulate

import numpy as np

from arithmetic_llm.evaluation.html import listed, page, table
from arithmetic_llm.evaluation.interactive import comparison
from arithmetic_llm.evaluation.marks import SYMBOLS, Passage, passages, right_instead
from arithmetic_llm.evaluation.trace import Gaze, Trace, TracedToken
from arithmetic_llm.task.expression import ExpressionError, parse
from arithmetic_llm.task.text import NEW_EXPRESSION

UNSURE = 0.9  # a token less likely than this stands out
STEPS_OF_A_WEIGHT = 255  # a weight takes one byte
MANY = 4  # from more heads on a cell has less room


def trace_page(trace: Trace, model: str, notes: Sequence[str] = ()) -> str:
    """The page of a solution.

    Args:
        model: the name under which the model is shown.
        notes: said before the solution.
    """
    expression = trace.outcome.expression
    body = "\n".join(
        [
            f"<h1>{escape(expression)}</h1>",
            f'<p id="verdict"><strong>{escape(_verdict(trace))}</strong></p>',
            f'<p class="quiet">Written by {escape(model)}, greedily.</p>',
            listed(notes) if notes else "",
            '<div id="columns"><main>',
            _solution(trace),
            "</main><aside>",
            _panel(trace),
            "</aside></div>",
            _token_table(trace),
            f'<script type="application/json" id="gaze">{_data(trace)}</script>',
        ]
    )
    return page(f"Trace of {expression}", body, _STYLE, _SCRIPT)


def _verdict(trace: Trace) -> str:
    """What the solution is worth, in a sentence."""
    try:
        parse(trace.outcome.expression)
    except ExpressionError as error:
        sign = SYMBOLS.right if trace.outcome.correct else SYMBOLS.wrong
        said = "The model refuses it" if trace.outcome.correct else "The model does not refuse it"
        return f"{sign} An invalid expression: {error}. {said}."
    return comparison(trace.outcome, SYMBOLS)


# --------------------------------------------------------------------------------- the solution


def _solution(trace: Trace) -> str:
    """The prompt, then each passage of the text with its mark."""
    prompt = "".join(_given(place, text) for place, text in enumerate(trace.prompt))
    lines = [f'<div class="line">{prompt}</div>']
    found = passages(trace.outcome.text, trace.outcome.verdict)
    tokens: list[list[int]] = [[] for _ in found]
    for token, place in enumerate(passage_of_tokens(trace, found)):
        tokens[place].append(token)
    lines += [_passage(trace, *each) for each in zip(found, tokens, strict=True)]
    return "\n".join(lines)


def passage_of_tokens(trace: Trace, found: Sequence[Passage]) -> list[int]:
    """The passage of each token, by its first character that is no space."""
    texts = [token.text for token in trace.tokens]
    stripped = len("".join(texts)) - len("".join(texts).lstrip())
    ends = [stripped + end for end in accumulate(len(passage.text) for passage in found)]
    starts = accumulate((len(text) for text in texts[:-1]), initial=0)
    firsts = (s + len(t) - len(t.lstrip()) for s, t in zip(starts, texts, strict=True))
    return [min(bisect_right(ends, first), len(found) - 1) for first in firsts]


def _passage(trace: Trace, passage: Passage, tokens: Sequence[int]) -> str:
    kind = "wrong" if passage.wrong else "right" if passage.mark else ""
    first = " first" if passage.first_wrong else ""
    inner = "".join(_written(trace, place) for place in tokens)
    mark = f'<span class="mark">{escape(passage.mark)}</span>' if passage.mark else ""
    instead = ""
    if passage.first_wrong:
        right = right_instead(trace.outcome.expression, trace.outcome.verdict)
        instead = f'<div class="instead">The first error. Right here: {escape(right)}</div>'
    return f'<div class="line {kind}{first}">{inner}{mark}{instead}</div>'


def _given(place: int, text: str) -> str:
    return f'<span class="token given" data-at="{place}"><b>{_visible(text)}</b></span>'


def _written(trace: Trace, index: int) -> str:
    """A token with its probability and its runner-up; a new line begins at a new expression."""
    token = trace.tokens[index]
    unsure = " unsure" if token.probability < UNSURE else ""
    break_ = "<br>" if token.text.strip() and NEW_EXPRESSION.startswith(token.text.strip()) else ""
    return (
        f'{break_}<span class="token{unsure}" tabindex="0" data-at="{len(trace.prompt) + index}" '
        f'data-p="{token.probability:.6g}" data-q="{token.runner_up_probability:.6g}">'
        f"<b>{_visible(token.text)}</b><i>{_percent(token.probability)}</i>"
        f"<u><span>{_visible(token.runner_up)}</span> {_percent(token.runner_up_probability)}</u>"
        "</span>"
    )


def _visible(text: str) -> str:
    """A token's text, spaces shown as dots."""
    return escape(text.replace(" ", "·"))


def _percent(share: float) -> str:
    """``0.9876`` -> ``98.8``, as HTML; nothing but 0 is shown as 0."""
    return "&lt;0.1" if 0 < share < 0.0005 else f"{100 * share:.1f}".removesuffix(".0")


def _token_table(trace: Trace) -> str:
    rows = [["place", "token", "probability", "runner-up", "its probability"]]
    rows += [[str(place), *_cells(t)] for place, t in enumerate(trace.tokens, len(trace.prompt))]
    return f"<details><summary>All tokens as a table</summary>{table(rows, 2)}</details>"


def _cells(token: TracedToken) -> Iterator[str]:
    yield token.text.replace(" ", "·")
    yield f"{token.probability:.6f}"
    yield token.runner_up.replace(" ", "·")
    yield f"{token.runner_up_probability:.6f}"


# -------------------------------------------------------------------------------- the attention


def _head_table(layers: int, heads: int) -> str:
    """A cell for each head, a row for each layer; the script fills them."""
    names = "".join(f"<th>head {head + 1}</th>" for head in range(heads))
    rows = [f"<tr><th></th>{names}</tr>"]
    for layer in range(layers):
        numbers = range(layer * heads, (layer + 1) * heads)
        cells = "".join(f'<td tabindex="0" data-head="{number}"></td>' for number in numbers)
        rows.append(f"<tr><th>layer {layer + 1}</th>{cells}</tr>")
    kind = ' class="many"' if heads > MANY else ""
    return f'<div class="wide"><table id="heads"{kind}>{"".join(rows)}</table></div>'


def _panel(trace: Trace) -> str:
    gaze = trace.gaze
    _, layers, heads, _ = gaze.weights.shape
    return f"""<h2 id="chosen">Point at a token</h2>
<p id="said"></p>
{_head_table(layers, heads)}
<p class="quiet" id="legend">Each cell: where this head looked when the token was written, that is
from the place before it, the largest weights first. Point at a cell to see that head alone in the
text; else the text shows the mean of all heads. Darker is more. Click a token to hold it, again to
let go; arrow keys go on from there.</p>
<p class="quiet">Of each row the page keeps the {gaze.kept} largest attention weights,
{100 * gaze.covered:.1f} % of all attention on average, in steps of 1/{STEPS_OF_A_WEIGHT}.
Boxes: a token, its probability in percent, and the runner-up with its own; a thick frame is a
probability below {100 * UNSURE:.0f} %.</p>"""


def _data(trace: Trace) -> str:
    """The kept weights as JSON: two bytes a place, one byte a weight, (N, L, H, K) in order."""
    _, layers, heads, kept = trace.gaze.weights.shape
    return json.dumps(
        {
            "start": len(trace.prompt),
            "heads": layers * heads,
            "kept": kept,
            "sources": _base64(trace.gaze.sources.numpy().astype("<u2")),
            "weights": _base64(_bytes_of_weights(trace.gaze)),
        }
    )


def _bytes_of_weights(gaze: Gaze) -> np.ndarray:
    return np.rint(gaze.weights.numpy() * STEPS_OF_A_WEIGHT).astype(np.uint8)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


_STYLE = """
#columns { display: grid; grid-template-columns: minmax(0, 1fr) minmax(20rem, 38%); gap: 1.5rem; }
aside { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow: auto; }
.line { padding: .25rem .5rem; margin: .3rem 0; border-left: 4px solid #ccc; }
.line.right { border-left: 4px solid #00664c; } .line.wrong { border-left: 4px dashed #a33c00; }
.line.first { border-left: 10px solid #a33c00; outline: 1px solid #a33c00; }
.instead { font-style: italic; }
.line .mark { margin-left: .6rem; }
.token { display: inline-block; text-align: center; vertical-align: top; line-height: 1.1;
  border: 1px solid #ccc; border-radius: 3px; margin: 1px; padding: 1px 3px; cursor: pointer;
  font-family: ui-monospace, "DejaVu Sans Mono", "Liberation Mono", monospace; background: #fff; }
.token b { display: block; font-size: 15px; } .token i, .token u { display: block; font-size: 9px;
  font-style: normal; text-decoration: none; color: #333; }
.token u { color: #666; white-space: nowrap; } .token u span { display: inline-block;
  max-width: 2.1rem; overflow: hidden; text-overflow: ellipsis; vertical-align: bottom; }
.token.given { border-style: dotted; cursor: default; }
.token.unsure { border: 3px solid #111; } .token.chosen { outline: 3px solid #d55e00; }
.token.dark, .token.dark i, .token.dark u { color: #fff; }
#heads { font-size: 11px; } #heads td { border: 1px solid #ccc; padding: 2px 4px; cursor: pointer;
  vertical-align: top; white-space: nowrap; } #heads th { border: 0; padding: 2px 4px; }
#heads td.chosen { outline: 3px solid #d55e00; outline-offset: -3px; }
#heads th { white-space: nowrap; } #heads td div { display: flex; gap: .3em; }
#heads td span { max-width: 3.4rem; overflow: hidden; text-overflow: ellipsis; }
.token { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
#columns:has(.many) { grid-template-columns: minmax(0, 1fr) 47%; }
#heads.many { font-size: 10px; } #heads.many td span { max-width: 1.8rem; }
#heads.many td { padding: 2px; }
@media (max-width: 60rem) { #columns, #columns:has(.many) { grid-template-columns: minmax(0, 1fr); }
  aside { bottom: 0; top: auto; background: #fff; border-top: 2px solid #111; max-height: 45vh; } }
@media print { #columns { display: block; } aside { position: static; max-height: none; } }
"""

_SCRIPT = r"""
"use strict";
const gaze = JSON.parse(document.getElementById("gaze").textContent);
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const weights = bytes(gaze.weights), places = new DataView(bytes(gaze.sources).buffer);
const tokens = [...document.querySelectorAll(".token")];
const cells = [...document.querySelectorAll("#heads td")];
const written = tokens.filter(token => token.dataset.p);
const name = token => token.querySelector("b").textContent;
const percent = byte => (100 * byte / 255).toFixed(0) + "\u00a0%";
let shown = null, held = null, head = null;

// What one head kept of the row of a token: [place, byte], the largest first.
function looks(token, head) {
  const row = (token.dataset.at - gaze.start) * gaze.heads + head, found = [];
  for (let i = row * gaze.kept; i < (row + 1) * gaze.kept && weights[i]; i++)
    found.push([places.getUint16(2 * i, true), weights[i]]);
  return found;
}

function paint() {
  const share = new Float64Array(tokens.length), heads = head === null ? [...cells.keys()] : [head];
  for (const h of heads)
    for (const [place, byte] of looks(shown, h)) share[place] += byte / 255 / heads.length;
  tokens.forEach((token, place) => {
    const dark = Math.sqrt(share[place]);
    token.style.background = dark > 0.05 ? `rgba(0, 66, 110, ${dark})` : "";
    token.classList.toggle("dark", dark > 0.5);
    token.title = share[place] > 0.002 ? `attention ${(100 * share[place]).toFixed(1)} %` : "";
    token.classList.toggle("chosen", token === shown);
  });
  cells.forEach((cell, h) => cell.classList.toggle("chosen", h === head));
}

// A line of a cell: a token that a head looked at, clipped if it is long, and how much.
function look([place, byte]) {
  const line = document.createElement("div"), who = document.createElement("span");
  who.textContent = name(tokens[place]);
  line.title = `token ${place}`;
  line.append(who, ` ${percent(byte)}`);
  return line;
}

function show(token) {
  shown = token;
  const own = token.children[0], other = token.querySelector("u span");
  const last = tokens[token.dataset.at - 1];
  document.getElementById("chosen").textContent = `Token ${token.dataset.at}: ${own.textContent}`;
  document.getElementById("said").textContent =
    `Probability ${(100 * token.dataset.p).toPrecision(4)} %; ` +
    `runner-up ${other.textContent} with ` +
    `${(100 * token.dataset.q).toPrecision(2)} %. Written after ${name(last)}.`;
  cells.forEach((cell, h) => cell.replaceChildren(...looks(token, h).slice(0, 3).map(look)));
  paint();
}

function hold(token) {
  held = token;
  if (token) show(token);
}

for (const token of written) {
  token.addEventListener("mouseover", () => held || show(token));
  token.addEventListener("focus", () => show(token));
  token.addEventListener("click", () => hold(held === token ? null : token));
}
cells.forEach((cell, h) => {
  for (const event of ["mouseover", "focus"])
    cell.addEventListener(event, () => { head = h; paint(); });
  for (const event of ["mouseout", "blur"])
    cell.addEventListener(event, () => { head = null; paint(); });
});
document.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const next = step && tokens[+shown.dataset.at + step];
  if (next && next.dataset.p) { event.preventDefault(); hold(next); next.focus(); }
});
// The address may name a token: trace.html#57. Else the least certain one is shown.
const asked = written.find(token => "#" + token.dataset.at === location.hash);
const unsure = written.reduce((a, b) => (+b.dataset.p < +a.dataset.p ? b : a));
if (asked) hold(asked); else show(unsure);
"""
