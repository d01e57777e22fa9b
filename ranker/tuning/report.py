"""A tuning as one self-contained HTML file: an embedded chart, no scripts, no links."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ranker.evaluation.caveats import day
from ranker.evaluation.page import page, picture, section
from ranker.tuning.charts import front_chart
from ranker.tuning.inputs import TuningData
from ranker.tuning.results import TunedWeights
from ranker.tuning.tables import HEADINGS, alert_lines, party_rows, summary

_PARTIES_NOTE = (
    "A value is the mean over requests of the sum of each position's discount, 1 / log2(position + 2), times the "
    "party's utility there. Intervals are 95% percentiles over resampled users. The exchange rate is the multiplier: "
    "what one more unit for the party costs the maximised party."
)
_FRONT_NOTE = (
    "The most that the objective can be for each theta of one party, while the other thetas hold. The dashed line "
    "marks the theta that was asked for. A point of the weights in force above a front violates another theta."
)
_LIMITS = (
    "Values are predictions of the network; whether users act so is measured by serving the weights to some of them.",
    "Other weights could return candidates that a logged answer left out; this cannot see what those are worth.",
    "What the constrained parties get holds for users like these; the check on held-out users shows how well.",
)


def write_report(path: Path, data: TuningData, model: str, tuned: TunedWeights, notes: Sequence[str] = ()) -> None:
    """Write the page to a file; an existing file is replaced."""
    path.write_text(report_html(data, model, tuned, notes), encoding="utf-8")


def report_html(data: TuningData, model: str, tuned: TunedWeights, notes: Sequence[str] = ()) -> str:
    """Return the whole page; equal tunings give equal pages."""
    title = f"Weights of {model} on {data.surface}"
    lead = (
        f"Tuned on {tuned.requests:,} requests of {tuned.users:,} users of {data.name}, {day(data.since_ms)} to "
        f"{day(data.until_ms)}."
    )
    return page(
        title,
        [
            f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>',
            section("Parties", _table(HEADINGS, party_rows(tuned)), _PARTIES_NOTE),
            section("How good the weights are", _list([*summary(tuned), *notes])),
            section("What each theta costs", picture(front_chart(tuned), "Pareto fronts"), _FRONT_NOTE),
            section("What to watch", f"<p><code>{escape(' '.join(alert_lines(tuned, data.surface)))}</code></p>"),
            section("What this data cannot show", _list(_LIMITS)),
        ],
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    classes = ["", *[' class="n"'] * (len(headings) - 1)]
    head = "".join(f"<th{c}>{escape(h)}</th>" for c, h in zip(classes, headings, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(classes, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"
