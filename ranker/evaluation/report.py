"""An evaluation as one self-contained HTML file: embedded charts, no scripts, no links."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ranker.evaluation.bootstrap import LEVEL
from ranker.evaluation.caveats import caveats, day
from ranker.evaluation.charts import ROWS_DRAWN_MIN, lift_chart, reliability_chart, slice_chart
from ranker.evaluation.metrics import BINS, TOP
from ranker.evaluation.results import Evaluation
from ranker.evaluation.tables import TextTable, head_table, slice_line, slice_table

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


def report_html(evaluation: Evaluation) -> str:
    """Return the whole page; equal evaluations give equal pages."""
    title = f"Evaluation on {evaluation.data}" if evaluation.data else "Evaluation"
    names = ", ".join(scorer.name for scorer in evaluation.scorers)
    lead = (
        f"{names}, compared with {evaluation.baseline}, on {evaluation.requests:,} requests of {evaluation.users:,} "
        f"users, {day(evaluation.test_start_ms)} to {day(evaluation.test_stop_ms)}."
    )
    parts = [
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>',
        section("Heads", _table(head_table(evaluation)), _HEADS_NOTE),
        section("Lift against the baseline", picture(lift_chart(evaluation), "lift of HIT@3 per head"), _LIFT_NOTE),
        section("Reliability", picture(reliability_chart(evaluation), "reliability per head"), _RELIABILITY_NOTE),
        section(
            "By user activity",
            picture(slice_chart(evaluation), "HIT@3 by slice of users") + _table(slice_table(evaluation)),
            slice_line(evaluation),
        ),
        section("What was measured", _measured(evaluation)),
        section("What this data cannot show", _list(caveats(evaluation))),
    ]
    return page(title, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole page of these parts in the style of reports."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def write_report(evaluation: Evaluation, path: Path) -> None:
    """Write the page to a file; an existing file is replaced."""
    path.write_text(report_html(evaluation), encoding="utf-8")


_HEADS_NOTE = (
    f"HIT@{TOP} is the number of a request's first {TOP} pins that received the action, averaged over the requests in "
    "which some candidate did. By utility means the final order, given by the bundle's own utility. By head means the "
    "order given by the probability of that head alone. Bold marks the best scorer of a head, or a lift whose interval "
    "excludes 0. AUC is the probability that a row with the action scores higher than a row without it, over all rows. "
    "ECE is the expected calibration error, as a probability."
)
_LIFT_NOTE = (
    f"The relative change of HIT@{TOP}, with its {LEVEL:.0%} interval from resampled users. Both sides of a comparison "
    "use the same resamples. There is no interval if more than 5% of the resamples have nothing to compare with, which "
    "means that too few users have the action in the first places."
)
_RELIABILITY_NOTE = (
    f"Rows in {BINS} equal bins of probability, as for the ECE. A larger mark means more rows; bins with fewer than "
    f"{ROWS_DRAWN_MIN} rows are not drawn. On the dashed line, probabilities are calibrated; above it, the model "
    "predicts too low a probability."
)


def section(title: str, body: str, note: str = "") -> str:
    """Return a section; `note` explains its body."""
    noted = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{noted}{body}</section>"


def _table(content: TextTable) -> str:
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
    """Embed a chart, with its meaning for those who cannot see it."""
    if svg is None:
        return "<p>There is no chart, because no bundle could be measured here.</p>"
    # An image rather than inline SVG, so that the identifiers of several charts cannot collide.
    encoded = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(meaning)}" src="data:image/svg+xml;base64,{encoded}">'


def _measured(evaluation: Evaluation) -> str:
    capped = (
        "all" if evaluation.requests_max is None else f"a random sample of about {evaluation.requests_max:,} at most"
    )
    facts = {
        "Data": escape(evaluation.data or "not named"),
        "Test period": f"{day(evaluation.test_start_ms)} to {day(evaluation.test_stop_ms)}, the newest events",
        "Requests": f"{evaluation.requests:,} ({capped}), {evaluation.users:,} users, {evaluation.rows:,} rows",
        "Candidates": f"for each request the logged pins, filled up to {evaluation.candidates} with uniform samples",
        "Seed": str(evaluation.seed),
        "Intervals": f"{evaluation.resamples:,} resamples of users with replacement, percentiles",
    }
    for scorer in evaluation.scorers:
        facts[escape(scorer.name)] = (
            f"{escape(scorer.ref)}, digest <code>{scorer.digest[:12]}</code>, trained on {escape(scorer.trained_on)}"
        )
    for head in evaluation.heads:
        found = f"{head.positives:,} candidates in {head.requests:,} requests of {head.users:,} users"
        facts[f"Head {escape(head.head)}"] = f"{escape(head.meaning)}; {found}"
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items()) + "</dl>"


def _list(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"
