"""What an ideal queue would hold: the same arrivals, the engine's own run times, and nothing else that takes time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loadtest.arrivals import poisson
from loadtest.search import HighestRate, RateSearch
from loadtest.steps import GOOD_SHARE

REST_S = 0.015
#: Arrivals per simulated rate: P99 rests on two hundred of them.
_ARRIVALS = 20_000


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Measured seconds of runs of one request.

    Attributes:
        alone: of a whole request with no other run beside it.
        beside: of a whole request with another one beside it.
        halves: of the longer of two halves that run at once, for two streams.
        alone_rested, halves_rested: the same after `REST_S` without any run, which costs a processor that shares caches
            and power with others a good deal of its speed.
    """

    alone: np.ndarray
    beside: np.ndarray
    halves: np.ndarray
    alone_rested: np.ndarray
    halves_rested: np.ndarray


def goodput_per_s(times: RunTimes, target_s: float, seed: int) -> dict[str, float]:
    """Return by policy the highest rate of which 99% end within `target_s`; the ideal is the largest of them."""
    return {
        "whole requests, one stream each": _highest(lambda due_s, rng: _whole(due_s, times, rng), target_s, seed),
        "halves on both streams": _highest(lambda due_s, rng: _halves(due_s, times, rng), target_s, seed),
    }


def _highest(latency_s: Callable[[np.ndarray, np.random.Generator], np.ndarray], target_s: float, seed: int) -> float:
    search = RateSearch(100.0, tolerance=0.01, tries_max=24)
    while not isinstance(decision := search.next(), HighestRate):
        due_s = poisson(decision.rate_per_s, _ARRIVALS / decision.rate_per_s, seed)
        waits_s = latency_s(due_s, np.random.default_rng(seed))
        search.tell(decision.rate_per_s, held=float(np.mean(waits_s <= target_s)) >= GOOD_SHARE)
    return decision.rate_per_s


def _whole(due_s: np.ndarray, times: RunTimes, rng: np.random.Generator) -> np.ndarray:
    """First come, first served by two streams; equal deadlines make that the earliest deadline first."""
    alone, beside, rested = (
        rng.choice(seconds, len(due_s)).tolist() for seconds in (times.alone, times.beside, times.alone_rested)
    )
    free, latency_s = [0.0, 0.0], []
    for i, due in enumerate(due_s.tolist()):
        start = max(due, heapq.heappop(free))
        quiet = rested if start - max(free) > REST_S / 2 else alone
        end = start + (beside[i] if free[0] > start else quiet[i])
        heapq.heappush(free, end)
        latency_s.append(end - due)
    return np.array(latency_s)


def _halves(due_s: np.ndarray, times: RunTimes, rng: np.random.Generator) -> np.ndarray:
    """One request at a time on both streams."""
    seconds, rested = (rng.choice(found, len(due_s)).tolist() for found in (times.halves, times.halves_rested))
    free, latency_s = 0.0, []
    for i, due in enumerate(due_s.tolist()):
        free = max(due, free) + (rested[i] if due - free > REST_S / 2 else seconds[i])
        latency_s.append(free - due)
    return np.array(latency_s)
