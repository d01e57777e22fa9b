"""Folding actions into sequences: the same result in any order and however often, on every store."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_client.action_times import clock_ms, time_problem
from feature_client.activity import writer as activity
from feature_client.activity.writer import ActionOutcome, ActivityWriter, QueueFullError, write_events
from feature_client.bulk.write import write_sequences
from feature_client.codec import decode_sequence, encode_sequence
from feature_client.fetch import fetch
from feature_client.groups import FeatureNeeds, SequenceGroup
from feature_client.stores.memory_store import MemoryStore
from feature_client.stores.store import StoreUnavailableError
from tests import tiny
from tests.conftest import eventually

GROUP = SequenceGroup(name="acts", version=1, actions=("save", "hide"), surfaces=("home",), length_max=5)
NOW_MS = 1_790_000_000_000
HOUR_MS = 3_600_000


def events(*numbers_and_times):
    """Events by (event id, time); the pin is the id."""
    made = np.zeros(len(numbers_and_times), GROUP.dtype)
    for i, (number, time_ms) in enumerate(numbers_and_times):
        made[i]["pin_id"] = made[i]["event_id"] = number
        made[i]["time_ms"] = time_ms
    return made


def fold(group, users, new, before):
    """Fold as of now, and look at the values and outcomes only."""
    return activity.fold(group, users, new, before, NOW_MS)[:2]


def ids(value):
    return decode_sequence(GROUP, value)[0]["event_id"].tolist()


def zeros(count):
    return np.zeros(count, np.int64)


def test_events_are_ordered_by_time_whatever_order_they_come_in():
    (value,), outcome = fold(GROUP, zeros(3), events((1, 30), (2, 10), (3, 20)), [None])
    assert ids(value) == [2, 3, 1]
    assert outcome.tolist() == [ActionOutcome.ADDED] * 3
    (value,), _ = fold(GROUP, zeros(1), events((4, 15)), [value])
    assert ids(value) == [2, 4, 3, 1]


def test_an_id_counts_once_and_keeps_its_first_content():
    (value,), _ = fold(GROUP, zeros(1), events((1, 10)), [None])
    (after,), outcome = fold(GROUP, zeros(3), events((1, 99), (2, 20), (2, 5)), [value])
    assert outcome.tolist() == [ActionOutcome.REPEATED, ActionOutcome.ADDED, ActionOutcome.REPEATED]
    assert decode_sequence(GROUP, after)[0]["time_ms"].tolist() == [10, 20]
    (unchanged,), outcome = fold(GROUP, zeros(1), events((1, 10)), [after])
    assert unchanged is None
    assert outcome.tolist() == [ActionOutcome.REPEATED]


def test_a_full_sequence_keeps_the_newest_and_says_what_was_too_old():
    (value,), _ = fold(GROUP, zeros(5), events(*((i, 10 * i) for i in range(1, 6))), [None])
    (after,), outcome = fold(GROUP, zeros(2), events((8, 5), (9, 35)), [value])
    assert outcome.tolist() == [ActionOutcome.TOO_OLD, ActionOutcome.ADDED]
    assert ids(after) == [2, 3, 9, 4, 5]
    # 1 made place for 9: sent again, it is too old rather than new.
    assert fold(GROUP, zeros(1), events((1, 10)), [after])[1].tolist() == [ActionOutcome.TOO_OLD]


def test_users_do_not_mix_and_only_the_changed_are_written():
    stored = encode_sequence(GROUP, events((1, 10)))
    after, outcome = fold(GROUP, np.array([2, 0, 2]), events((1, 20), (1, 10), (7, 5)), [stored, stored, None])
    assert outcome.tolist() == [ActionOutcome.ADDED, ActionOutcome.REPEATED, ActionOutcome.ADDED]
    assert after[0] is None
    assert after[1] is None
    assert ids(after[2]) == [7, 1]


def test_a_stored_value_of_another_group_is_replaced_and_events_without_ids_are_kept():
    other = tiny.changed(GROUP, version=2)
    (after,), _ = fold(GROUP, zeros(1), events((1, 10)), [encode_sequence(other, events((5, 1)))])
    assert ids(after) == [1]
    imported = encode_sequence(GROUP, events((0, 1), (0, 2)))
    (after,), _ = fold(GROUP, zeros(1), events((1, 10)), [imported])
    assert ids(after) == [0, 0, 1]


_EVENTS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=30)


@given(_EVENTS, st.randoms(use_true_random=False))
def test_any_order_any_repetition_and_any_batches_give_the_same_sequence(wanted, rng):
    distinct = list({number: (number, time_ms) for number, time_ms in wanted}.values())
    (expected,), _ = fold(GROUP, zeros(len(distinct)), events(*distinct), [None])
    sent = distinct + [event for event in distinct if rng.random() < 0.5]
    rng.shuffle(sent)
    value = None
    while sent:
        batch = [sent.pop() for _ in range(min(len(sent), rng.randint(1, 4)))]
        value = fold(GROUP, zeros(len(batch)), events(*batch), [value])[0][0] or value
    assert value == expected


async def test_concurrent_writers_of_the_same_users_lose_nothing(any_store):
    users, rng = np.arange(20, dtype=np.uint64), random.Random(1)
    group = tiny.changed(GROUP, length_max=200)

    async def write(first):
        writer = ActivityWriter(any_store, group)
        batches = []
        for number in range(first, 400, 4):
            event = events((number + 1, rng.randint(1, 1000)))
            batches.append(writer.record(users[number % 20][None], event))
        return np.concatenate(await asyncio.gather(*batches))

    outcomes = np.concatenate(await asyncio.gather(*(write(first) for first in range(4))))
    assert outcomes.tolist() == [ActionOutcome.ADDED] * 400
    stored = await any_store.multi_get(group.keys(users))
    found = [decode_sequence(group, value)[0] for value in stored]
    assert [sorted(own["event_id"].tolist()) for own in found] == [list(range(u + 1, 401, 20)) for u in range(20)]
    assert all(np.all(np.diff(own["time_ms"]) >= 0) for own in found)


async def test_a_store_that_fails_fails_the_callers_and_the_next_batch_goes_through():
    store = MemoryStore()
    writer = ActivityWriter(store, GROUP)

    async def fail(keys, *rest):
        raise StoreUnavailableError("told to fail")

    works, store.update = store.update, fail
    with pytest.raises(StoreUnavailableError, match="told to fail"):
        await writer.record(np.array([1], np.uint64), events((1, 1)))
    store.update = works
    assert (await writer.record(np.array([1], np.uint64), events((1, 1)))).tolist() == [ActionOutcome.ADDED]


async def test_a_caller_that_hangs_up_leaves_the_others_their_answers():
    store, gate = MemoryStore(), asyncio.Event()
    works = store.update

    async def wait(keys, *rest):
        await gate.wait()
        await works(keys, *rest)

    store.update = wait
    writer = ActivityWriter(store, GROUP)
    calls = [asyncio.create_task(writer.record(np.array([i], np.uint64), events((1, 1)))) for i in range(3)]
    await asyncio.sleep(0)
    calls[1].cancel()
    gate.set()
    assert (await calls[0]).tolist() == (await calls[2]).tolist() == [ActionOutcome.ADDED]


async def test_more_than_a_writer_holds_is_refused():
    store, gate, asked = MemoryStore(), asyncio.Event(), []

    async def wait(keys, *rest):
        asked.append(keys)
        await gate.wait()

    store.update = wait
    writer = ActivityWriter(store, GROUP)
    many = events(*((i + 1, i) for i in range(9_000)))
    first = asyncio.create_task(writer.record(np.full(9_000, 1, np.uint64), many))
    await eventually(lambda: asked)
    second = asyncio.create_task(writer.record(np.full(9_000, 1, np.uint64), many))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="17936 actions are waiting"):
        await writer.record(np.full(9_000, 1, np.uint64), many)
    gate.set()
    await asyncio.gather(first, second)


async def test_who_sends_one_action_does_not_wait_for_all_of_who_sends_thousands():
    store, written = MemoryStore(), []
    works = store.update

    async def note(keys, *rest):
        await works(keys, *rest)
        written.append(len(keys))

    store.update = note
    writer = ActivityWriter(store, GROUP)
    users = np.arange(5_000, dtype=np.uint64)
    many = asyncio.create_task(writer.record(users, events(*((i + 1, i) for i in range(5_000)))))
    await eventually(lambda: written)
    before = sum(written)
    assert (await writer.record(np.array([9_999], np.uint64), events((1, 1)))).tolist() == [ActionOutcome.ADDED]
    assert sum(written) - before < 300
    assert not many.done()
    assert (await many).tolist() == [ActionOutcome.ADDED] * 5_000
    assert max(written) == 64


async def test_of_a_caller_that_hung_up_nothing_more_is_written():
    store, gate, written = MemoryStore(), asyncio.Event(), []

    async def note(keys, *rest):
        written.append(len(keys))
        await gate.wait()

    store.update = note
    writer = ActivityWriter(store, GROUP)
    users = np.arange(500, dtype=np.uint64)
    call = asyncio.create_task(writer.record(users, events(*((i + 1, i) for i in range(500)))))
    await eventually(lambda: written)
    call.cancel()
    gate.set()
    later = users[:1], events((9_999, 9_999))
    await writer.record(*later)
    assert written == [64, 1]

    gate.clear()
    busy = [asyncio.create_task(writer.record(*later))]
    await eventually(lambda: len(written) == 3)
    # As many as may wait: those of the caller that hung up do not wait any more.
    busy += [asyncio.create_task(writer.record(users[:1].repeat(n), later[1].repeat(n))) for n in (1, 19_999)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await writer.record(*later)
    assert not any(call.done() for call in busy)
    for call in busy:
        call.cancel()


async def test_a_fault_in_a_write_reaches_its_callers_and_the_next_are_served():
    store = MemoryStore()
    writer = ActivityWriter(store, GROUP)

    async def fail(keys, *rest):
        raise TypeError("told to fail")

    works, store.update = store.update, fail
    with pytest.raises(TypeError, match="told to fail"):
        await writer.record(np.arange(500, dtype=np.uint64), events(*((i + 1, i) for i in range(500))))
    store.update = works
    assert (await writer.record(np.array([1], np.uint64), events((1, 1)))).tolist() == [ActionOutcome.ADDED]


async def test_writing_events_tells_what_became_of_each():
    store = MemoryStore()
    users = np.array([7, 8, 7], np.uint64)
    written = await write_events(store, GROUP, users, events((1, 1), (1, 1), (1, 1)), NOW_MS)
    assert written.outcomes.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("time_ms", "says"),
    [
        (NOW_MS, None),
        (NOW_MS + 60_000, None),
        (631_152_000_000, None),
        (NOW_MS + 60_001, "and now"),
        (631_151_999_999, "between 1990"),
        (NOW_MS // 1000, "it looks like seconds"),
        (NOW_MS * 1000, "it looks like microseconds"),
        (NOW_MS * 1_000_000, "it looks like nanoseconds"),
        (0, "between 1990"),
        (-1, "between 1990"),
        (2**63, "not a Unix time in milliseconds"),
    ],
)
def test_a_time_is_from_1990_to_a_minute_ahead_and_the_unit_that_was_meant_is_named(time_ms, says):
    problem = time_problem(time_ms, NOW_MS)
    assert (problem is None) == (says is None)
    assert says is None or says in problem


async def test_a_sequence_full_of_actions_in_the_future_heals_with_the_next_action():
    poison = events(*((i, NOW_MS * 1000 + i) for i in range(1, 6)))
    healthy = encode_sequence(GROUP, events((1, 10)))
    store = MemoryStore({GROUP.key(7): encode_sequence(GROUP, poison), GROUP.key(8): healthy})
    dropped = []
    writer = ActivityWriter(store, GROUP, dropped.append)
    outcomes = await writer.record(np.array([7, 8], np.uint64), events((3, NOW_MS), (2, 20)))
    assert outcomes.tolist() == [ActionOutcome.ADDED] * 2
    assert (ids(store.values[GROUP.key(7)]), ids(store.values[GROUP.key(8)]), dropped) == ([3], [1, 2], [5])


def test_a_repeated_action_heals_a_sequence_too_and_what_is_less_than_an_hour_ahead_stays():
    mixed = encode_sequence(GROUP, events((1, 10), (2, NOW_MS + HOUR_MS), (3, NOW_MS + HOUR_MS + 1)))
    (after,), outcome, dropped = activity.fold(GROUP, zeros(1), events((1, 10)), [mixed], NOW_MS)
    assert (ids(after), outcome.tolist(), dropped.tolist()) == ([1, 2], [ActionOutcome.REPEATED], [1])


async def test_a_reader_leaves_out_actions_in_the_future_and_counts_the_value():
    now_ms = clock_ms()
    stored = events((1, now_ms - 5), (2, now_ms * 1000))
    store = MemoryStore({GROUP.key(1): encode_sequence(GROUP, stored)})
    fetched = await fetch(store, FeatureNeeds((), (), GROUP, 5), 1, np.array([], np.uint64))
    assert fetched.events["event_id"].tolist() == [1]
    assert (fetched.future_events, fetched.missing().foreign) == (1, 1)


async def test_whole_sequences_with_actions_in_the_future_are_refused_with_the_user():
    store, users = MemoryStore(), np.array([5, 6], np.uint64)
    sent = events((1, 10), (2, 20), (3, clock_ms() * 1000))
    with pytest.raises(ValueError, match="1 events are in the future; the first is of user 6"):
        await write_sequences(store, GROUP, users, sent, np.array([0, 2, 3]))
    assert not store.values
