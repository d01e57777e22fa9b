"""How ragged rows are cut for the fused kernel: every program takes a few rows of one request."""

from __future__ import annotations

import numpy as np

#: The kernel's input that says which rows a program takes: int32[T, 3] of `tiles_of`.
TILES = "tiles"
#: Rows of one request that a program computes one after the other, so that what they share is read once.
TILE_ROWS = 8


def tiles_of(row_splits: np.ndarray, tile_rows: int = TILE_ROWS, tiles: int = 0) -> np.ndarray:
    """Cut every request's rows into tiles.

    Args:
        row_splits: int32[R + 1].
        tile_rows: at most so many rows in each.
        tiles: at least so many tiles; those too many are empty.

    Returns:
        int32[T, 3]: request, first row, row after the last.
    """
    counts = np.diff(row_splits)
    of_request = -(-counts // tile_rows)
    request = np.repeat(np.arange(len(counts)), of_request)
    number = np.arange(len(request)) - np.repeat(np.cumsum(of_request) - of_request, of_request)
    start = row_splits[:-1][request] + number * tile_rows
    cut = np.stack([request, start, np.minimum(start + tile_rows, row_splits[1:][request])], axis=1)
    return np.concatenate([cut, np.zeros((max(0, tiles - len(cut)), 3), cut.dtype)]).astype(np.int32)


def tiles_max(requests: int, rows: int) -> int:
    """Return how many tiles so many rows of so many requests may need."""
    return -(-rows // TILE_ROWS) + requests
