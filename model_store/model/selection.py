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
    order = np.argsort(sort_key(utilities), axis=-1, kind="stable")
    return order[..., :top_k] if top_k else order


def order_rows(
    utilities: np.ndarray, requests: np.ndarray | None = None, places: np.ndarray | None = None
) -> np.ndarray:
    """Order the rows of many requests, each request's rows as `select` does.

    Args:
        utilities: float[N].
        requests: integers[N], the request of each row; None if all rows are of one.
        places: integers[N], positions in the caller's order, where rows are not in it.

    Returns:
        int64[N], positions in `utilities`: sorted by request, best first.
    """
    keys = (places, sort_key(utilities), requests)
    return np.lexsort(tuple(key for key in keys if key is not None))


def sort_key(utilities: np.ndarray) -> np.ndarray:
    """Return float[..., N] that a stable sort brings into the order of `select`."""
    return np.where(np.isfinite(utilities), -utilities, np.inf)
