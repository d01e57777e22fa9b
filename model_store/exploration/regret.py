"""What an order gives up of the tuned order's predicted value."""

from __future__ import annotations

import numpy as np

from model_store.model.discount import discounts
from model_store.model.selection import select


class TunedOrder:
    """One request's order by the tuned weights, and what other orders are worth beside it.

    An order's value is the sum over its positions k of `discounts(K)[k] * utilities[order[k]]`, where candidates
    without a finite utility count 0. The regret of an order is the tuned order's value minus its own.

    Attributes:
        order: int64[K], the answer by the tuned weights.
        value: its value.
        regret_max: the most regret that an answer of this request may have.
    """

    def __init__(self, utilities: np.ndarray, top_k: int, regret_max: float) -> None:
        """Order a request.

        Args:
            utilities: float32[N], by the tuned weights.
            top_k: K, how many are answered; 0 for all.
            regret_max: the allowed regret, as a fraction of the sum over the answer of discount * |utility|.
        """
        self.order = select(utilities, top_k)
        worth = utilities.astype(np.float64)
        self.worth: np.ndarray = np.where(np.isfinite(worth), worth, 0.0)
        self._discounts = discounts(len(self.order))
        gained = self._discounts * self.worth[self.order]
        self.value = float(_sum(gained))
        self.regret_max = regret_max * float(_sum(np.abs(gained)))

    def regrets(self, orders: np.ndarray) -> np.ndarray:
        """Return float64[...], the regret of each of int64[..., K] orders."""
        # Summed as differences: equal orders have a regret of exactly 0.
        given_up = self._discounts * (self.worth[self.order] - self.worth[orders])
        return _sum(given_up)


def _sum(terms: np.ndarray) -> np.ndarray:
    """Return float64[...], the sums along the last axis, one term after the other as in `propensities.cpp`.

    `numpy.sum` adds in another order, and an arm at the bound would be answered, but then be counted as withheld.
    """
    sums: np.ndarray = np.cumsum(terms, axis=-1)[..., -1]
    return sums
