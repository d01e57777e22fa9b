"""Whether two arrays of floats have the same bits; all NaNs are equal."""

from __future__ import annotations

import numpy as np


def equal_to_the_bit(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    whole = f"u{one.dtype.itemsize}"
    same = np.ascontiguousarray(one).view(whole) == np.ascontiguousarray(other).view(whole)
    return bool(np.all(same | (np.isnan(one) & np.isnan(other))))
