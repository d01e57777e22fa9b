"""Measures how many of the other streams ran beside a run. Pure."""

from __future__ import annotations

from typing import NamedTuple


class RunStart(NamedTuple):
    """When a run began, and the seconds that all runs had taken by then."""

    began_s: float
    taken_s: float


class Overlap:
    """The runs in progress, and the seconds that they have taken together."""

    def __init__(self, streams: int) -> None:
        self._others = max(1, streams - 1)
        self._runs = 0
        self._taken_s = self._now_s = 0.0

    def begin(self, now_s: float) -> RunStart:
        """Count a run that begins; pass the result to `end`."""
        self._go_to(now_s)
        self._runs += 1
        return RunStart(now_s, self._taken_s)

    def end(self, start: RunStart, now_s: float) -> float:
        """Count a run as ended; return the mean fraction of the other streams that ran beside it."""
        self._go_to(now_s)
        self._runs -= 1
        own_s = now_s - start.began_s
        if own_s <= 0:
            return min(1.0, self._runs / self._others)
        return min(1.0, max(0.0, (self._taken_s - start.taken_s - own_s) / (own_s * self._others)))

    def _go_to(self, now_s: float) -> None:
        if now_s > self._now_s:
            self._taken_s += self._runs * (now_s - self._now_s)
            self._now_s = now_s
