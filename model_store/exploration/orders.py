"""Explores orders: a share of the requests gets its best candidates in an order drawn by Plackett and Luce's model."""

from __future__ import annotations

import math

import numpy as np

from model_store.exploration.explorer import (
    TUNED,
    Decision,
    Explored,
    Lots,
    Propensities,
    Withheld,
    propensities_of,
    replay_by_utility,
)
from model_store.exploration.hashing import mixed, mixed_all
from model_store.exploration.native_policy import NativePolicy
from model_store.exploration.plackett_luce import order_probability, position_probabilities
from model_store.exploration.propensities import propensities
from model_store.exploration.regret import TunedOrder
from model_store.model.discount import discounts
from model_store.model.selection import select
from model_store.model.utility import weighted_sum

#: The largest m: propensities take all sets of m candidates into account. `propensities.cpp` reserves memory for it.
BEST_MAX = 8


class OrderExplorer:
    """Explores orders of the best candidates. Fulfils `Explorer`.

    Of the m best candidates, the next one is drawn with a probability proportional to exp(utility / temperature), until
    none is left; a fraction `floor` of the explored requests draws evenly instead. The other candidates follow as
    tuned. m is `best`, or less: the most for which even the worst order is within `regret_max`. An arm is named after
    m, such as "best-6".

    Attributes:
        share: the share of the requests that explore.
        regret_max: the allowed regret, as a fraction (see `TunedOrder`).
        best: the largest m, 2 to `BEST_MAX`.
        temperature: in units of utility.
        floor: the fraction of the explored requests whose order is drawn evenly.
    """

    def __init__(
        self,
        seed: int,
        share: float,
        regret_max: float,
        tuned_weights: np.ndarray,
        best: int,
        temperature: float,
        floor: float,
    ) -> None:
        """Create from the fields of `explore.toml`. Raises ValueError if `best` is not in its range."""
        if not 2 <= best <= BEST_MAX:
            raise ValueError(f"best is {best}; it must be 2 to {BEST_MAX}")
        self.share = share
        self.regret_max = regret_max
        self.best = best
        self.temperature = temperature
        self.floor = floor
        self.native = NativePolicy(share, regret_max, tuned_weights[None], np.array([1.0]), best, temperature, floor)
        self.arms = tuple(f"best-{m}" for m in range(2, best + 1))
        self._lots = Lots(seed, share)
        self.explores = self._lots.explores
        self._tuned_weights = tuned_weights
        self._even_below = int(floor * 2.0**64)

    def explore(
        self,
        request_id: int,
        pin_ids: np.ndarray,
        party_utilities: np.ndarray,  # noqa: ARG002 - one contract for all kinds
        utilities: np.ndarray,
        top_k: int = 0,
    ) -> Decision:
        """See `Explorer`."""
        if not self.explores(request_id):
            return TUNED
        tuned = TunedOrder(utilities, top_k, self.regret_max)
        first = self._drawn(utilities, tuned)
        if len(first) < 2:
            return Withheld(self.arms[-1])
        keys = self._keys(request_id, pin_ids[first], utilities[first])
        order = tuned.order.copy()
        answered = min(len(first), len(order))
        order[:answered] = first[np.argsort(-keys, kind="stable")][:answered]
        regret = float(tuned.regrets(order))
        return Explored(f"best-{len(first)}", order, utilities, self._tuned_weights, regret, tuned.value)

    def propensities(self, party_utilities: np.ndarray, order: np.ndarray) -> Propensities:
        """See `Explorer`."""
        return propensities([(self, party_utilities, order)])[0]

    def propensities_in_numpy(self, party_utilities: np.ndarray, order: np.ndarray) -> Propensities:
        """See `Explorer`."""
        utilities = weighted_sum(party_utilities, self._tuned_weights)
        tuned = TunedOrder(utilities, len(order), self.regret_max)
        first = self._drawn(utilities, tuned)
        same = order == tuned.order
        positions = same.astype(np.float64)
        answered = min(len(first), len(order))
        if len(first) < 2:
            return Propensities(float(same.all()), positions)
        rank = {int(row): number for number, row in enumerate(first)}
        drawn = [rank.get(int(row), -1) for row in order[:answered]]
        log_weights = utilities[first].astype(np.float64) / self.temperature
        known = [(k, number) for k, number in enumerate(drawn) if number >= 0]
        marginals = self.floor / len(first) + (1 - self.floor) * position_probabilities(log_weights, answered)
        positions[:answered] *= 1 - self.share
        for k, number in known:
            positions[k] += self.share * marginals[k, number]
        whole = 0.0
        if len(known) == answered and same[answered:].all():
            evenly = 1 / math.perm(len(first), answered)
            whole = self.floor * evenly + (1 - self.floor) * order_probability(log_weights, drawn)
        return propensities_of((1 - self.share) * float(same.all()) + self.share * whole, positions)

    def replay(
        self, request_id: int, arm: str | None, pin_ids: np.ndarray, places: np.ndarray, utilities: np.ndarray
    ) -> np.ndarray:
        """See `Explorer`."""
        tuned = replay_by_utility(places, utilities)
        if arm is None:
            return tuned
        drawn = int(arm.removeprefix("best-"))
        # If fewer than m were answered, the others of the m do not matter: each one's draw is its own.
        first = tuned[:drawn]
        keys = self._keys(request_id, pin_ids[first], utilities[first])
        tuned[:drawn] = first[np.argsort(-keys, kind="stable")]
        return tuned

    def _drawn(self, utilities: np.ndarray, tuned: TunedOrder) -> np.ndarray:
        """Return int64[m], the candidates whose order is drawn, as tuned; none if every other order is too bad."""
        order = tuned.order if len(tuned.order) >= self.best else select(utilities, self.best)
        first: np.ndarray = order[: self.best]
        first = first[np.isfinite(utilities[first])]
        worth = utilities[first].astype(np.float64).tolist()
        answered = len(tuned.order)
        weights = discounts(answered)[: len(first)].tolist()
        for m in range(len(first), 1, -1):
            # No order of the m best is worth less than the reverse. `sum` would add in another way from Python 3.12 on.
            worst = 0.0
            for discount, best, last in zip(weights, worth, reversed(worth[:m]), strict=False):
                worst += discount * (best - last)
            if worst <= tuned.regret_max:
                return first[:m]
        return first[:0]

    def _keys(self, request_id: int, pin_ids: np.ndarray, utilities: np.ndarray) -> np.ndarray:
        """Return float64[M]: sorted descending, they draw an order (Gumbel noise: Yellott, 1977).

        A pin's key depends on the request and that pin alone, so that a part of an order replays.
        """
        draw = self._lots.draw(request_id)
        hashes = mixed_all(pin_ids ^ np.uint64(mixed(draw)))
        even = ((hashes >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
        noise: np.ndarray = -np.log(-np.log(even))
        if draw < self._even_below:
            return noise
        keys: np.ndarray = noise + utilities.astype(np.float64) / self.temperature
        return keys
