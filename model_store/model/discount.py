"""What a position of an answer counts for, wherever whole orders are valued: tuning, exploration, parties' metrics."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=64)
def discounts(count: int) -> np.ndarray:
    """Return float64[count], read-only: 1 / log2(position + 2), the discount of DCG (Järvelin and Kekäläinen, 2002)."""
    found: np.ndarray = 1 / np.log2(np.arange(count) + 2.0)
    found.flags.writeable = False
    return found
