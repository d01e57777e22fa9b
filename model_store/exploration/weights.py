"""Explores party weights: a share of the requests follows one of up to 32 named arms instead of the tuned weights."""

from __future__ import annotations

from bisect import bisect_right

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
from model_store.exploration.native_policy import NativePolicy
from model_store.exploration.propensities import propensities
from model_store.exploration.regret import TunedOrder
from model_store.model.selection import select
from model_store.model.utility import weighted_sum


class WeightsExplorer:
    """Explores party weights. Fulfils `Explorer`.

    Attributes:
        share: the share of the requests that explore.
        regret_max: the allowed regret, as a fraction (see `TunedOrder`).
        arms: the names of the A arms.
        weights: float64[A, P], each arm's weights, parties in the utility table's order.
        probabilities: float64[A], of each arm, if a request explores.
    """

    def __init__(
        self,
        seed: int,
        share: float,
        regret_max: float,
        tuned_weights: np.ndarray,
        arms: tuple[str, ...],
        weights: np.ndarray,
        probabilities: np.ndarray,
    ) -> None:
        self.share = share
        self.regret_max = regret_max
        self.arms = arms
        self.weights = weights
        self.probabilities = probabilities
        self._lots = Lots(seed, share)
        self.explores = self._lots.explores
        self._tuned_weights = tuned_weights
        self._chances = np.concatenate([[1 - share], share * probabilities])
        self.native = NativePolicy(share, regret_max, np.vstack([tuned_weights, weights]), self._chances)
        self._ends = [int(end * 2.0**64) for end in np.cumsum(probabilities)[:-1]]

    def arm_of(self, request_id: int) -> int:
        """Return the number of the arm of a request that explores."""
        return bisect_right(self._ends, self._lots.draw(request_id))

    def explore(
        self,
        request_id: int,
        pin_ids: np.ndarray,  # noqa: ARG002 - one contract for all kinds
        party_utilities: np.ndarray,
        utilities: np.ndarray,
        top_k: int = 0,
    ) -> Decision:
        """See `Explorer`."""
        if not self.explores(request_id):
            return TUNED
        arm = self.arm_of(request_id)
        tuned = TunedOrder(utilities, top_k, self.regret_max)
        own = weighted_sum(party_utilities, self.weights[arm])
        order = select(own, top_k)
        regret = float(tuned.regrets(order))
        if not regret <= tuned.regret_max:
            return Withheld(self.arms[arm])
        return Explored(self.arms[arm], order, own, self.weights[arm], regret, tuned.value)

    def propensities(self, party_utilities: np.ndarray, order: np.ndarray) -> Propensities:
        """See `Explorer`."""
        return propensities([(self, party_utilities, order)])[0]

    def propensities_in_numpy(self, party_utilities: np.ndarray, order: np.ndarray) -> Propensities:
        """See `Explorer`."""
        tuned = TunedOrder(weighted_sum(party_utilities, self._tuned_weights), len(order), self.regret_max)
        orders = select(weighted_sum(party_utilities, self.weights), len(order))
        orders[~(tuned.regrets(orders) <= tuned.regret_max)] = tuned.order
        same = np.vstack([tuned.order, orders]) == order
        return propensities_of(float(self._chances @ same.all(axis=1)), self._chances @ same)

    def replay(
        self,
        request_id: int,  # noqa: ARG002
        arm: str | None,  # noqa: ARG002 - the utilities follow the arm's weights
        pin_ids: np.ndarray,  # noqa: ARG002
        places: np.ndarray,
        utilities: np.ndarray,
    ) -> np.ndarray:
        """See `Explorer`."""
        return replay_by_utility(places, utilities)
