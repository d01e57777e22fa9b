"""An evaluated policy as one self-contained HTML file."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ranker.counterfactual.charts import difference_chart
from ranker.counterfactual.estimators import ESTIMATORS
from ranker.counterfactual.evaluate import PolicyEvaluation
from ranker.counterfactual.tables import answer_lines, bound_lines, forecast_table, overlap_table
from ranker.evaluation.caveats import day
from ranker.evaluation.page import items, page, picture, section, table

_NAMES = {"orders": "Whole orders", "positions": "Single positions"}


def report_html(evaluation: PolicyEvaluation) -> str:
    """Return the whole page; equal evaluations give equal pages."""
    title = f"What {evaluation.policy} would have earned"
    lead = (
        f"Compared with {evaluation.baseline} on {evaluation.requests:,} logged answers of {evaluation.model} on "
        f"{evaluation.surface} to {evaluation.users:,} users, {day(evaluation.start_ms)} to {day(evaluation.stop_ms)}."
    )
    chart = difference_chart(evaluation)
    parts = [
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>',
        section(
            "What the log covers",
            items(answer_lines(evaluation)) + table(overlap_table(evaluation)) + items(_refusals(evaluation)),
            _OVERLAP_NOTE,
        ),
        section(
            "Difference to the baseline",
            "<p>There is no chart, because everything was refused.</p>"
            if chart is None
            else picture(chart, "difference"),
            _DIFFERENCE_NOTE,
        ),
    ]
    for unit in evaluation.units:
        if unit.refused is None:
            body = table(forecast_table(evaluation, unit.unit, tuple(ESTIMATORS)))
            body += items(bound_lines(evaluation, unit.unit))
            parts.append(section(_NAMES[unit.unit], body, _UNIT_NOTES[unit.unit]))
    parts += [
        section("What was measured", items(_facts(evaluation))),
        section("What this log cannot show", items(list(CAVEATS))),
    ]
    return page(title, parts)


def write_report(evaluation: PolicyEvaluation, path: Path) -> None:
    """Write the page to a file; an existing file is replaced."""
    path.write_text(report_html(evaluation), encoding="utf-8")


CAVEATS = (
    (
        "Answers that do not hold all candidates of their requests do not count, because the log does not hold the "
        "pins that a policy might have shown instead."
    ),
    "What another policy would do to a user's later requests is not in the log.",
    "Actions after the join's window do not count.",
    "Rewards of both sides are those of the evaluated table, with the user's actions in place of probabilities.",
)
_OVERLAP_NOTE = (
    "The effective number of users says how many users would give estimates as certain if all weights were equal. "
    "Support estimates the share of the policy's answers that logging could have given; it is about 1 if exploration "
    "covers the policy. Too little of either is refused: there is no number to mistake for evidence."
)
_DIFFERENCE_NOTE = (
    "Per request, with the 95% interval from resampled users; both sides of a difference use the same resamples. The "
    "direct method (dm) is not drawn: it is as wrong as the reward model, and its interval does not know that."
)
_UNIT_NOTES = {
    "orders": (
        "A logged answer counts if the policy would have given the same order, by the inverse of its probability. "
        "Nothing is supposed about how pins influence each other. ips: inverse propensity scoring; snips: normalised "
        "by the weights; clipped: no weight above the limit; dm: the reward model alone; dr: doubly robust; sndr and "
        "clipped-dr: dr with normalised and with clipped weights."
    ),
    "positions": (
        "A pin counts if the policy would have put it at the same position. This supposes that what a pin earns "
        "depends on the pin and its position, and not on the other pins; it needs much less traffic."
    ),
}


def _refusals(evaluation: PolicyEvaluation) -> list[str]:
    return [
        f"{_NAMES[unit.unit]}: {unit.refused.reason}. What to do: {unit.refused.fix}."
        for unit in evaluation.units
        if unit.refused is not None
    ]


def _facts(evaluation: PolicyEvaluation) -> list[str]:
    settings = evaluation.settings
    return [
        f"Data: {evaluation.data or 'not named'}; {evaluation.requests:,} requests, {evaluation.pins:,} pins.",
        f"Left out: {evaluation.left_out:,} answers without all candidates of their requests.",
        f"Limits: at least {settings.ess_min:g} effective users, and support of at least {settings.support_min:.0%}.",
        f"Clipped weights are at most {settings.clip:g}.",
        (
            f"Intervals: Student's t times the standard error over {settings.resamples:,} resamples of users; seed "
            f"{settings.seed}."
        ),
        "Positions count by their discount, 1 / log2(position + 2)."
        if evaluation.discounted
        else "Each position counts the same.",
        "Reward model: the calibrated heads times an examination factor per head and position, from other users.",
        f"Its heads are those of {evaluation.model}, which logged{_others(evaluation)}.",
    ]


def _others(evaluation: PolicyEvaluation) -> str:
    models = [] if evaluation.rescoring is None else evaluation.rescoring.models
    return f"; for a head that it lacks, those of {' and '.join(models)}" if models else ""
