"""Which times an action may have: when it comes in, and when it is read from the store."""

from __future__ import annotations

import time

import numpy as np

#: 1990, before anybody acted on a web page: seconds taken for milliseconds are of January 1970.
EARLIEST_MS = 631_152_000_000
#: Clocks of producers differ; an action from further ahead would stand first in its sequence for as long.
AHEAD_MAX_MS = 60_000
#: Stored actions from further ahead are left out and dropped. More than what may come ahead, so that a machine whose
#: clock is behind drops nothing true; what lies between is in the past within the hour.
STORED_AHEAD_MAX_MS = 3_600_000
#: Units that a producer may have meant, by how many of them are a millisecond.
_OTHER_UNITS = {"seconds": 1e-3, "microseconds": 1e3, "nanoseconds": 1e6}


def clock_ms() -> int:
    """Return the Unix time in milliseconds."""
    return int(time.time() * 1e3)


def time_problem(time_ms: int, now_ms: int) -> str | None:
    """Say what is wrong with the time of an action that comes in; None where it may have happened by now."""
    if EARLIEST_MS <= time_ms <= now_ms + AHEAD_MAX_MS:
        return None
    meant = [unit for unit, each in _OTHER_UNITS.items() if EARLIEST_MS <= time_ms / each <= now_ms + AHEAD_MAX_MS]
    hint = f"; it looks like {meant[0]}" if meant else ""
    return f"{time_ms} is no Unix time in milliseconds from 1990 ({EARLIEST_MS}) to now ({now_ms}){hint}"


def without_future(events: np.ndarray, now_ms: int) -> np.ndarray:
    """Return stored events, structured[K], less those of a time that no clock shows yet."""
    future = events["time_ms"] > now_ms + STORED_AHEAD_MAX_MS
    return events[~future] if future.any() else events
