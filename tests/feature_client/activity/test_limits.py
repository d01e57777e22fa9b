"""What is stored in a short time: rates of new users and of a user's actions, on every store."""

from __future__ import annotations

import numpy as np
import pytest

from feature_client.activity.limits import BURST_S, KeyedRates, TokenBucket, WriteLimits
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


def test_a_bucket_admits_its_burst_and_then_its_rate():
    bucket = TokenBucket(3.0)
    assert bucket.take(100, 1_000.0) == 30
    assert bucket.take(1, 1_000.0) == 0
    assert bucket.take(100, 1_001.0) == 3
    assert bucket.take(2, 1_002.0) == 2
    assert bucket.take(100, 2_000.0) == 30


def test_a_bucket_of_a_slow_rate_admits_one_at_once():
    bucket = TokenBucket(0.01)
    assert [bucket.take(1, now_s) for now_s in (0.0, 50.0, 101.0, 202.0)] == [1, 0, 1, 1]


def test_a_clock_that_steps_back_takes_no_tokens_and_gives_none():
    bucket, rates = TokenBucket(1.0), KeyedRates(1.0)
    keys, one = np.array([7], np.uint64), np.ones(1, np.int64)
    for now_s in (1_000.0, 900.0, 900.0):
        assert bucket.take(1, now_s) == 1
        assert rates.take(keys, one, now_s).tolist() == [1]
    assert bucket.take(100, 900.0) == 7
    assert rates.take(keys, 100 * one, 900.0).tolist() == [7]


def test_each_key_has_a_rate_of_its_own():
    rates = KeyedRates(2.0)
    keys = np.arange(100, dtype=np.uint64)
    # Of 100 keys, two share a place with a probability of 7%: at most a few are limited together.
    assert rates.take(keys, np.full(100, 20), 1_000.0).sum() == 2_000
    assert rates.take(keys, np.full(100, 20), 1_000.0).sum() == 0
    assert rates.take(keys, np.full(100, 20), 1_003.0).sum() >= 6 * 98


def test_who_shares_a_place_is_secret():
    """A caller that tries ids cannot know which exhaust the rate of another: the places depend on random numbers."""
    keys = np.arange(1_000, dtype=np.uint64)
    places = [KeyedRates(1.0)._places(keys) for _ in range(2)]
    assert (places[0] != places[1]).mean() > 0.99
    assert len(np.unique(places[0])) > 980


def test_a_rate_of_0_admits_everything():
    keys, many = np.array([7], np.uint64), np.array([10_000])
    assert TokenBucket(0.0).take(10_000, 0.0) == 10_000
    assert KeyedRates(0.0).take(keys, many, 0.0).tolist() == [10_000]


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
