"""What a store takes in a short time: rates of new users and of a user's actions, on every store."""

from __future__ import annotations

import numpy as np
import pytest

from feature_client.activity.limits import BURST_S, WriteLimits
from feature_client.activity.writer import ActionOutcome, write_events
from feature_client.codec import decode_sequence
from feature_client.groups import SequenceGroup
from feature_client.stores.memory_store import MemoryStore

GROUP = SequenceGroup(name="acts", version=1, actions=("save", "hide"), surfaces=("home",), length_max=50)
NOW_MS = 1_790_000_000_000
ADDED, REPEATED, TOO_OLD, NEW_USER, TOO_MANY = ActionOutcome


def acted(*numbers, time_ms=NOW_MS):
    """Events with these ids."""
    made = np.zeros(len(numbers), GROUP.dtype)
    made["event_id"] = made["pin_id"] = numbers
    made["time_ms"] = time_ms
    return made


async def write(store, users, events, limits, now_ms=NOW_MS):
    return (await write_events(store, GROUP, np.array(users, np.uint64), events, now_ms, limits=limits)).outcomes


async def stored(store, user):
    (value,) = await store.multi_get([GROUP.key(user)])
    return decode_sequence(GROUP, value)[0]["event_id"].tolist()


async def test_new_users_beyond_the_rate_are_refused_and_known_ones_are_stored(any_store):
    await write(any_store, [1, 2, 3], acted(1, 2, 3), None)
    limits = WriteLimits(new_users_per_s=0.2)  # two at once
    outcomes = await write(any_store, [10, 1, 11, 2, 12, 10], acted(1, 4, 1, 5, 1, 2), limits)
    assert outcomes.tolist() == [ADDED, ADDED, ADDED, ADDED, NEW_USER, ADDED]
    assert [await stored(any_store, user) for user in (1, 2, 10, 11, 12)] == [[1, 4], [2, 5], [1, 2], [1], []]
    assert (await write(any_store, [12, 11], acted(1, 2), limits)).tolist() == [NEW_USER, ADDED]
    assert (await write(any_store, [12], acted(1), limits, NOW_MS + 5_000)).tolist() == [ADDED]


async def test_a_full_store_admits_no_new_user(any_store):
    limits = WriteLimits()
    await write(any_store, [1], acted(1), limits)
    limits.full = True
    assert (await write(any_store, [1, 2], acted(2, 1), limits)).tolist() == [ADDED, NEW_USER]


async def test_a_users_actions_beyond_the_rate_are_refused_whatever_their_times(any_store):
    limits = WriteLimits(user_actions_per_s=2.0)
    numbers = range(1, 111)
    spread = NOW_MS - np.arange(110) * 3_600_000
    hides = acted(*numbers, time_ms=spread)
    outcomes = await write(any_store, [7] * 110, hides, limits)
    assert np.flatnonzero(outcomes == ADDED).tolist() == list(range(20))
    assert (outcomes[20:50] == TOO_MANY).all()
    assert sorted(await stored(any_store, 7)) == list(range(1, 21))
    assert (await write(any_store, [8], acted(1), limits)).tolist() == [ADDED]
    later = await write(any_store, [7] * 110, hides, limits, NOW_MS + 2_000)
    assert (later[:20] == REPEATED).all()
    assert np.count_nonzero(later == ADDED) == 4


async def test_repeated_actions_take_nothing_of_the_rate(any_store):
    limits = WriteLimits(user_actions_per_s=1.0)
    events = acted(*range(1, 9))
    assert (await write(any_store, [7] * 8, events, limits)).tolist() == [ADDED] * 8
    for _ in range(5):
        assert (await write(any_store, [7] * 8, events, limits)).tolist() == [REPEATED] * 8
    assert (await write(any_store, [7] * 3, acted(20, 21, 22), limits)).tolist() == [ADDED, ADDED, TOO_MANY]


async def test_an_action_that_repeats_a_refused_one_is_refused_and_not_told_to_be_stored():
    store, limits = MemoryStore(), WriteLimits(user_actions_per_s=0.1)
    outcomes = await write(store, [7, 7, 7, 7], acted(1, 2, 2, 1), limits)
    assert outcomes.tolist() == [ADDED, TOO_MANY, TOO_MANY, REPEATED]
    assert await stored(store, 7) == [1]


@pytest.mark.parametrize("any_store", ["redis"], indirect=True)
async def test_a_write_that_another_writer_interrupts_takes_nothing_twice(any_store):
    limits = WriteLimits(new_users_per_s=0.1, user_actions_per_s=0.5)
    read, interruptions = any_store.multi_get, iter(range(1, 4))

    async def interrupted(keys, *rest):
        values = await read(keys, *rest)
        if number := next(interruptions, None):  # another writer stores an action between this read and the write
            await write_events(any_store, GROUP, np.array([1], np.uint64), acted(900 + number), NOW_MS)
        return values

    any_store.multi_get = interrupted
    outcomes = await write(any_store, [1] * 6, acted(*range(1, 7)), limits)
    any_store.multi_get = read
    assert outcomes.tolist() == [ADDED] * 5 + [TOO_MANY]
    assert sorted(await stored(any_store, 1)) == [1, 2, 3, 4, 5, 901, 902, 903]
    assert BURST_S * 0.5 == 5
