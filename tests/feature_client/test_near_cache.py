from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from feature_client.codec import Rows, RowState
from feature_client.fetch import fetch
from feature_client.near_cache import NearCache, NearCacheCounts, near_caches
from feature_client.stores.memory_store import MemoryStore
from tests import tiny
from tests.feature_client.cached_rows import cache, ids, implementation, read  # noqa: F401 - the fixture

#: How much memory a process has, in pages.
STATM = Path("/proc/self/statm")


def test_what_was_put_comes_back_in_the_order_asked_for():
    near = cache()
    near.put(ids(3, 0, 2**64 - 1), read(3, 0, 2**64 - 1), 1.0)
    rows, absent = near.get(ids(2**64 - 1, 3, 3, 0), 2.0)
    assert absent is None
    assert rows.rows.tobytes() == tiny.pin_rows(ids(2**64 - 1, 3, 3, 0)).tobytes()
    assert rows.states.tolist() == [0, 0, 0, 0]


def test_what_was_never_put_is_absent_also_the_id_that_an_empty_place_holds():
    near = cache()
    _, absent = near.get(ids(0, 7), 0.0)
    assert absent.tolist() == [True, True]
    near.put(ids(7), read(7), 0.0)
    _, absent = near.get(ids(0, 7), 0.0)
    assert absent.tolist() == [True, False]


def test_missing_and_foreign_rows_are_remembered_as_such():
    near = cache()
    states = np.array([RowState.MISSING, RowState.FOREIGN], np.uint8)
    near.put(ids(1, 2), Rows(np.array([tiny.PINS.default_row] * 2, tiny.PINS.dtype), states), 0.0)
    rows, absent = near.get(ids(2, 1), 0.0)
    assert absent is None
    assert rows.states.tolist() == [RowState.FOREIGN, RowState.MISSING]


def test_a_row_counts_as_absent_once_it_is_stale_and_a_newer_read_takes_its_place():
    near = cache(stale_s=10)
    near.put(ids(1), read(1), 0.0)
    assert near.get(ids(1), 9.9)[1] is None
    assert near.get(ids(1), 10.0)[1].tolist() == [True]
    near.put(ids(1), read(2), 10.0)
    rows, absent = near.get(ids(1), 19.0)
    assert absent is None
    assert rows.rows.tobytes() == tiny.pin_rows(ids(2)).tobytes()
    assert near.counts.evictions == 0


def test_returned_rows_do_not_change_when_their_place_is_taken():
    near = NearCache(tiny.PINS, 1, 10)
    near.put(ids(1), read(1), 0.0)
    rows, _ = near.get(ids(1), 0.0)
    for pin in range(2, 50):
        near.put(ids(pin), read(pin), 0.0)
    assert rows.rows.tobytes() == tiny.pin_rows(ids(1)).tobytes()


def test_memory_stays_within_its_bound_and_the_smallest_cache_still_works():
    assert cache(kilobytes=64).nbytes <= 64 << 10
    smallest = NearCache(tiny.PINS, 1, 10)
    assert smallest.places == 8
    everything = np.arange(100, dtype=np.uint64)
    smallest.put(everything, read(*everything.tolist()), 0.0)
    _, absent = smallest.get(everything, 0.0)
    assert np.count_nonzero(~absent) == 8
    assert smallest.counts.evictions == 0, "nobody was asked for more often"


def test_what_is_held_is_told_with_its_mean_age():
    near = cache()
    assert near.held(5.0) == (0, 0.0)
    near.put(ids(1), read(1), 1.0)
    near.put(ids(2, 3, 4), read(2, 3, 4), 5.0)
    assert near.held(7.0) == (4, 3.0)


def test_what_is_asked_for_more_often_takes_the_place_of_what_is_not_and_a_stale_row_gives_way_at_once():
    smallest = NearCache(tiny.PINS, 1, 10)
    smallest.put(ids(*range(8)), read(*range(8)), 0.0)
    for _ in range(4):
        smallest.get(ids(77), 0.0)
    smallest.put(ids(77), read(77), 0.0)
    assert smallest.get(ids(77), 0.0)[1] is None
    assert smallest.counts.evictions == 1
    smallest.put(ids(88), read(88), 100.0)
    assert smallest.get(ids(88), 100.0)[1] is None


def test_a_popular_row_survives_a_flood_of_ids_asked_for_once():
    near = NearCache(tiny.PINS, 1, 1e9)
    near.put(ids(1), read(1), 0.0)
    for _ in range(64):
        near.get(ids(1), 0.0)
    for pin in range(2, 40):
        near.put(ids(pin), read(pin), 0.0)
        near.get(ids(1), 0.0)
    assert near.get(ids(1), 0.0)[1] is None


def test_random_puts_and_gets_never_give_one_ids_row_for_another():
    rng = np.random.default_rng(5)
    near = cache(kilobytes=8)
    hits = 0
    for now_s in range(400):
        asked = rng.zipf(1.3, 60).astype(np.uint64)
        rows, absent = near.get(asked, float(now_s))
        found = np.ones(len(asked), bool) if absent is None else ~absent
        hits += np.count_nonzero(found)
        assert rows.rows[found].tobytes() == tiny.pin_rows(asked[found]).tobytes()
        missed = np.unique(asked[~found])
        near.put(missed, read(*missed.tolist()), float(now_s))
    assert hits == near.counts.hits > 10_000


#: Key, time, state and sixteen counters, beside the row.
PLACE_BYTES = tiny.PINS.dtype.itemsize + 8 + 8 + 1 + 16


@pytest.mark.parametrize(
    ("bytes_max", "places"),
    [
        pytest.param(0, 8, id="one set at least"),
        pytest.param(8 * PLACE_BYTES, 8, id="one set"),
        pytest.param(16 * PLACE_BYTES - 1, 8, id="a byte too few for two"),
        pytest.param(16 * PLACE_BYTES, 16, id="two sets"),
        pytest.param(64 * PLACE_BYTES - 1, 32, id="sets double"),
    ],
)
def test_memory_is_that_of_the_places_and_they_fit_the_bound(bytes_max, places):
    near = NearCache(tiny.PINS, bytes_max, 10)
    assert (near.places, near.nbytes) == (places, places * PLACE_BYTES)
    everything = np.arange(10 * places, dtype=np.uint64)
    near.put(everything, read(*everything.tolist()), 0.0)
    assert near.held(0.0)[0] == places, "every place can be reached"


def test_lookups_are_counted_by_what_came_of_them():
    near = cache()
    assert near.counts == NearCacheCounts(hits=0, misses=0, evictions=0)
    near.put(ids(1, 2), read(1, 2), 0.0)
    near.get(ids(1, 2, 2, 3), 0.0)
    assert near.counts == NearCacheCounts(hits=3, misses=1, evictions=0)


def test_what_a_lookup_returns_is_one_row_for_each_id_also_for_none():
    near = cache()
    for asked in (ids(), ids(5), ids(5, 6, 7)):
        assert near.get(asked, 0.0)[0].rows.shape == near.aged(asked, 0.0)[0].rows.shape == (len(asked),)


def test_rows_too_old_for_a_request_are_there_during_an_outage_until_they_are_too_old_for_that():
    near = NearCache(tiny.PINS, 64 << 10, 10, outage_s=100)
    near.put(ids(1, 2), read(1, 2), 0.0)
    near.put(ids(2), read(3), 50.0)
    rows, found = near.aged(ids(2, 7, 1), 99.9)
    assert found.tolist() == [True, False, True]
    assert rows.rows[found].tobytes() == tiny.pin_rows(ids(3, 1)).tobytes()
    assert rows.states.tolist() == [0, 0, 0]
    assert near.aged(ids(2, 7, 1), 100.0)[1].tolist() == [True, False, False]
    assert near.counts == NearCacheCounts(), "it is no lookup"


def test_an_outage_is_never_shorter_than_what_a_request_takes():
    near = NearCache(tiny.PINS, 64 << 10, 10)
    near.put(ids(1), read(1), 0.0)
    assert near.aged(ids(1), 9.9)[1].tolist() == [True]
    assert near.aged(ids(1), 10.0)[1].tolist() == [False]
    (short,) = near_caches((tiny.PINS,), 1, 0.5).values()
    everyone = np.arange(8, dtype=np.uint64)  # of one set
    short.put(everyone, read(*range(8)), 0.0)
    rows, found = short.aged(everyone, 0.4)
    assert found.all()
    assert rows.rows.tobytes() == tiny.pin_rows(everyone).tobytes()
    assert not short.aged(everyone, 0.5)[1].any()
    other = NearCache(tiny.PINS, 1, 0.5)
    other.put(everyone, read(*range(8)), 0.0)
    assert not other.aged(everyone, 0.5)[1].any()


def test_memory_is_shared_evenly_among_distinct_groups():
    other = tiny.changed(tiny.PINS, name="pin_other")
    caches = near_caches((tiny.PINS, other, tiny.PINS), 32 * PLACE_BYTES, 10, 20)
    assert set(caches) == {tiny.PINS.fingerprint, other.fingerprint}
    assert [one.places for one in caches.values()] == [16, 16]
    assert caches[other.fingerprint].group is other


class CountingStore(MemoryStore):
    def __init__(self, values):
        super().__init__(values)
        self.asked = []

    async def multi_get(self, keys, timeout_s=None):
        self.asked.append(len(keys))
        return await super().multi_get(keys)


async def test_a_second_request_reads_only_the_user_again():
    store, needs = CountingStore(tiny.features()), tiny.manifest().needs
    near = near_caches(needs.pin_groups, 1 << 20, 60)
    first = await fetch(store, needs, 1, ids(9, 2, 900), near=near)
    second = await fetch(store, needs, 1, ids(9, 2, 900), near=near)
    assert store.asked == [2, 4, 2]  # 9, 2 and 900, and pin 1 of the sequence; pin 2 is in both and read once
    for one, other in zip(first.pins.values(), second.pins.values(), strict=True):
        assert one.rows.tobytes() == other.rows.tobytes()
        assert one.states.tobytes() == other.states.tobytes()
    assert first.missing() == second.missing()
    assert first.missing().candidates == 1


async def test_what_a_lost_store_owed_is_not_remembered_as_missing():
    store, needs = MemoryStore(tiny.features()), tiny.manifest().needs
    near = near_caches(needs.pin_groups, 1 << 20, 60)
    store.failing = True
    assert (await fetch(store, needs, 1, ids(9), near=near)).store_unavailable
    store.failing = False
    assert (await fetch(store, needs, 1, ids(9), near=near)).missing().candidates == 0


#: Run in a process of its own: memory that other tests freed would count as resident before the cache is made.
MADE = """
from feature_client.near_cache import NearCache
from tests import tiny

def resident_pages():
    return int(open("/proc/self/statm").read().split()[1])

before = resident_pages()
near = NearCache(tiny.PINS, 64 << 20, stale_s=10.0)
print(near.nbytes, resident_pages() - before)
"""


@pytest.mark.skipif(not STATM.exists(), reason="only Linux tells how much memory is resident")
def test_all_memory_is_resident_before_the_first_request():
    found = subprocess.run([sys.executable, "-c", MADE], capture_output=True, text=True, check=True).stdout.split()
    cache_bytes, new_pages = map(int, found)
    assert cache_bytes >= 32 << 20
    assert new_pages * resource.getpagesize() > 0.9 * cache_bytes


@pytest.mark.parametrize("kilobytes", [1, 16, 256])
def test_ids_in_sequence_spread_over_the_sets(kilobytes):
    near = cache(kilobytes=kilobytes)
    half = np.arange(near.places // 2, dtype=np.uint64)
    near.put(half, read(*half.tolist()), 0.0)
    _, absent = near.get(half, 0.0)
    assert absent is None or np.count_nonzero(absent) < len(half) / 20
