"""Orders candidates by utility."""

from __future__ import annotations

import numpy as np


def select(utilities: np.ndarray, top_k: int = 0) -> np.ndarray:
    """Order candidates by utility, best first.

    Equal utilities keep the caller's order; non-finite ones sink to the end, in the caller's order.

    Args:
        utilities: float32[..., N]; each row of the last axis is ordered on its own.
        top_k: how many to return; 0 returns all.

    Returns:
        int64[..., min(N, top_k)], positions along the last axis of `utilities`.
    """
    key = np.where(np.isfinite(utilities), -utilities, np.inf)
    order = np.argsort(key, axis=-1, kind="stable")
    return order[..., :top_k] if top_k else order
