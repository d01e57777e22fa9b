"""Whether logged answers allow a new version: `pinrank train --gate-ope "save >= 0"`.

Both versions order the pins of the newest logged answers by their own utilities. What each order would have earned is
estimated doubly robustly, with single positions as units: a new network agrees with a whole logged order too rarely.
The reward model is the parent's heads times examination factors. The gate holds if the low end of the 95% interval of
the difference, new version minus parent, is at least the stated number. A log that says too little does not hold it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ranker.counterfactual.estimators import LoggedActions
from ranker.counterfactual.forecast import Refused, Settings, forecast
from ranker.counterfactual.rewards import examination_factors
from ranker.errors import SettingError
from ranker.evaluation.gates import RateGate
from ranker.evaluation.scoring import ScoredTest


def rate_breaches(
    test: ScoredTest, own: str, parent: str, gates: Sequence[RateGate], settings: Settings | None = None
) -> list[str]:
    """Return the broken gates as readable text.

    Args:
        test: logged answers, scored by both versions.
        own: name of the new version in the test.
        parent: name of the parent.
        gates: the gates.
        settings: limits and resamples.

    Raises:
        SettingError: the test was made up instead of logged, or a gate names an unknown head.
    """
    if len(test.propensities) != len(test.labels):
        raise SettingError("--gate-ope needs logged answers; add --impressions DIR")
    heads = test.by_bundle[parent].heads
    for gate in gates:
        if gate.head not in heads:
            raise SettingError(f"--gate-ope {str(gate)!r}: the model predicts {', '.join(heads)}")
    missing = [f"{name}: {why}" for name in (own, parent) if (why := test.by_bundle[name].utility_missing) is not None]
    if missing:
        return [f"no order to evaluate, because the utility of {missing[0]}"]
    return [text for gate in gates if (text := _breach(test, own, parent, gate, settings or Settings())) is not None]


def _breach(test: ScoredTest, own: str, parent: str, gate: RateGate, settings: Settings) -> str | None:
    users = np.repeat(test.users, np.diff(test.row_splits))
    column = test.by_bundle[parent].heads.index(gate.head)
    labels = test.labels[:, [test.heads.index(gate.head)]]
    probabilities = test.by_bundle[parent].probabilities[:, [column]]
    factors, folds = examination_factors(users, labels, probabilities, test.positions, settings.seed)

    def predicted(positions: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.minimum(probabilities[:, 0] * factors[folds, positions, 0], 1.0)
        return found

    def actions(name: str) -> LoggedActions:
        placed = new_positions(test, name)
        requests = np.repeat(np.arange(len(test.users)), np.diff(test.row_splits))
        return LoggedActions(
            labels[:, 0].astype(np.float64),
            test.propensities,
            (placed == test.positions).astype(np.float64),
            test.users,
            requests,
            predicted(test.positions),
            np.bincount(requests, predicted(placed), len(test.users)),
        )

    found = forecast(actions(own), actions(parent), ("dr",), settings, name="the new version")
    if isinstance(found, Refused):
        return f"{gate}: the logged answers say too little: {found.reason}; {found.fix}"
    difference = found[0].difference
    if difference.low is not None and difference.low >= gate.at_least:
        return None
    return (
        f"{gate}: by logged answers, the rate per request changes by {_number(difference.value)}, with a 95% interval "
        f"from {_number(difference.low)} to {_number(difference.high)}"
    )


def new_positions(test: ScoredTest, name: str) -> np.ndarray:
    """Return int64[N], where a version's utilities put each pin, among the positions that its request's pins had."""
    utilities = test.by_bundle[name].utilities
    if utilities is None:
        raise SettingError(f"{name} has no utilities on this data")
    requests = np.repeat(np.arange(len(test.users)), np.diff(test.row_splits))
    key = np.where(np.isfinite(utilities), -utilities, np.inf)
    best_first = np.lexsort((test.positions, key, requests))
    slots = np.lexsort((test.positions, requests))
    placed = np.empty(len(key), np.int64)
    placed[best_first] = test.positions[slots]
    return placed


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:+.4g}"
