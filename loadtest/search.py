"""The policy that searches for the highest sustainable rate of a server. It has no clock and does no I/O."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Try:
    rate_per_s: float


@dataclass(frozen=True, slots=True)
class HighestRate:
    """The search is over: the highest sustained rate, 0 if there is none."""

    rate_per_s: float


class RateSearch:
    """Doubles the rate until it is not sustained (or halves it until it is), then bisects the interval between both.

    A rate is sustained if the share of goodput among its requests reaches the required share.
    """

    def __init__(self, first_per_s: float, tolerance: float = 0.03, tries_max: int = 16) -> None:
        """Start the search.

        Args:
            first_per_s: first rate to try, in requests per second.
            tolerance: gap at which the search ends, between the highest sustained and the lowest unsustained rate, as a
                share of the latter.
            tries_max: maximum number of tries.
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
        """Record the result of a try."""
        self._tries_left -= 1
        if held:
            self._held_per_s = max(self._held_per_s, rate_per_s)
        else:
            self._failed_per_s = min(self._failed_per_s, rate_per_s)
        if self._failed_per_s == float("inf"):
            self._next_per_s = self._held_per_s * 2
        else:  # half of the failed one as long as none held
            self._next_per_s = (self._held_per_s + self._failed_per_s) / 2
