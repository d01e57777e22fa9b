"""What answers are worth to each party: sums over requests, for metrics and for the guards of labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from model_store.model.discount import discounts
from server.request.scoring import Scores


def party_values(scores: Scores) -> np.ndarray:
    """Return what an answer is worth to each party.

    Returns:
        float64[P], the sum over positions k of `discounts(K)[k]` times the utility to the party of the pin there, in
        units of utility. A utility that is not finite counts 0.

    Cost: about 4 us.
    """
    order = scores.order
    utilities = scores.party_utilities[order]
    values: np.ndarray = discounts(len(order)) @ utilities
    if not math.isfinite(values.sum()):
        values = discounts(len(order)) @ np.where(np.isfinite(utilities), utilities, 0.0)
    return values


@dataclass(frozen=True, slots=True)
class PartyMean:
    """What requests were worth to a party on average.

    Attributes:
        requests: their number.
        mean: in units of utility.
        error: the standard error of the mean; infinite for fewer than two requests.
    """

    requests: int
    mean: float
    error: float


class PartyTotals:
    """Sums over requests of one surface.

    Attributes:
        parties: the P parties.
        requests: number of requests.
        gained: float64[P], the sum of the requests' values above 0.
        lost: float64[P], the sum of the amounts of those below 0. Apart, both only grow, as counters must.
        squares: float64[P], of the squares of the values.
    """

    __slots__ = ("gained", "lost", "parties", "requests", "squares")

    def __init__(self, parties: tuple[str, ...]) -> None:
        self.parties = parties
        self.requests = 0
        self.gained = np.zeros(len(parties))
        self.lost = np.zeros(len(parties))
        self.squares = np.zeros(len(parties))

    def add(self, values: np.ndarray) -> None:
        """Add one request's float64[P]."""
        self.requests += 1
        above = np.maximum(values, 0.0)
        self.gained += above
        self.lost += above - values
        self.squares += values * values


def party_means(totals: Iterable[PartyTotals]) -> dict[str, PartyMean]:
    """Return the mean of each party over all requests of these totals."""
    found: dict[str, tuple[int, float, float]] = {}
    for one in totals:
        sums = (one.gained - one.lost).tolist()
        for party, total, square in zip(one.parties, sums, one.squares.tolist(), strict=True):
            requests, before, squares = found.get(party, (0, 0.0, 0.0))
            found[party] = (requests + one.requests, before + total, squares + square)
    return {party: _mean(*sums) for party, sums in found.items()}


def _mean(requests: int, total: float, squares: float) -> PartyMean:
    mean = total / requests
    if requests < 2:
        return PartyMean(requests, mean, math.inf)
    variance = squares / requests - mean * mean
    if not math.isfinite(variance):  # utilities whose squares overflow; max() would make 0 of NaN
        return PartyMean(requests, mean, math.inf)
    return PartyMean(requests, mean, math.sqrt(max(0.0, variance) / (requests - 1)))
