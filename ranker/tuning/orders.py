"""Requests whose candidates are scored for every party, and what the order by any weights is worth to each of them.

The value of an order to a party is sum over positions k of discounts[k] * u[order[k]]. It is the same measure that
exploration bounds and that servers report per party.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from model_store.model.discount import discounts
from model_store.model.selection import select

#: Requests are valued in blocks of about this many rows, so that a block's arrays stay in the processor's cache.
_BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class ScoredRequests:
    """R requests of one surface with N candidates, scored for P parties.

    Attributes:
        parties: names of the columns of `utilities`, in the order of the utility table.
        users: int64[R] or uint64[R].
        row_splits: int64[R + 1]; request r has the rows `row_splits[r]:row_splits[r + 1]`.
        utilities: float64[N, P], in the caller's order of candidates.
        top_k: how many positions of an answer count; 0 means all.
    """

    parties: tuple[str, ...]
    users: np.ndarray
    row_splits: np.ndarray
    utilities: np.ndarray
    top_k: int = 0

    @property
    def requests(self) -> int:
        return len(self.users)

    def take(self, requests: np.ndarray) -> ScoredRequests:
        """Return the requests at these positions, int64[K], in the order given."""
        counts = np.diff(self.row_splits)[requests]
        stops = np.cumsum(counts)
        rows = np.arange(int(counts.sum())) + np.repeat(self.row_splits[requests] - (stops - counts), counts)
        splits = np.concatenate([[0], stops]).astype(np.int64)
        return ScoredRequests(self.parties, self.users[requests], splits, self.utilities[rows], self.top_k)

    def replaced(self, utilities: np.ndarray) -> ScoredRequests:
        """Return the same requests with other utilities of the same parties, float64[N, P]."""
        return ScoredRequests(self.parties, self.users, self.row_splits, utilities, self.top_k)

    def served(self, weights: np.ndarray, valued: ScoredRequests | None = None) -> np.ndarray:
        """Return float64[R, P], what the order that a server would give is worth to each party.

        Args:
            weights: float64[P], all parties' weights.
            valued: the same requests with the utilities to value the orders by; None takes those that order them.

        The sum is rounded to float32 and equal sums keep the caller's order, as in servers. A candidate that is not
        finite for some party sinks to the end, whatever the weights; it is worth nothing to anyone.
        """
        return self._valued(weights, _as_servers, self if valued is None else valued)

    def best(self, weights: np.ndarray) -> np.ndarray:
        """Return float64[P], the mean of the same over requests, for the exact maximum of the weighted sum.

        Args:
            weights: float64[P].
        """
        mean: np.ndarray = self._valued(weights, _exactly, self).mean(axis=0)
        return mean

    def _valued(
        self, weights: np.ndarray, order_of: Callable[[np.ndarray], np.ndarray], valued: ScoredRequests
    ) -> np.ndarray:
        found = np.empty((self.requests, len(self.parties)))
        for block, worth in zip(self._blocks, valued._blocks, strict=True):
            total = block.utilities[0] * weights[0]  # in the table's order: its last bits depend on it
            for party in range(1, len(weights)):
                total += block.utilities[party] * weights[party]
            total[block.sunk] = np.nan
            order = order_of(total)
            placed = np.empty_like(total)
            np.put_along_axis(placed, order, np.broadcast_to(self._discounts(total.shape[1]), total.shape), axis=1)
            found[block.requests] = np.einsum("prc,rc->rp", worth.utilities, placed)
        return found

    def _discounts(self, count: int) -> np.ndarray:
        found = discounts(count).copy()
        if self.top_k:
            found[self.top_k :] = 0
        return found

    @cached_property
    def _blocks(self) -> list[_Block]:
        counts = np.diff(self.row_splits)
        by_size = np.argsort(counts, kind="stable")
        blocks, start = [], 0
        while start < len(by_size):
            # The last request of a block is its longest, and pads the others.
            padded = counts[by_size[start:]] * np.arange(1, len(by_size) - start + 1)
            stop = start + max(1, int(np.searchsorted(padded, _BLOCK_ROWS, side="right")))
            blocks.append(self._block(by_size[start:stop], counts))
            start = stop
        return blocks

    def _block(self, requests: np.ndarray, counts: np.ndarray) -> _Block:
        places = np.arange(int(counts[requests].max(initial=0)))
        inside = places < counts[requests][:, None]
        rows = np.where(inside, self.row_splits[requests][:, None] + places, 0)
        utilities = self.utilities.T[:, rows] if len(self.utilities) else np.zeros((len(self.parties), *rows.shape))
        sunk = ~inside | ~np.isfinite(utilities).all(axis=0)
        return _Block(requests, np.where(sunk, 0.0, utilities), sunk)


def _as_servers(totals: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is not finite and sinks
        return select(totals.astype(np.float32))


def _exactly(totals: np.ndarray) -> np.ndarray:
    return np.argsort(-totals, axis=1)  # sorts NaN last, and any order of equal sums is worth the same in sum


@dataclass(frozen=True, slots=True)
class _Block:
    """Requests of similar length: their positions; float64[P, R, C], zeros for what sinks; bool[R, C], what sinks."""

    requests: np.ndarray
    utilities: np.ndarray
    sunk: np.ndarray
