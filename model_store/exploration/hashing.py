"""Hashes numbers evenly, so that draws repeat: which label answers a user, and how a request explores."""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed(number: int) -> int:
    """Hash a number to [0, 2**64) (the finaliser of SplitMix64: Steele, Lea and Flood, 2014)."""
    found = (number + _GAMMA) & _MASK
    found = ((found ^ found >> 30) * _FIRST) & _MASK
    found = ((found ^ found >> 27) * _SECOND) & _MASK
    return found ^ found >> 31


def mixed_all(numbers: np.ndarray) -> np.ndarray:
    """Hash each of uint64[...] as `mixed` does; returns uint64 of the same shape."""
    found = numbers + np.uint64(_GAMMA)  # arrays of integers wrap around without a warning
    found = (found ^ found >> np.uint64(30)) * np.uint64(_FIRST)
    found = (found ^ found >> np.uint64(27)) * np.uint64(_SECOND)
    mixed_numbers: np.ndarray = found ^ found >> np.uint64(31)
    return mixed_numbers
