"""How recently a user acted: whether the user is in the middle of a session, just back, or has been away for long.

The sequence says what a user did, and not when. How far its newest actions can be trusted depends on that.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np

_HOUR_S = 3_600
#: The spans in which actions are counted.
_SPANS_S = (_HOUR_S, 24 * _HOUR_S, 7 * 24 * _HOUR_S)
#: The age of the newest action of a user who never acted, or not for so long.
_NEVER_S = 365 * 24 * _HOUR_S


def recency(times_ms: np.ndarray, read_ms: int) -> tuple[float, float, float, float]:
    """Return the columns `RECENCY_NAMES` of one request, each as `log2_1p` of its number, the age in seconds.

    Args:
        times_ms: int64[K], Unix times of the newest actions, newest first; at most the model's sequence length.
        read_ms: Unix time at which they were read. Times after it count as this time.

    Cost: about 3 us for 50 actions.
    """
    oldest_first = times_ms[::-1].tolist()
    count = len(oldest_first)
    age_s = max(0.0, (read_ms - oldest_first[-1]) / 1000) if count else _NEVER_S
    hour, day, week = (count - bisect_left(oldest_first, read_ms - 1000 * span_s) for span_s in _SPANS_S)
    return log2_1p(min(age_s, _NEVER_S)), log2_1p(hour), log2_1p(day), log2_1p(week)


def recency_of_ages(ages_s: np.ndarray) -> np.ndarray:
    """Return float32[R, 4], the columns of requests whose actions have these ages.

    Args:
        ages_s: float32[R, L], seconds, infinite for those that are hidden or past the end.
    """
    numbers = [np.minimum(ages_s.min(axis=1, initial=np.inf), _NEVER_S)]
    numbers += [np.count_nonzero(ages_s <= span_s, axis=1) for span_s in _SPANS_S]
    mantissa, exponent = np.frexp(1.0 + np.stack(numbers, axis=-1).astype(np.float64))
    found: np.ndarray = (exponent + 2 * mantissa - 2).astype(np.float32)
    return found


def log2_1p(number: float) -> float:
    """Return log2(1 + number), linear between powers of two: exact on every machine, unlike a logarithm."""
    mantissa, exponent = math.frexp(1.0 + number)
    return exponent + 2 * mantissa - 2
