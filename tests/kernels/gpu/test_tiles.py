from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.gpu.tiles import PROGRAMS, TILE_ROWS_MAX, tile_rows_for, tiles_max, tiles_of


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 20))
def test_tiles_hold_every_row_once_and_never_two_requests(counts, tile_rows, least):
    splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    tiles = tiles_of(splits, tile_rows, least)
    assert len(tiles) >= least
    covered = [(request, row) for request, start, stop in tiles.tolist() for row in range(start, stop)]
    assert covered == [(r, row) for r, n in enumerate(counts) for row in range(splits[r], splits[r] + n)]
    assert (tiles[:, 2] - tiles[:, 1] <= tile_rows).all()


@pytest.mark.parametrize(
    ("rows", "tile_rows"), [(0, 1), (1, 1), (128, 1), (129, 2), (256, 2), (257, 4), (512, 4), (513, 8), (1 << 20, 8)]
)
def test_a_program_takes_a_second_row_once_every_multiprocessor_has_work(rows, tile_rows):
    assert tile_rows_for(rows) == tile_rows
    assert tiles_of(np.array([0, rows], np.int32)).shape == (-(-rows // tile_rows), 3)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=8), st.integers(0, 4000), st.integers(0, 3))
def test_no_batch_needs_more_tiles_than_are_made_room_for(counts, more_rows, more_requests):
    splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    assert len(tiles_of(splits)) <= tiles_max(len(counts) + more_requests, sum(counts) + more_rows)
    assert tiles_max(1, 8 * TILE_ROWS_MAX * PROGRAMS) == 8 * PROGRAMS + 1
