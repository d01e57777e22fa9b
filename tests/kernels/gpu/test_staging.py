from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from kernels.engine import FeatureBatch
from kernels.gpu.staging import Bucket, Buckets, Layout
from kernels.gpu.tiles import tiles_of
from tests.kernels.test_engines import SPECS, batch


def test_a_layout_holds_every_input_apart_and_aligned():
    layout = Layout(SPECS, Bucket(rows=128, requests=4), tiled=True)
    places = sorted(layout.places.values(), key=lambda place: place.start)
    assert {"row_request", "tiles", *(spec.name for spec in SPECS)} == layout.places.keys()
    assert all(place.start % 256 == 0 for place in places)
    assert all(one.stop <= other.start for one, other in pairwise(places))
    assert places[-1].stop <= layout.bytes


def test_filling_writes_the_batch_and_zeros_behind_it():
    layout = Layout(SPECS, Bucket(rows=64, requests=4), tiled=True)
    buffer = np.full(layout.bytes, 255, np.uint8)
    given = batch(5, 0, 3)
    layout.fill(buffer, given)
    for spec in SPECS:
        tensor = (given.request if spec.side == "request" else given.candidate)[spec.name]
        found = layout.places[spec.name].of(buffer)
        np.testing.assert_array_equal(found[: len(tensor)], tensor)
        assert not found[len(tensor) :].any()
    owner = layout.places["row_request"].of(buffer)
    assert owner[:8].tolist() == [0] * 5 + [2] * 3
    assert not owner[8:].any()
    tiles = layout.places["tiles"].of(buffer)
    cut = tiles_of(given.row_splits)
    np.testing.assert_array_equal(tiles[: len(cut)], cut)
    assert not tiles[len(cut) :].any()


@pytest.mark.parametrize(
    ("requests", "rows", "expected"),
    [(1, 1, (64, 1)), (3, 64, (64, 4)), (5, 65, (128, 16)), (17, 17, (64, 64)), (64, 4096, (4096, 64))],
)
def test_a_batch_goes_to_the_smallest_bucket_that_holds_it(requests, rows, expected):
    buckets = Buckets()
    found = buckets.of(requests, rows)
    assert (found.rows, found.requests) == expected
    assert found in buckets.all()


@pytest.mark.parametrize("sizes", [(1,), (0, 5, 0), (7,) * 9, (3, 50, 1, 0, 0, 2), (100,), (10, 10, 10), (0, 0)])
def test_cutting_keeps_every_row_its_request_and_the_order(sizes):
    whole = batch(*sizes)
    buckets = Buckets(requests=(1, 4), rows=(8, 16))
    parts = list(buckets.cut(whole))
    for part in parts:
        assert 0 < part.rows <= 16
        assert part.requests <= 4
        assert part.row_splits[0] == 0
        part.check(SPECS)
    assert sum(part.rows for part in parts) == whole.rows
    if parts:
        for name, tensor in whole.candidate.items():
            np.testing.assert_array_equal(np.concatenate([part.candidate[name] for part in parts]), tensor)
        for name, tensor in whole.request.items():
            spread = np.concatenate([part.request[name][part.row_request()] for part in parts])
            np.testing.assert_array_equal(spread, tensor[whole.row_request()])


def test_a_batch_that_fits_stays_whole():
    whole = batch(3, 4)
    (part,) = Buckets().cut(whole)
    assert isinstance(part, FeatureBatch)
    assert part.row_splits.tolist() == [0, 3, 7]
