"""An evaluated policy as tables of plain text."""

from __future__ import annotations

from ranker.counterfactual.evaluate import PolicyEvaluation, UnitResult
from ranker.counterfactual.forecast import Forecast
from ranker.evaluation.bootstrap import Estimate
from ranker.evaluation.tables import NONE, Cell, TextTable


def forecast_table(evaluation: PolicyEvaluation, unit: str, estimators: tuple[str, ...]) -> TextTable:
    """Return one line per reward and estimator, in one block per reward."""
    headings = ("reward per request", "estimator", "estimate [95%]", "baseline [95%]", "difference [95%]")
    result = evaluation.unit(unit)
    blocks = []
    for reward in evaluation.rewards if result.refused is None else ():
        chosen = [f for f in result.forecasts[reward] if f.estimator in estimators]
        blocks.append(tuple(_line(reward if place == 0 else "", f) for place, f in enumerate(chosen)))
    return TextTable(headings, 2, tuple(blocks))


def overlap_table(evaluation: PolicyEvaluation) -> TextTable:
    """Return one line per unit: what the log covers of the policy."""
    headings = ("unit", "effective users", "largest weight", "support [95%]", "verdict")
    return TextTable(headings, 1, (tuple(_overlap(unit) for unit in evaluation.units),))


def bound_lines(evaluation: PolicyEvaluation, unit: str) -> list[str]:
    """Return the empirical Bernstein bound of each reward, which holds for any number of users.

    It supposes that no answer earns more, and no user has more requests, than the largest of the log.
    """
    result = evaluation.unit(unit)
    return [
        f"{reward}: weights of at most {evaluation.settings.clip:g}, empirical Bernstein bound {interval(f.bound)}"
        for reward in (evaluation.rewards if result.refused is None else ())
        for f in result.forecasts[reward]
        if f.bound is not None
    ]


def answer_lines(evaluation: PolicyEvaluation) -> list[str]:
    """Say which answers were evaluated, and which networks scored them again."""
    lines = [
        (
            f"{evaluation.requests:,} answers of {evaluation.model} to {evaluation.users:,} users, "
            f"{evaluation.explored_share:.2%} of them explored."
        )
    ]
    if evaluation.left_out:
        lines.append(f"{evaluation.left_out:,} more do not hold all candidates of their requests and do not count.")
    found = evaluation.rescoring
    if found is not None:
        lines.append(
            f"{' and '.join(found.models)} scored them again. They are {found.share:.2%} of {found.logged_requests:,} "
            "logged answers: those that keep their stored rows (impressions.features_share), chosen by a hash of the "
            f"request's id. Of all logged answers, {found.logged_explored_share:.2%} explored."
        )
    return lines


def interval(estimate: Estimate, sign: str = "") -> str:
    """Return a value with its interval."""
    if estimate.value is None:
        return NONE
    value = f"{estimate.value:{sign}.4g}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{estimate.low:{sign}.4g}, {estimate.high:{sign}.4g}]"


def _line(reward: str, f: Forecast) -> tuple[Cell, ...]:
    low, high = f.difference.low, f.difference.high
    certain = low is not None and high is not None and (low > 0 or high < 0)
    return (
        Cell(reward),
        Cell(f.estimator),
        Cell(interval(f.value)),
        Cell(interval(f.baseline)),
        Cell(interval(f.difference, "+"), strong=certain),
    )


def _overlap(unit: UnitResult) -> tuple[Cell, ...]:
    return (
        Cell(unit.unit),
        Cell(f"{unit.overlap.effective_users:,.1f}"),
        Cell(f"{unit.overlap.largest_share:.1%}"),
        Cell(interval(unit.overlap.support)),
        Cell("refused" if unit.refused else "enough", strong=unit.refused is not None),
    )
