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
    chances = lattice.left * weights
    chances /= lattice.left @ weights[:, None]  # float64[sets, m], of the next item after each set
    for k in range(1, positions):
        # The chance that a set is drawn first, by each of the items that may be its last, times that of the next item.
        drawn = np.add.reduce(chances.take(lattice.last[k]), axis=1, keepdims=True)
        chances[lattice.starts[k] : lattice.starts[k + 1]] *= drawn
    found: np.ndarray = np.add.reduceat(chances[: lattice.starts[positions]], lattice.starts[:positions], axis=0)
    return found


def _weights(log_weights: np.ndarray) -> np.ndarray:
    """Return float64[m] weights that float64 holds, equal to exp(log_weights) but for a factor."""
    gaps = np.minimum(-np.diff(log_weights), _GAP_MAX)
    weights: np.ndarray = np.exp(-np.concatenate([[0.0], np.cumsum(gaps)]))
    return weights


@dataclass(frozen=True, slots=True)
class _Lattice:
    """The sets of m items but the full one, by size.

    Attributes:
        left: float64[2**m - 1, m], 1 for each item that is not in the set.
        starts: int[m + 1], where the sets of each size start.
        last: for each size k, int64[C(m, k), k]: for each set and each of its items, where the chance that this item
            follows the others of the set is in float64[2**m - 1, m].
    """

    left: np.ndarray
    starts: list[int]
    last: list[np.ndarray]


@lru_cache(maxsize=16)
def _lattice(m: int) -> _Lattice:
    masks = np.arange((1 << m) - 1)
    sizes = ((masks[:, None] >> np.arange(m)) & 1).sum(axis=1)
    masks = masks[np.argsort(sizes, kind="stable")]
    row = np.empty(len(masks), np.int64)
    row[masks] = np.arange(len(masks))
    contains = (masks[:, None] >> np.arange(m)) & 1
    starts = np.searchsorted(np.sort(sizes), np.arange(m + 1)).tolist()
    last = []
    for k in range(m):
        own = slice(starts[k], starts[k + 1])
        items = np.nonzero(contains[own])[1].reshape(starts[k + 1] - starts[k], k)
        last.append(row[masks[own, None] ^ (1 << items)] * m + items)
    return _Lattice((1 - contains).astype(np.float64), starts, last)
