"""Pages that stand alone: one HTML file that asks nothing of a network, on screen and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# The browser itself is told to fetch nothing; only what the page holds may be shown and run.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; }
html { font-size: 16px; }
body { font: 1rem/1.45 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; color: #111;
  background: #fff; margin: 1.5rem auto; padding: 0 1.2rem; max-width: 78rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; max-width: 60rem; } .quiet { color: #555; } code, pre, .mono {
  font-family: ui-monospace, "DejaVu Sans Mono", "Liberation Mono", monospace; font-size: .87em; }
pre { background: #f5f5f5; border: 1px solid #ddd; padding: .7rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th { text-align: left; border-bottom: 2px solid #111; vertical-align: bottom; }
th, td { padding: .15rem .8rem .15rem 0; } td { border-bottom: 1px solid #ddd; }
.figure { text-align: right; white-space: nowrap; } .wide { overflow-x: auto; }
.mark { font-weight: 600; white-space: nowrap; } .wrong .mark { color: #a33c00; }
.right .mark { color: #00664c; }
summary { cursor: pointer; margin: .8rem 0 .3rem; }
@media print { html { font-size: 10px; } body { margin: 0; max-width: none; }
  pre { background: none; } .wide { overflow: visible; } td { overflow-wrap: anywhere; }
  h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole document; ``body`` is HTML, ``script`` runs when all of it has been read."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def table(rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Rows of plain text, the first of them the head; ``names`` columns stand to the left."""
    head, *others = rows
    body = "".join(_row(row, "td", names) for row in others)
    return f'<div class="wide"><table><thead>{_row(head, "th", names)}</thead>{body}</table></div>'


def _row(cells: Sequence[str], tag: str, names: int) -> str:
    looks = ["" if place < names else ' class="figure"' for place in range(len(cells))]
    texts = zip(looks, map(escape, cells), strict=True)
    return "<tr>" + "".join(f"<{tag}{look}>{text}</{tag}>" for look, text in texts) + "</tr>\n"


def listed(items: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
