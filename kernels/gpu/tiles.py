"""How the fused kernel is launched, and how ragged rows are cut for it: a program takes a few rows of one request."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: The kernel's input that says which rows a program takes: int32[T, 3] of `tiles_of`.
TILES = "tiles"
#: Most rows of one request that a program computes one after the other, so that what they share is read once.
TILE_ROWS_MAX = 8
#: Programs that an H100 or H200 runs at once: one on each of 132 multiprocessors, rounded down to a power of two.
PROGRAMS = 128


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernel is compiled. Every choice computes the same; `bench/results/gpu_compiled.md` says what each costs.

    The default has the fewest barriers and spills least, of what runs on every architecture.

    Attributes:
        block: actions that go through layer 1 together; a power of two.
        warps: of a program, 32 threads each.
    """

    block: int = 128
    warps: int = 8


def tile_rows_for(rows: int) -> int:
    """Return how many rows a tile of a batch takes.

    A batch takes as long as its longest multiprocessor, so a small one is spread over all of them before any program
    gets a second row. Powers of two: all batches of a bucket of shapes are cut alike.
    """
    fair = -(-rows // PROGRAMS)
    return min(TILE_ROWS_MAX, 1 << max(0, fair - 1).bit_length())


def tiles_of(row_splits: np.ndarray, tile_rows: int = 0, tiles: int = 0) -> np.ndarray:
    """Cut every request's rows into tiles.

    Args:
        row_splits: int32[R + 1].
        tile_rows: at most so many rows in each; 0 takes `tile_rows_for` the batch.
        tiles: at least so many tiles; those too many are empty.

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
    """Return how many tiles a batch of at most so many rows and requests may need."""
    return max(min(rows, PROGRAMS), -(-rows // tile_rows_for(rows))) + requests
