"""Sliding windows of request outcomes, latencies and parties' utilities, one for each label, for the label's guard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from server.request.parties import PartyMean, PartyTotals, party_means


@dataclass(slots=True)
class _Half:
    began_s: float
    seconds: list[float] = field(default_factory=list)
    errors: int = 0
    #: By surface.
    parties: dict[str, PartyTotals] = field(default_factory=dict)


class Window:
    """The outcomes of a label's requests in the last `length_s` to 1.5 `length_s` seconds."""

    def __init__(self, length_s: float) -> None:
        self._half_s = length_s / 2
        self._halves = [_Half(-math.inf)]

    def note(self, now_s: float, seconds: float, *, failed: bool) -> None:
        """Record a request and its duration in seconds; of a failed one, only the failure counts."""
        newest = self._newest(now_s)
        if failed:
            newest.errors += 1
        else:
            newest.seconds.append(seconds)

    def note_parties(self, now_s: float, surface: str, parties: tuple[str, ...], values: np.ndarray) -> None:
        """Record what an answer is worth to each party of its surface, float64[P]."""
        totals = self._newest(now_s).parties
        if surface not in totals:
            totals[surface] = PartyTotals(parties)
        totals[surface].add(values)

    def seen(self, now_s: float) -> WindowSummary:
        halves = self._lately(now_s)
        seconds = [s for half in halves for s in half.seconds]
        errors = sum(half.errors for half in halves)
        p99_s = float(np.quantile(seconds, 0.99)) if seconds else 0.0
        surfaces = {surface for half in halves for surface in half.parties}
        parties = {
            surface: party_means(half.parties[surface] for half in halves if surface in half.parties)
            for surface in sorted(surfaces)
        }
        return WindowSummary(len(seconds) + errors, errors, p99_s, parties)

    def _newest(self, now_s: float) -> _Half:
        """Return the half that a request of now belongs to."""
        newest = self._halves[-1]
        if now_s - newest.began_s >= self._half_s:
            newest = _Half(now_s)
            self._halves = [*self._lately(now_s), newest]
        return newest

    def _lately(self, now_s: float) -> list[_Half]:
        """Return the halves in which something of the last `length_s` may be."""
        return [half for half in self._halves if now_s - half.began_s < 3 * self._half_s]


@dataclass(frozen=True, slots=True)
class WindowSummary:
    """Number of requests in a window, how many of them failed, and the P99 latency of the answered ones.

    Attributes:
        parties: what the answers were worth on average, by surface and party.
    """

    requests: int
    errors: int
    p99_s: float
    parties: Mapping[str, Mapping[str, PartyMean]] = field(default_factory=dict)
