"""A report as one self-contained HTML page: embedded charts, no scripts, no links."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from ranker.evaluation.tables import TextTable

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; background: #fff; max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead, p.note { color: #555; } p.note { font-size: .88rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th { text-align: left; border-bottom: 2px solid #999; vertical-align: bottom; }
th, td { padding: .22rem .7rem .22rem 0; } td.n, th.n { text-align: right; }
tbody tr:first-child td { border-top: 1px solid #ccc; }
td b { color: #000; } img { max-width: 100%; display: block; margin: .6rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; } dt { color: #555; } dd { margin: 0; }
code { font-size: .85em; } .wide { overflow-x: auto; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole page of parts that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    noted = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{noted}{body}</section>"


def table(content: TextTable) -> str:
    words = [place < content.left or heading == "scorer" for place, heading in enumerate(content.headings)]
    classes = ["" if word else ' class="n"' for word in words]
    head = "".join(f"<th{c}>{escape(h)}</th>" for c, h in zip(classes, content.headings, strict=True))
    bodies = []
    for block in content.blocks:
        lines = []
        for line in block:
            texts = (f"<b>{escape(cell.text)}</b>" if cell.strong else escape(cell.text) for cell in line)
            lines.append("<tr>" + "".join(f"<td{c}>{t}</td>" for c, t in zip(classes, texts, strict=True)) + "</tr>")
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>'


def picture(svg: str | None, meaning: str) -> str:
    if svg is None:
        return "<p>There is no chart, because no bundle could be measured here.</p>"
    # An image rather than inline SVG, so that the identifiers of several charts cannot collide.
    encoded = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(meaning)}" src="data:image/svg+xml;base64,{encoded}">'


def items(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"
