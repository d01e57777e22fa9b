"""Simulate an ideal queue: the same arrivals and the engine's own run times, without any other cost."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loadtest.arrivals import poisson
from loadtest.search import HighestRate, RateSearch
from loadtest.steps import GOOD_SHARE

#: The queue has as many, whatever the server has.
STREAMS = 2
REST_S = 0.015
#: Arrivals per simulated rate: two hundred of them are above P99.
_ARRIVALS = 20_000


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Measured times of runs of one request, in seconds.

    Attributes:
        alone: times of whole requests without a concurrent run.
        beside: times of whole requests with a concurrent run.
        halves: times of the longer of two concurrent halves, on two streams.
        alone_rested, halves_rested: the same after `REST_S` without runs. A processor that shares caches and power with
            others is much slower then.
    """

    alone: np.ndarray
    beside: np.ndarray
    halves: np.ndarray
    alone_rested: np.ndarray
    halves_rested: np.ndarray


def goodput_per_s(times: RunTimes, target_s: float, seed: int) -> dict[str, float]:
    """Return the highest rate with 99% goodput within `target_s`, by policy. The ideal queue has the best of them."""
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
    """Serve in order of arrival on two streams. With equal deadlines, this is earliest deadline first."""
    alone, beside, rested = (
        rng.choice(seconds, len(due_s)).tolist() for seconds in (times.alone, times.beside, times.alone_rested)
    )
    free, latency_s = [0.0] * STREAMS, []
    for i, due in enumerate(due_s.tolist()):
        start = max(due, heapq.heappop(free))
        quiet = rested if start - max(free) > REST_S / 2 else alone
        end = start + (beside[i] if free[0] > start else quiet[i])
        heapq.heappush(free, end)
        latency_s.append(end - due)
    return np.array(latency_s)


def _halves(due_s: np.ndarray, times: RunTimes, rng: np.random.Generator) -> np.ndarray:
    """Serve one request at a time, on both streams."""
    seconds, rested = (rng.choice(found, len(due_s)).tolist() for found in (times.halves, times.halves_rested))
    free, latency_s = 0.0, []
    for i, due in enumerate(due_s.tolist()):
        free = max(due, free) + (rested[i] if due - free > REST_S / 2 else seconds[i])
        latency_s.append(free - due)
    return np.array(latency_s)
