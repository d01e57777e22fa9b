from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels.gpu.tiles import TILE_ROWS, tiles_max, tiles_of


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 20))
def test_tiles_hold_every_row_once_and_never_two_requests(counts, tile_rows, least):
    splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    tiles = tiles_of(splits, tile_rows, least)
    assert len(tiles) >= least
    covered = [(request, row) for request, start, stop in tiles.tolist() for row in range(start, stop)]
    assert covered == [(r, row) for r, n in enumerate(counts) for row in range(splits[r], splits[r] + n)]
    assert (tiles[:, 2] - tiles[:, 1] <= tile_rows).all()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_no_batch_needs_more_tiles_than_are_made_room_for(counts):
    splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    assert len(tiles_of(splits)) <= tiles_max(len(counts), sum(counts))
    assert tiles_max(1, TILE_ROWS) == 2
