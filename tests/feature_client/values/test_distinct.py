"""The ids of a request, once each: C++ beside NumPy."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from feature_client.values.distinct import distinct, distinct_in_numpy

few = st.integers(0, 9) | st.integers(2**64 - 5, 2**64 - 1)


@given(st.lists(few, max_size=40), st.lists(few, max_size=12, unique=True))
def test_each_id_is_found_among_the_known_ones_or_the_new_ones_in_their_order(ids, known):
    wanted, before = np.array(ids, np.uint64), np.array(known, np.uint64)
    for way in (distinct, distinct_in_numpy):
        new, index = way(wanted, before)
        assert new.tolist() == [i for i in dict.fromkeys(ids) if i not in known]
        assert np.concatenate((before, new))[index].tolist() == ids
        assert (new.dtype, index.dtype) == (np.uint64, np.int64)


def test_thousands_of_ids_are_told_apart():
    ids = np.random.default_rng(1).integers(0, 3_000, 10_000).astype(np.uint64)[::2]
    for new, expected in zip(distinct(ids, ids[:0]), distinct_in_numpy(ids, ids[:0]), strict=True):
        assert new.tolist() == expected.tolist()
