"""A remote store is asked once or twice for a request, and gives what a local one gives."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_client.codec import encode_rows, encode_sequence
from feature_client.fetch import fetch
from feature_client.near_cache import near_caches
from feature_client.stores.memory_store import MemoryStore
from feature_client.stores.store import StoreUnavailableError
from tests import tiny
from tests.feature_client.same_features import assert_same

NEEDS = tiny.manifest().needs


def ids(*them: int) -> np.ndarray:
    return np.array(them, np.uint64)


class RemoteStore(MemoryStore):
    """A store that answers when the event loop comes round.

    Attributes:
        asked: the keys of each read.
        lost: keys that cannot be read.
    """

    local = False

    def __init__(self, values):
        super().__init__(values)
        self.asked = []
        self.lost = set()

    async def multi_get(self, keys, timeout_s=None):
        self.asked.append(list(keys))
        await asyncio.sleep(0)
        values = await super().multi_get(keys)
        lost = [i for i, key in enumerate(keys) if key in self.lost]
        if lost:
            raise StoreUnavailableError("a part", [None if i in lost else v for i, v in enumerate(values)], lost)
        return values


async def test_user_candidates_and_query_are_read_together_and_then_the_pins_of_actions_alone():
    store = RemoteStore(tiny.features())
    await fetch(store, NEEDS, 1, ids(9, 2, 900), query_pin_id=5)
    pins = tiny.PINS
    assert [sorted(keys) for keys in store.asked] == [
        sorted([tiny.USERS.key(1), tiny.ACTIONS.key(1), *pins.keys(ids(9, 2, 900, 5))]),
        [pins.key(1)],
    ], "pin 2 of the actions is a candidate"


async def test_a_request_whose_pins_are_cached_is_one_read_of_its_user():
    store, near = RemoteStore(tiny.features()), near_caches(NEEDS.pin_groups, 1 << 20, 60)
    first = await fetch(store, NEEDS, 1, ids(9, 2, 900), near=near)
    store.asked.clear()
    second = await fetch(store, NEEDS, 1, ids(9, 2, 900), near=near)
    assert store.asked == [[tiny.USERS.key(1), tiny.ACTIONS.key(1)]]
    assert_same(second, first)


stored_pins = [1, 2, 3, 4, 5, 6, 7, 8]
requests = st.tuples(
    st.sampled_from([1, 2, 3]),
    st.lists(st.integers(1, 12), min_size=1, max_size=9, unique=True),
    st.none() | st.integers(1, 12),
)


def features() -> dict[bytes, bytes]:
    """Eight pins, and three users: one with actions on stored and on missing pins, one without, one not stored."""
    rows = tiny.pin_rows(np.array(stored_pins))
    values = dict(zip(tiny.PINS.keys(ids(*stored_pins)), encode_rows(tiny.PINS, rows), strict=True))
    values[tiny.PINS.key(4)] = b"of another group"
    values |= dict(zip(tiny.USERS.keys(ids(1, 2)), encode_rows(tiny.USERS, tiny.user_rows(ids(1, 2))), strict=True))
    values[tiny.ACTIONS.key(1)] = encode_sequence(tiny.ACTIONS, tiny.events([3, 11, 8, 3], [0, 1, 0, 1]))
    values[tiny.ACTIONS.key(2)] = encode_sequence(tiny.ACTIONS, tiny.events([], []))
    return values


@settings(max_examples=100, deadline=None)
@given(st.lists(requests, min_size=1, max_size=5), st.booleans())
def test_a_remote_store_gives_what_a_local_one_gives(them, cached):
    async def run():
        local, remote = MemoryStore(features()), RemoteStore(features())
        # One set of eight places: rows are evicted and refused.
        nears = [near_caches(NEEDS.pin_groups, 1, 60) if cached else None for _ in range(2)]
        for user, pins, query in them:
            expected = await fetch(local, NEEDS, user, ids(*pins), query, near=nears[0])
            remote.asked.clear()
            assert_same(await fetch(remote, NEEDS, user, ids(*pins), query, near=nears[1]), expected)
            assert 1 <= len(remote.asked) <= 2
            keys = [key for read in remote.asked for key in read]
            assert len(set(keys)) == len(keys)

    asyncio.run(run())


@settings(max_examples=100, deadline=None)
@given(st.lists(requests, min_size=2, max_size=5), st.data())
def test_requests_at_the_same_time_read_each_pin_once_and_all_get_theirs(them, data):
    async def run():
        local, remote = MemoryStore(features()), RemoteStore(features())
        near = near_caches(NEEDS.pin_groups, 1 << 20, 60)

        async def late(turns, user, pins, query):
            for _ in range(turns):
                await asyncio.sleep(0)
            return await fetch(remote, NEEDS, user, ids(*pins), query, near=near)

        turns = [data.draw(st.integers(0, 3)) for _ in them]
        found = await asyncio.gather(*(late(wait, *request) for wait, request in zip(turns, them, strict=True)))
        for (user, pins, query), one in zip(them, found, strict=True):
            assert_same(one, await fetch(local, NEEDS, user, ids(*pins), query))
        keys = [key for read in remote.asked for key in read if key.startswith(tiny.PINS.key_prefix)]
        assert len(set(keys)) == len(keys)
        assert not any(cache.flights for cache in near.values())

    asyncio.run(run())


async def test_without_the_native_library_the_same_is_read(monkeypatch):
    near = near_caches(NEEDS.pin_groups, 1, 60)
    requests = [(1, ids(1, 2, 9), None), (1, ids(2, 8, 3), 4), (2, ids(4), 7), (3, ids(5, 1), 5)]
    expected = [await fetch(RemoteStore(features()), NEEDS, *request) for request in requests]
    for module in ("codec", "stores.redis.answers"):
        monkeypatch.setattr(f"feature_client.{module}.native_values", lambda: None)
    monkeypatch.setattr("feature_client.values.distinct._native", lambda: None)
    for store in (RemoteStore(features()), MemoryStore(features())):
        for request, one in zip(requests, expected, strict=True):
            assert_same(await fetch(store, NEEDS, *request), one)
            assert_same(await fetch(store, NEEDS, *request, near=near), one)


async def test_pins_of_anothers_read_that_is_given_up_are_read_again_and_no_others():
    store, near = RemoteStore(features()), near_caches(NEEDS.pin_groups, 1 << 20, 60)
    given_up = asyncio.create_task(fetch(store, NEEDS, 3, ids(1, 2), near=near))
    waiting = asyncio.create_task(fetch(store, NEEDS, 3, ids(2, 5, 1, 6), near=near))
    await asyncio.sleep(0)  # both have asked, and none is answered
    given_up.cancel()
    found = await waiting
    assert_same(found, await fetch(MemoryStore(features()), NEEDS, 3, ids(2, 5, 1, 6)))
    user = [tiny.USERS.key(3), tiny.ACTIONS.key(3)]
    keys = tiny.PINS.keys
    assert store.asked == [[*user, *keys(ids(1, 2))], [*user, *keys(ids(5, 6))], keys(ids(2, 1))]


async def test_aged_rows_stand_in_for_lost_ones_of_candidates_and_of_actions():
    store, near = RemoteStore(features()), near_caches(NEEDS.pin_groups, 1 << 20, 0.0, outage_s=60.0)
    expected = await fetch(store, NEEDS, 1, ids(1, 8), near=near)
    store.lost = {tiny.PINS.key(8), tiny.PINS.key(3)}
    found = await fetch(store, NEEDS, 1, ids(1, 8), near=near)
    assert found.store_unavailable
    assert found.stale_rows == 3, "pin 8 is a candidate and in an action, pin 3 is in an action"
    assert found.pins["pin_core"].rows.tobytes() == expected.pins["pin_core"].rows.tobytes()
    assert found.missing() == expected.missing()
    store.lost = {tiny.USERS.key(1)}
    found = await fetch(store, NEEDS, 1, ids(1, 8), near=near)
    assert found.missing().user
    assert found.stale_rows == 0
    assert found.events.tobytes() == expected.events.tobytes()


async def test_a_user_that_is_lost_with_all_else_is_missing_and_nothing_more_is_asked():
    store = RemoteStore(features())
    store.failing = True
    found = await fetch(store, NEEDS, 1, ids(1, 8), near=near_caches(NEEDS.pin_groups, 1 << 20, 60))
    assert (found.missing().user, found.missing().candidates, found.store_failure is not None) == (True, 2, True)
    assert len(store.asked) == 1
