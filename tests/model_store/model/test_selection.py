from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model_store.model.selection import order_rows, select

INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("utilities", "top_k", "expected"),
    [
        pytest.param([1, 3, 2], 0, [1, 2, 0], id="best first"),
        pytest.param([2, 1, 2, 1], 0, [0, 2, 1, 3], id="ties keep the caller's order"),
        pytest.param([NAN, 1, INF, -5, -INF, 2], 0, [5, 1, 3, 0, 2, 4], id="non-finite ones sink in order"),
        pytest.param([1, 3, 2], 2, [1, 2], id="top k"),
        pytest.param([1, 3, 2], 99, [1, 2, 0], id="k above n returns all"),
        pytest.param([-0.0, 0.0], 0, [0, 1], id="zeros are equal"),
        pytest.param([], 0, [], id="nothing"),
    ],
)
def test_order(utilities, top_k, expected):
    assert select(np.array(utilities, np.float32), top_k).tolist() == expected


@given(hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32)))
def test_every_candidate_stands_once_and_finite_ones_descend_before_the_rest(utilities):
    order = select(utilities)
    assert sorted(order.tolist()) == list(range(len(utilities)))
    ordered = utilities[order]
    finite = np.isfinite(ordered)
    assert not np.any(np.diff(finite.astype(int)) > 0)
    assert np.all(np.diff(ordered[finite].astype(np.float64)) <= 0)


@given(st.lists(st.lists(st.sampled_from([NAN, INF, -1.0, 0.0, -0.0, 2.0]), max_size=6), max_size=5), st.randoms())
def test_rows_of_many_requests_are_ordered_as_each_request_alone(requests, random):
    places = [random.sample(range(len(one)), len(one)) for one in requests]  # rows as an answer might hold them
    utilities = np.array([one[place] for one, own in zip(requests, places, strict=True) for place in own], np.float32)
    owners = np.repeat(np.arange(len(requests)), [len(one) for one in requests])
    order = order_rows(utilities, owners, np.array([place for own in places for place in own], np.int64))
    assert (np.diff(owners[order]) >= 0).all()
    found = np.array([place for own in places for place in own], np.int64)[order]
    assert found.tolist() == [place for one in requests for place in select(np.array(one, np.float32)).tolist()]
