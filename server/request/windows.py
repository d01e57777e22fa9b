"""Sliding windows of request outcomes and latencies, one for each label; the label's guard judges them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class _Half:
    began_s: float
    seconds: list[float] = field(default_factory=list)
    errors: int = 0


class Window:
    """The outcomes of a label's requests in the last `length_s` to 1.5 `length_s` seconds."""

    def __init__(self, length_s: float) -> None:
        self._half_s = length_s / 2
        self._halves = [_Half(-math.inf)]

    def note(self, now_s: float, seconds: float, *, failed: bool) -> None:
        """Record a request and its duration in seconds; of a failed one, only the failure counts."""
        newest = self._halves[-1]
        if now_s - newest.began_s >= self._half_s:
            newest = _Half(now_s)
            self._halves = [*self._lately(now_s), newest]
        if failed:
            newest.errors += 1
        else:
            newest.seconds.append(seconds)

    def seen(self, now_s: float) -> WindowSummary:
        halves = self._lately(now_s)
        seconds = [s for half in halves for s in half.seconds]
        errors = sum(half.errors for half in halves)
        return WindowSummary(len(seconds) + errors, errors, float(np.quantile(seconds, 0.99)) if seconds else 0.0)

    def _lately(self, now_s: float) -> list[_Half]:
        """Return the halves in which something of the last `length_s` may be."""
        return [half for half in self._halves if now_s - half.began_s < 3 * self._half_s]


@dataclass(frozen=True, slots=True)
class WindowSummary:
    """Number of requests in a window, how many of them failed, and the P99 latency of the answered ones."""

    requests: int
    errors: int
    p99_s: float
