"""Whether logged answers allow a new version: `pinrank train --gate-ope "save >= 0" --gate-ope "creator >= 0"`.

Both versions order the pins of the newest logged answers by their own utilities. What each order would have earned is
estimated doubly robustly, with single positions as units: a new network agrees with a whole logged order too rarely. A
reward is an action, or a party's expression in the new version's utility table, with actions in place of probabilities.
The reward model is the parent's heads times examination factors. The gate holds if the low end of the 95% interval of
the difference, new version minus parent, is at least the stated number. A log that says too little does not hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model_store.model.expression import Expression, compile_expression
from ranker.counterfactual.estimators import LoggedActions
from ranker.counterfactual.forecast import Refused, Settings, forecast
from ranker.counterfactual.rewards import examination_factors
from ranker.data.features import SURFACES
from ranker.errors import SettingError
from ranker.evaluation.gates import RateGate, check_rate_gates
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
        SettingError: the test was made up instead of logged, or a gate names neither a head nor a party.
    """
    if len(test.propensities) != len(test.labels):
        raise SettingError("--gate-ope needs logged answers; add --impressions DIR")
    missing = [f"{name}: {why}" for name in (own, parent) if (why := test.by_bundle[name].utility_missing) is not None]
    if missing:
        return [f"no order to evaluate, because the utility of {missing[0]}"]
    heads, parties = test.by_bundle[parent].heads, _parties(test, own)
    check_rate_gates(gates, heads, tuple(parties))
    answers = _Answers.of(test, own, parent, settings or Settings())
    found = []
    for gate in gates:
        if gate.reward in parties:
            breach = answers.breach(gate, parties[gate.reward], "its utility per request")
        else:
            everywhere = dict.fromkeys(range(len(SURFACES)), compile_expression(gate.reward, {gate.reward}))
            breach = answers.breach(gate, everywhere, "the rate per request")
        found += [] if breach is None else [f"{gate}: {breach}"]
    return found


def _parties(test: ScoredTest, own: str) -> dict[str, dict[int, Expression]]:
    """Return the new version's expression of each party, by the surfaces that have it: positions in `SURFACES`."""
    table = test.by_bundle[own].table
    found: dict[str, dict[int, Expression]] = {}
    for number, name in enumerate(SURFACES):
        surface = None if table is None else table.surfaces.get(name)
        if surface is not None:
            for party, expression in zip(surface.parties, surface.expressions, strict=True):
                found.setdefault(party, {})[number] = expression
    return found


@dataclass(frozen=True, slots=True)
class _Answers:
    """The answers of a test as its gates read them.

    Attributes:
        requests: int64[N], the request of each shown pin.
        surfaces: uint8[N], the surface of its request.
        acted: by head, float64[N], 1 where the pin received the action.
        probabilities: by head, float32[N], the parent's; for a head that it lacks, the new version's.
        factors: by head, float64[folds, positions], the examination factors.
        folds: int64[N], the fold whose factors each shown pin has.
        attributes: by name in expressions, float64[N].
        placed: int64[N], by the new version and by its parent.
    """

    test: ScoredTest
    requests: np.ndarray
    surfaces: np.ndarray
    acted: Mapping[str, np.ndarray]
    probabilities: Mapping[str, np.ndarray]
    factors: Mapping[str, np.ndarray]
    folds: np.ndarray
    attributes: Mapping[str, np.ndarray]
    placed: tuple[np.ndarray, np.ndarray]
    settings: Settings

    @staticmethod
    def of(test: ScoredTest, own: str, parent: str, settings: Settings) -> _Answers:
        requests = np.repeat(np.arange(len(test.users)), np.diff(test.row_splits))
        predicted = {
            head: scores.probabilities[:, column]
            for scores in (test.by_bundle[own], test.by_bundle[parent])
            for column, head in enumerate(scores.heads)
        }
        acted = {head: test.labels[:, test.heads.index(head)].astype(np.float64) for head in predicted}
        factors, folds = examination_factors(
            test.users[requests],
            np.column_stack(list(acted.values())),
            np.column_stack(list(predicted.values())),
            test.positions,
            settings.seed,
        )
        return _Answers(
            test,
            requests,
            test.surfaces[requests],
            acted,
            predicted,
            {head: factors[:, :, column] for column, head in enumerate(predicted)},
            folds,
            {f"pin.{name}": values.astype(np.float64) for name, values in test.attributes.items()},
            (new_positions(test, own), new_positions(test, parent)),
            settings,
        )

    def breach(self, gate: RateGate, reward: Mapping[int, Expression], what: str) -> str | None:
        """Say why a gate does not hold; None if it does.

        Args:
            gate: the gate.
            reward: what a pin earns, by surface; only answers of these surfaces count.
            what: the reward's name in the text.
        """
        kept = np.isin(self.test.surfaces, list(reward))
        if not kept.any():
            return "no logged answer is on a surface that has this party; join more, or remove the gate"
        own, parent = (self._actions(reward, placed, kept) for placed in self.placed)
        found = forecast(own, parent, ("dr",), self.settings, name="the new version")
        if isinstance(found, Refused):
            return f"the logged answers say too little: {found.reason}; {found.fix}"
        difference = found[0].difference
        if difference.low is not None and difference.low >= gate.at_least:
            return None
        return (
            f"by logged answers, {what} changes by {_number(difference.value)}, with a 95% interval from "
            f"{_number(difference.low)} to {_number(difference.high)}"
        )

    def _actions(self, reward: Mapping[int, Expression], placed: np.ndarray, kept: np.ndarray) -> LoggedActions:
        """Return the kept requests, bool[R], as a log with the probabilities of one version."""
        test, requests, rows = self.test, self.requests, kept[self.requests]
        expected = np.bincount(requests, self._earned(reward, self._expected(placed)), len(test.users))
        return LoggedActions(
            self._earned(reward, self.acted)[rows],
            test.propensities[rows],
            (placed == test.positions)[rows].astype(np.float64),
            test.users[kept],
            (np.cumsum(kept) - 1)[requests[rows]],
            self._earned(reward, self._expected(test.positions))[rows],
            expected[kept],
        )

    def _expected(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Return by head the probability that each pin receives the action at these positions."""
        return {
            head: np.minimum(probabilities * self.factors[head][self.folds, positions], 1.0)
            for head, probabilities in self.probabilities.items()
        }

    def _earned(self, reward: Mapping[int, Expression], heads: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return float64[N], what each pin earns with these actions or probabilities; 0 on other surfaces."""
        columns = {**heads, **self.attributes}
        earned = np.zeros(len(self.surfaces))
        for surface, expression in reward.items():
            rows = self.surfaces == surface
            earned[rows] = expression([columns[name][rows] for name in expression.names])
        return earned


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
