"""The near cache in C++ and in NumPy: both do the same to the bit, whatever happens to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from feature_client import cache_places
from feature_client.cache_places import NativePlaces, NumpyPlaces, PlaceArrays, places_of
from feature_client.codec import Rows
from feature_client.groups import Embedding, EmbeddingSpace, FeatureGroup
from feature_client.near_cache import NearCache

ARRAYS = ("keys", "rows", "read_s", "states", "counters")
#: Few enough ids for full sets and shared counters, with the one that an empty place holds.
IDS = st.one_of(st.integers(0, 60), st.sampled_from([2**63, 2**64 - 1]))


def group(dim):
    space = EmbeddingSpace(name="s", version=1, dim=dim, dtype="int8", scale=1.0)
    return FeatureGroup(name="g", version=1, entity="pin", fields=(Embedding(name="e", space=space),))


class BothImplementations(RuleBasedStateMachine):
    @initialize(dim=st.integers(1, 200), sets=st.sampled_from([1, 2, 8]), seed=st.integers(0, 9))
    def begin(self, dim, sets, seed):
        self.rng = np.random.default_rng(seed)
        place_bytes = dim + 33
        self.caches = [
            NearCache(group(dim), 8 * sets * place_bytes, stale_s=10, outage_s=30, native=native)
            for native in (True, False)
        ]
        kinds = [type(cache._places) for cache in self.caches]
        assert kinds == [NativePlaces, NumpyPlaces]
        counters = self.rng.choice([0, 1, 2, 100, 254, 255], self.caches[0]._arrays.counters.shape)
        for cache in self.caches:
            cache._arrays.counters[:] = counters
        self.now_s = 0.0

    @rule(count=st.integers(100, 300))
    def get_many(self, count):
        self.get(self.rng.integers(0, 60, count), 2)

    @rule(ids=st.lists(IDS, max_size=12), times=st.sampled_from([1, 2, 40]))
    def get(self, ids, times):
        for _ in range(times):
            native, numpy = (cache.get(np.array(ids, np.uint64), self.now_s) for cache in self.caches)
            self.equal(native[0], numpy[0])
            assert (native[1] is None) == (numpy[1] is None)
            if native[1] is not None:
                assert native[1].tobytes() == numpy[1].tobytes()

    @rule(ids=st.lists(IDS, max_size=12))
    def aged(self, ids):
        native, numpy = (cache.aged(np.array(ids, np.uint64), self.now_s) for cache in self.caches)
        self.equal(native[0], numpy[0])
        assert native[1].tobytes() == numpy[1].tobytes()

    @rule(ids=st.lists(IDS, max_size=20, unique=True), gap=st.sampled_from([0, 8]))
    def put(self, ids, gap):
        """Rows of stored values have gaps between them: the fingerprints."""
        dtype = self.caches[0].group.dtype
        stored = np.zeros(len(ids), [("gap", f"V{gap}"), ("row", dtype)] if gap else [("row", dtype)])
        stored["row"]["e"] = self.rng.integers(-128, 128, (len(ids), dtype.itemsize))
        rows = Rows(stored["row"], self.rng.integers(0, 3, len(ids)).astype(np.uint8))
        for cache in self.caches:
            cache.put(np.array(ids, np.uint64), rows, self.now_s)

    @rule(seconds=st.sampled_from([0.5, 10, 20, 31]))
    def wait(self, seconds):
        self.now_s += seconds

    @invariant()
    def both_are_equal(self):
        if hasattr(self, "caches"):
            native, numpy = self.caches
            assert native.counts == numpy.counts
            assert native._arrays.notes == numpy._arrays.notes
            for name in ARRAYS:
                assert getattr(native._arrays, name).tobytes() == getattr(numpy._arrays, name).tobytes(), name

    def equal(self, native, numpy):
        assert native.rows.dtype == numpy.rows.dtype
        assert native.rows.tobytes() == numpy.rows.tobytes()
        assert native.states.tobytes() == numpy.states.tobytes()


TestBothImplementations = BothImplementations.TestCase
# `make mutants` runs this without the settings of tests/conftest.py.
TestBothImplementations.settings = settings(
    stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def filled(native, count=24):
    arrays = PlaceArrays(group(4).dtype, 8 * (4 + 33))
    places = places_of(arrays, native=native)
    ids = np.arange(count, dtype=np.uint64)
    places.put(ids, Rows(np.ones(count, arrays.rows.dtype), np.ones(count, np.uint8)), 0.0, -1.0)
    return arrays, places


@pytest.mark.parametrize("native", [True, False])
def test_absent_rows_and_their_states_are_zeros(native):
    _, places = filled(native, count=8)
    rows, absent, misses = places.look_up(np.array([3, 99, 4], np.uint64), -1.0, noted=False)
    assert (absent.tolist(), misses) == ([False, True, False], 1)
    assert rows.states.tolist() == [1, 0, 1]
    assert rows.rows["e"].any(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize("native", [True, False])
def test_an_id_that_is_repeated_in_a_lookup_counts_once(native):
    arrays, places = filled(native)
    places.look_up(np.array([5] * 7, np.uint64), 0.0, noted=True)
    assert np.unique(arrays.counters).tolist() == [0, 1]
    assert arrays.notes == 7


@pytest.mark.parametrize("native", [True, False])
def test_a_shared_counter_is_raised_to_the_higher_count_in_whatever_order_the_ids_come(native):
    raised = []
    for order in (1, -1):
        arrays, places = filled(native)
        ids = np.random.default_rng(1).integers(0, 2**63, 5000).astype(np.uint64)
        one, other = NumpyPlaces(arrays)._counters_of(ids)
        alike = np.flatnonzero(one == one[0])
        seldom, often = next((0, i) for i in alike if len({one[0], other[0], other[i]}) == 3)
        arrays.counters[[one[0], other[seldom], other[often]]] = [9, 3, 9]
        places.look_up(ids[[seldom, often]][::order], 0.0, noted=True)
        raised.append(int(arrays.counters[one[0]]))
    assert raised == [10, 10]


@pytest.mark.parametrize("native", [True, False])
def test_counters_are_halved_after_48_notes_a_place(native):
    arrays, places = filled(native)
    asked = np.full(48 * 8, 5, np.uint64)
    arrays.counters[:] = 9
    places.look_up(asked, 0.0, noted=True)
    assert (arrays.notes, arrays.counters.max()) == (384, 10)
    places.look_up(asked[:1], 0.0, noted=True)
    assert (arrays.notes, arrays.counters.max()) == (192, 5)


@pytest.mark.parametrize("native", [True, False])
def test_rows_that_do_not_fit_their_ids_are_refused_before_a_byte_is_written(native):
    arrays, places = filled(native, count=0)
    ids, states = np.arange(2, dtype=np.uint64), np.zeros(2, np.uint8)
    for rows, message in (
        (Rows(np.zeros(2, group(3).dtype), states), r"2 ids need .*\(4,\).*, got 2 rows of .*\(3,\).* and 2 states"),
        (Rows(np.zeros(1, arrays.rows.dtype), states), "got 1 rows of .* and 2 states"),
        (Rows(np.zeros(2, arrays.rows.dtype), states[1:]), "got 2 rows of .* and 1 states"),
    ):
        with pytest.raises(ValueError, match=message):
            places.put(ids, rows, 0.0, -1.0)
    assert not arrays.keys.any()


def test_numpy_serves_where_the_library_is_not_built(monkeypatch):
    arrays = PlaceArrays(group(4).dtype, 0)
    assert isinstance(NearCache(group(4), 0, stale_s=1)._places, NativePlaces)
    monkeypatch.setattr(cache_places, "library_if_built", lambda: None)
    assert isinstance(places_of(arrays, native=True), NumpyPlaces)


def test_arrays_begin_on_a_cache_line():
    arrays = PlaceArrays(group(5).dtype, 1 << 12)
    assert {getattr(arrays, name).ctypes.data % 64 for name in ARRAYS} == {0}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("change", [lambda ids: ids[::-2], lambda ids: np.broadcast_to(ids[:1], 3)])
def test_ids_may_have_gaps_in_memory(native, change):
    _, places = filled(native, count=8)
    asked = change(np.array([3, 99, 4, 98, 5], np.uint64))
    rows, absent, misses = places.look_up(asked, -1.0, noted=False)
    assert (rows.states.tolist(), absent, misses) == ([1, 1, 1], None, 0)
