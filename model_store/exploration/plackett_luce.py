"""Exact probabilities of Plackett and Luce's model of orders (Plackett, 1975), for a few items.

The next item is drawn with a probability proportional to its weight among those that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

#: An item whose weight is exp(-60) of the next one's is never drawn before it: float64 noise stays within exp(42).
_GAP_MAX = 60.0


def order_probability(log_weights: np.ndarray, order: Sequence[int]) -> float:
    """Return the probability that the first items are these, in this order.

    Args:
        log_weights: float64[m], finite, descending.
        order: positions of the first items in `log_weights`, each at most once.
    """
    weights = _weights(log_weights).tolist()
    left = dict(enumerate(weights))
    probability = 1.0
    for item in order:
        probability *= left[item] / math.fsum(left.values())
        del left[item]
    return probability


def position_probabilities(log_weights: np.ndarray, positions: int) -> np.ndarray:
    """Return float64[positions, m], the probability of each item at each of the first positions.

    A dynamic programme over the sets of items that were drawn so far: 2**m states, m at most about 10.

    Args:
        log_weights: float64[m], finite, descending.
        positions: so many positions, at most m.
    """
    weights = _weights(log_weights)
    lattice = _lattice(len(weights))
    with np.errstate(invalid="ignore"):  # of the full set nothing is left
        chances = lattice.left * weights
        chances /= chances.sum(axis=1, keepdims=True)  # float64[2**m, m], of the next item after each set
    reached = np.zeros(len(chances))
    reached[0] = 1.0
    found = np.empty((positions, len(weights)))
    for k in range(positions):
        drawn = reached[lattice.sets[k], None] * chances[lattice.sets[k]]
        found[k] = drawn.sum(axis=0)
        if k + 1 < positions:
            chances[lattice.sets[k]] = drawn
            grown = lattice.sets[k + 1]
            reached[grown] = chances[lattice.before[k], lattice.item[k]].sum(axis=1)
    return found


def _weights(log_weights: np.ndarray) -> np.ndarray:
    """Return float64[m] weights that float64 holds, equal to exp(log_weights) but for a factor."""
    gaps = np.minimum(-np.diff(log_weights), _GAP_MAX)
    weights: np.ndarray = np.exp(-np.concatenate([[0.0], np.cumsum(gaps)]))
    return weights


@dataclass(frozen=True, slots=True)
class _Lattice:
    """The sets of m items, as bit masks.

    Attributes:
        left: float64[2**m, m], 1 for each item that is not in the set.
        sets: for each size k, int64[C(m, k)], the sets of that size.
        before, item: for each size k, int64[C(m, k + 1), k + 1]: the sets of size k that become each larger set, and
            the item that each one lacks.
    """

    left: np.ndarray
    sets: list[np.ndarray]
    before: list[np.ndarray]
    item: list[np.ndarray]


@lru_cache(maxsize=16)
def _lattice(m: int) -> _Lattice:
    masks = np.arange(1 << m)
    contains = (masks[:, None] >> np.arange(m)) & 1
    sizes = contains.sum(axis=1)
    sets = [masks[sizes == k] for k in range(m + 1)]
    item = [np.nonzero(contains[sets[k + 1]])[1].reshape(-1, k + 1) for k in range(m)]
    before = [sets[k + 1][:, None] ^ (1 << item[k]) for k in range(m)]
    return _Lattice((1 - contains).astype(np.float64), sets, before, item)
