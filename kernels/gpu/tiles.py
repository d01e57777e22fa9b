"""Split ragged rows into tiles for the Triton kernel, and choose its launch. A program computes one tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: The kernel's input with the rows of each program: int32[T, 3], from `tiles_of`.
TILES = "tiles"
#: Most rows in a tile. A program computes them one after the other, and reads what they share once.
TILE_ROWS_MAX = 8
#: Concurrent programs on an H100 or H200: one per multiprocessor, 132, rounded down to a power of two.
PROGRAMS = 128


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernel is compiled. Every choice gives the same results; `bench/results/gpu_compiled.md` has their costs.

    Of the choices that run on every architecture, the default has the fewest barriers and register spills.

    Attributes:
        block: number of actions that pass through layer 1 together; a power of two.
        warps: number of warps of a program, 32 threads each.
    """

    block: int = 128
    warps: int = 8


def tile_rows_for(rows: int) -> int:
    """Return the number of rows in a tile, for a batch of `rows` rows.

    The slowest multiprocessor determines the time of a batch, so small batches are spread over all multiprocessors
    before a program gets a second row. The number is a power of two, so that all batches of a bucket are split alike.
    """
    fair = -(-rows // PROGRAMS)
    return min(TILE_ROWS_MAX, 1 << max(0, fair - 1).bit_length())


def tiles_of(row_splits: np.ndarray, tile_rows: int = 0, tiles: int = 0) -> np.ndarray:
    """Split the rows of every request into tiles.

    Args:
        row_splits: int32[R + 1].
        tile_rows: most rows in a tile; 0 means `tile_rows_for` the batch.
        tiles: pad the result with empty tiles to this number.

    Returns:
        int32[T, 3]: request, first row, row after the last.
    """
    tile_rows = tile_rows or tile_rows_for(int(row_splits[-1]))
    counts = np.diff(row_splits)
    of_request = -(-counts // tile_rows)
    request = np.repeat(np.arange(len(counts)), of_request)
    number = np.arange(len(request)) - np.repeat(np.cumsum(of_request) - of_request, of_request)
    start = row_splits[:-1][request] + number * tile_rows
    cut = np.stack([request, start, np.minimum(start + tile_rows, row_splits[1:][request])], axis=1)
    return np.concatenate([cut, np.zeros((max(0, tiles - len(cut)), 3), cut.dtype)]).astype(np.int32)


def tiles_max(requests: int, rows: int) -> int:
    """Return the largest number of tiles of a batch with at most these numbers of requests and rows."""
    return max(min(rows, PROGRAMS), -(-rows // tile_rows_for(rows))) + requests
