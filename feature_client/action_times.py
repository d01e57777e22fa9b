"""The times that an action may have: when it is received, and when it is read from the store."""

from __future__ import annotations

import time

import numpy as np

#: 1990, before anyone acted on a web page. Seconds that are read as milliseconds fall in January 1970.
EARLIEST_MS = 631_152_000_000
DAY_S = 86_400
#: Producers' clocks differ. An action from further ahead would stay first in its sequence for as long.
AHEAD_MAX_MS = 60_000
#: Stored actions from further ahead are ignored, and the next write drops them. The limit is wider than the one for
#: new actions so that a machine with a slow clock drops no valid action; an action between the two limits is in the
#: past within the hour.
STORED_AHEAD_MAX_MS = 3_600_000
#: Other units that a producer may have used, by how many of each make a millisecond.
_OTHER_UNITS = {"seconds": 1e-3, "microseconds": 1e3, "nanoseconds": 1e6}


def clock_ms() -> int:
    """Return the Unix time in milliseconds."""
    return int(time.time() * 1e3)


def time_problem(time_ms: int, now_ms: int, lasts_s: float | None = None) -> str | None:
    """Return what is wrong with the time of a new action, or None if the action can have happened by now.

    Args:
        time_ms: the action's Unix time.
        now_ms: the Unix time.
        lasts_s: the retention of sequences, which admits no older action; None for ever.
    """
    if EARLIEST_MS <= time_ms <= now_ms + AHEAD_MAX_MS:
        if lasts_s is None or time_ms >= now_ms - lasts_s * 1e3:
            return None
        return (
            f"{time_ms} is older than the {lasts_s / DAY_S:g} days for which sequences are kept; raise "
            "record_retention_days (of a follower: --retention-days) to record older actions"
        )
    meant = [unit for unit, each in _OTHER_UNITS.items() if EARLIEST_MS <= time_ms / each <= now_ms + AHEAD_MAX_MS]
    hint = f"; it looks like {meant[0]}" if meant else ""
    return f"{time_ms} is not a Unix time in milliseconds between 1990 ({EARLIEST_MS}) and now ({now_ms}){hint}"


def without_future(events: np.ndarray, now_ms: int) -> np.ndarray:
    """Return stored events, structured[K], without those in the future."""
    future = events["time_ms"] > now_ms + STORED_AHEAD_MAX_MS
    return events[~future] if future.any() else events
