"""Which rate to try next in the search for the highest one that a server holds: pure, told what came of each try."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Try:
    rate_per_s: float


@dataclass(frozen=True, slots=True)
class HighestRate:
    """The search is over: the highest rate that held, 0 when none did."""

    rate_per_s: float


class RateSearch:
    """Doubles the rate until one does not hold (halves it until one does), then halves the gap between the two.

    A rate holds when the part of its requests that were answered well and in time is at least what was asked for.
    """

    def __init__(self, first_per_s: float, tolerance: float = 0.03, tries_max: int = 16) -> None:
        """Begin.

        Args:
            first_per_s: the rate to begin with.
            tolerance: the gap between the highest rate that held and the lowest that did not, as part of the latter.
            tries_max: the search ends after so many.
        """
        self._next_per_s = first_per_s
        self._tolerance = tolerance
        self._tries_left = tries_max
        self._held_per_s = 0.0
        self._failed_per_s = float("inf")

    def next(self) -> Try | HighestRate:
        if self._tries_left == 0 or self._held_per_s >= (1 - self._tolerance) * self._failed_per_s:
            return HighestRate(self._held_per_s)
        return Try(self._next_per_s)

    def tell(self, rate_per_s: float, *, held: bool) -> None:
        """Note what came of a try."""
        self._tries_left -= 1
        if held:
            self._held_per_s = max(self._held_per_s, rate_per_s)
        else:
            self._failed_per_s = min(self._failed_per_s, rate_per_s)
        if self._failed_per_s == float("inf"):
            self._next_per_s = self._held_per_s * 2
        else:  # half of the failed one as long as none held
            self._next_per_s = (self._held_per_s + self._failed_per_s) / 2
