"""An evaluation as one self-contained HTML file."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ranker.evaluation.bootstrap import LEVEL
from ranker.evaluation.caveats import caveats, day
from ranker.evaluation.charts import ROWS_DRAWN_MIN, lift_chart, reliability_chart, slice_chart
from ranker.evaluation.metrics import BINS, DECILE_ACTIONS_MIN, TOP
from ranker.evaluation.page import items, page, picture, section, table
from ranker.evaluation.results import Evaluation
from ranker.evaluation.tables import baseline_lines, baseline_note, baseline_table, head_table, slice_line, slice_table


def report_html(evaluation: Evaluation) -> str:
    """Return the whole page; equal evaluations give equal pages."""
    title = f"Evaluation on {evaluation.data}" if evaluation.data else "Evaluation"
    names = ", ".join(scorer.name for scorer in evaluation.scorers)
    lead = (
        f"{names}, compared with {evaluation.baseline}, on {evaluation.requests:,} requests of {evaluation.users:,} "
        f"users, {day(evaluation.test_start_ms)} to {day(evaluation.test_stop_ms)}."
    )
    against = []
    if evaluation.comparisons:
        note = " ".join((baseline_note(evaluation), *baseline_lines(evaluation)))
        against = [section("Against baselines", table(baseline_table(evaluation)), note)]
    parts = [
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>',
        *against,
        section("Heads", table(head_table(evaluation)), _HEADS_NOTE),
        section("Lift against the baseline", picture(lift_chart(evaluation), "lift of HIT@3 per head"), _LIFT_NOTE),
        section("Reliability", picture(reliability_chart(evaluation), "reliability per head"), _RELIABILITY_NOTE),
        section(
            "By user activity",
            picture(slice_chart(evaluation), "HIT@3 by slice of users") + table(slice_table(evaluation)),
            slice_line(evaluation),
        ),
        section("What was measured", _measured(evaluation)),
        section("What this data cannot show", items(caveats(evaluation))),
    ]
    return page(title, parts)


def write_report(evaluation: Evaluation, path: Path) -> None:
    """Write the page to a file; an existing file is replaced."""
    path.write_text(report_html(evaluation), encoding="utf-8")


_HEADS_NOTE = (
    f"HIT@{TOP} is the number of a request's first {TOP} pins that received the action, averaged over the requests in "
    "which some candidate did. By utility means the final order, given by the bundle's own utility. By head means the "
    "order given by the probability of that head alone. Bold marks the best scorer of a head, or a lift whose interval "
    "excludes 0. AUC is the probability that a row with the action scores higher than a row without it, over all rows. "
    "ECE is the expected calibration error, as a probability; for a rare action it is always small. The worst decile "
    "is the tenth of the rows, by probability, in which the number of actions differs most from the predicted number, "
    f"among those with more than {DECILE_ACTIONS_MIN:.0f}: +20% means that a fifth more came than predicted."
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
