"""Learns how many seconds engine runs take, from the runs that it observes. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

from feature_client.estimates import DecayingMean, RunningQuantile

#: Run sizes in the table of costs: powers of two up to a million rows. Costs between them are interpolated.
_SIZES = tuple(1 << power for power in range(21))
_LAST_INTERVAL = len(_SIZES) - 2
#: An observation moves an estimate by a fifth of its error, and errors are cut to a factor of 1.65. So a pause of the
#: machine moves an estimate by a tenth, and a lasting change by a factor of two is learned within ten runs.
_GAIN = 0.2
_ERROR_MAX = 0.5
#: Quantile of run times for careful predictions, and its largest ratio to a typical run.
_CAREFUL = 0.95
_SLACK_MAX = 4.0


class CostModel:
    """Predicts the seconds of an engine run from its numbers of requests and rows.

    Predictions are for a time at which all streams run. A run that other streams leave alone is faster by a factor that
    the engine measured. A table has the cost of one request with 1, 2, 4, ... rows, interpolated linearly. It starts as
    the engine's own measurement and follows the observed runs, which compete with other work. Sizes that were never
    observed move with the others. Each further request in a run saves a part of the fixed cost of a run; that part is
    learned, too.
    """

    def __init__(self, prior: Callable[[int], float], slowdown: float = 1.0) -> None:
        """Start from a prediction.

        Args:
            prior: returns the seconds of a run with a number of rows while no other stream runs; 0 if unknown.
            slowdown: how many times as long a run takes while all streams run.
        """
        self._slowdown = slowdown
        self._prior = [max(prior(size) * slowdown, 1e-7) for size in _SIZES]
        #: Learned seconds by size, None before it was observed, and the logarithms of their factors over the prior.
        self._seen_s: list[float | None] = [None] * len(_SIZES)
        self._learned = dict[int, float]()
        #: Logarithm of the factor over the prior of sizes that were never observed.
        self._everywhere = 0.0
        #: Fraction of a run's fixed cost that the requests in a run share.
        self._shared = DecayingMean(_GAIN, 0.5)
        self._slack = RunningQuantile(_CAREFUL, 1.2)
        self._table: list[float]
        #: Seconds of a run without rows.
        self._empty_s: float
        self._tabulate()

    @property
    def fixed_s(self) -> float:
        """Fixed cost of an additional run, in seconds."""
        return self._empty_s * self._shared.value

    @property
    def per_request_s(self) -> float:
        """Cost of an additional request beyond its rows, in seconds."""
        return self._empty_s * (1 - self._shared.value)

    def predict_s(self, requests: int, rows: int) -> float:
        """Predict the seconds of a typical run."""
        alone_s = _between(self._table, rows)
        return alone_s if requests == 1 else alone_s + (requests - 1) * self.per_request_s

    def measured_s(self, rows: int, *, alone: bool) -> float:
        """Return what the engine measured for a run of one request, before it served.

        Whether to split a request depends on how costs grow with rows. What is learned of each size cannot say: small
        runs of split requests are seen on idle, slow cores, and whole runs on busy ones.

        Args:
            rows: in the run.
            alone: whether no other stream runs; otherwise all streams do.
        """
        seconds = _between(self._prior, rows)
        return seconds / self._slowdown if alone else seconds

    def rows_of(self, seconds: float) -> int:
        """Return the fewest rows of a request whose run is predicted to take at least so many seconds."""
        place = bisect_left(self._table, seconds)
        if place == 0:
            return 1
        low = min(place, len(_SIZES) - 1) - 1
        start_s, end_s = self._table[low], self._table[low + 1]
        if end_s <= start_s:  # the largest sizes cost the same
            return _SIZES[-1]
        return min(_SIZES[-1], math.ceil(_SIZES[low] + _SIZES[low] * (seconds - start_s) / (end_s - start_s)))

    @property
    def careful(self) -> float:
        """Factor by which 95% of runs exceed a prediction at most."""
        return max(1.0, min(_SLACK_MAX, self._slack.value))

    def finish_s(self, requests: int, rows: int) -> float:
        """Predict the seconds within which 95% of such runs end."""
        return self.predict_s(requests, rows) * self.careful

    def observe(self, requests: int, rows: int, seconds: float, beside: float = 1.0) -> None:
        """Learn from the seconds that a run took.

        Args:
            requests: in the run.
            rows: in the run.
            seconds: that it took.
            beside: mean fraction of the other streams that ran meanwhile.
        """
        if seconds <= 0 or rows < 1:
            return
        seconds *= self._slowdown / (1 + (self._slowdown - 1) * beside)
        predicted_s = self.predict_s(requests, rows)
        self._slack.observe(seconds / predicted_s)
        if requests > 1:
            # Cost of each request after the first beyond its rows, relative to the fixed cost of a run.
            extra = (seconds - _between(self._table, rows)) / ((requests - 1) * self._empty_s)
            self._shared.observe(1 - min(1.0, max(0.0, extra)))
            return
        error = max(-_ERROR_MAX, min(_ERROR_MAX, math.log(seconds / predicted_s)))
        self._everywhere += _GAIN * error
        low = min(rows.bit_length() - 1, _LAST_INTERVAL)
        near_high = min(1.0, (rows - _SIZES[low]) / _SIZES[low])
        for place, weight in ((low, 1 - near_high), (low + 1, near_high)):
            if weight > 0:
                self._move(place, _GAIN * error * weight)
        # Sizes that were never observed follow the others, but stay within their range.
        seen = self._learned.values()
        self._everywhere = max(min(seen), min(max(seen), self._everywhere))
        self._tabulate()

    def _move(self, place: int, step: float) -> None:
        """Move the cost of a size from its present value in the table.

        The table never decreases, so its value may come from a smaller size. A faster run then lowers the smaller size
        too: lowering only the size's own cost would change no prediction, and every later run would lower it again.
        """
        cost_s = self._table[place] * math.exp(step)
        for lower in range(place):
            if self._table[lower] > cost_s:
                self._set(lower, cost_s)
        self._set(place, cost_s)

    def _set(self, place: int, cost_s: float) -> None:
        self._seen_s[place] = cost_s
        self._learned[place] = math.log(cost_s / self._prior[place])

    def _tabulate(self) -> None:
        factor = math.exp(self._everywhere)
        table, most_s = list[float](), 0.0
        for prior, seen in zip(self._prior, self._seen_s, strict=True):
            cost_s = prior * factor if seen is None else seen
            if cost_s > most_s:  # noqa: PLR1730 - max() takes longer; more rows never cost less
                most_s = cost_s
            table.append(most_s)
        self._table = table
        # The fixed cost is extrapolated from the two smallest sizes.
        self._empty_s = max(self._table[0] * 0.05, 2 * self._table[0] - self._table[1])


def _between(table: list[float], rows: int) -> float:
    """Interpolate between the sizes of a table."""
    low = rows.bit_length() - 1 if rows else 0
    if low > _LAST_INTERVAL:  # noqa: PLR1730 - min() takes longer, and each request asks a dozen times
        low = _LAST_INTERVAL
    start_s, size = table[low], _SIZES[low]
    return start_s + (table[low + 1] - start_s) * (rows - size) / size
