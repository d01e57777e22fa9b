"""What the server learns about itself while it runs: pure estimates, fed with observations, without a clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

from feature_client.estimates import DecayingMean, RunningQuantile

#: Sizes between which costs are interpolated: powers of two up to a million rows.
_SIZES = tuple(1 << power for power in range(21))
#: An observation moves an estimate by a fifth of its error, and no error counts for more than a factor of 1.65: a pause
#: of the machine moves it by a tenth, a lasting change by a factor of two is followed within ten runs.
_GAIN = 0.2
_ERROR_MAX = 0.5
#: The quantile of runs that promises are made for, and how far it may lie from a typical run.
_CAREFUL = 0.95
_SLACK_MAX = 4.0


class CostModel:
    """Seconds of an engine run of some requests with some rows together.

    A table holds what one request of 1, 2, 4, ... rows takes, straight lines between; it begins as the engine's own
    measurement and follows what runs really take here, among other work. Sizes that were not seen move with the rest. A
    further request in the same run saves a part of what a run costs without any rows; that part is learned too.
    """

    def __init__(self, prior: Callable[[int], float]) -> None:
        """Begin with a prediction.

        Args:
            prior: seconds of a run by its rows; where it is 0, nothing is known yet.
        """
        self._prior = [max(prior(size), 1e-7) for size in _SIZES]
        self._learned = [0.0] * len(_SIZES)  # logarithms of factors over the prior
        self._seen = [False] * len(_SIZES)
        self._everywhere = 0.0
        #: The part of a run's fixed cost that requests in one run share.
        self._shared = DecayingMean(_GAIN, 0.5)
        self._slack = RunningQuantile(_CAREFUL, 1.2)
        self._table: list[float]
        #: Seconds of a run without rows.
        self._empty_s: float
        self._tabulate()

    @property
    def fixed_s(self) -> float:
        """Seconds that one more run costs, whatever is in it."""
        return self._empty_s * self._shared.value

    @property
    def per_request_s(self) -> float:
        """Seconds that one more request costs, beyond its rows."""
        return self._empty_s * (1 - self._shared.value)

    def predict_s(self, requests: int, rows: int) -> float:
        """Predict a typical run."""
        return self._one_s(rows) + (requests - 1) * self.per_request_s

    def finish_s(self, requests: int, rows: int) -> float:
        """Predict a run so that nineteen of twenty are done by then: for promises."""
        return self.predict_s(requests, rows) * max(1.0, min(_SLACK_MAX, self._slack.value))

    def observe(self, requests: int, rows: int, seconds: float) -> None:
        """Learn from a run."""
        if seconds <= 0 or rows < 1:
            return
        predicted_s = self.predict_s(requests, rows)
        self._slack.observe(seconds / predicted_s)
        if requests > 1:
            # What the requests after the first cost beyond their rows, in units of an empty run.
            extra = (seconds - self._one_s(rows)) / ((requests - 1) * self._empty_s)
            self._shared.observe(1 - min(1.0, max(0.0, extra)))
            return
        error = max(-_ERROR_MAX, min(_ERROR_MAX, math.log(seconds / predicted_s)))
        self._everywhere += _GAIN * error
        low = _interval(rows)
        near_high = min(1.0, (rows - _SIZES[low]) / _SIZES[low])
        for place, weight in ((low, 1 - near_high), (low + 1, near_high)):
            if weight > 0:
                self._move(place, _GAIN * error * weight)
        # Sizes that no run had follow the rest, and do not run ahead of it.
        seen = [own for own, seen in zip(self._learned, self._seen, strict=True) if seen]
        self._everywhere = max(min(seen), min(max(seen), self._everywhere))
        self._tabulate()

    def _move(self, place: int, step: float) -> None:
        """Move what a size costs from what the table says now.

        A smaller size may hold the table up there. A run that took less says so of the smaller size too; to lower only
        the size's own cost would change no prediction, so the next run would lower it again, without an end.
        """
        cost_s = self._table[place] * math.exp(step)
        for lower in range(place):
            if self._table[lower] > cost_s:
                self._set(lower, cost_s)
        self._set(place, cost_s)

    def _set(self, place: int, cost_s: float) -> None:
        self._seen[place] = True
        self._learned[place] = math.log(cost_s / self._prior[place])

    def _tabulate(self) -> None:
        factors = (own if seen else self._everywhere for own, seen in zip(self._learned, self._seen, strict=True))
        costs = (prior * math.exp(factor) for prior, factor in zip(self._prior, factors, strict=True))
        # More rows never cost less.
        self._table = list(accumulate(costs, max))
        # The line through the two smallest sizes.
        self._empty_s = max(self._table[0] * 0.05, 2 * self._table[0] - self._table[1])

    def _one_s(self, rows: int) -> float:
        low = _interval(rows)
        start_s, end_s = self._table[low], self._table[low + 1]
        return start_s + (end_s - start_s) * (rows - _SIZES[low]) / _SIZES[low]


def _interval(rows: int) -> int:
    """Return the place of the largest size that is no larger; of the last but one size where the last is."""
    return max(0, min(rows.bit_length() - 1, len(_SIZES) - 2))
