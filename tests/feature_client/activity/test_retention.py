"""How long recorded sequences are kept: by Redis itself, and by a sweep in the other stores."""

from __future__ import annotations

import asyncio
import fcntl
import os

import numpy as np
import pytest

from feature_client.action_times import clock_ms, time_problem
from feature_client.activity.retention import Sweeper, is_over
from feature_client.activity.writer import write_events
from feature_client.bulk.load import stat
from feature_client.bulk.write import write_rows, write_sequences
from feature_client.codec import encode_sequence
from feature_client.stores.store import SweptStore
from tests import tiny

GROUP = tiny.ACTIONS
DAY_S = 86_400
LASTS_S = 90 * DAY_S
SWEPT, EXPIRING = ["memory", "lmdb"], ["redis", "cluster"]


def events(count, first=1, age_s=0.0):
    found = tiny.events(list(range(1, count + 1)), [0] * count)
    found["event_id"] = range(first, first + count)
    found["time_ms"] = clock_ms() - age_s * 1e3
    return found


async def record(store, user, first=1, age_s=0.0, lasts_s=LASTS_S):
    await write_events(store, GROUP, np.array([user], np.uint64), events(1, first, age_s), clock_ms(), lasts_s=lasts_s)


async def load(store, users):
    """Load sequences in bulk: their actions are years old, and have no ids."""
    loaded = tiny.events([1, 2] * len(users), [0, 1] * len(users))
    await write_sequences(store, GROUP, np.array(users, np.uint64), loaded, np.arange(len(users) + 1) * 2)


async def kept(store, users):
    values = await store.multi_get([GROUP.key(user) for user in users])
    return [user for user, value in zip(users, values, strict=True) if value is not None]


def sweeper(store, step=3, lasts_s=LASTS_S):
    return Sweeper(store, lambda: [GROUP], lasts_s, step=step, pause_s=0.0)


def ttl_ms(request, user):
    """Ask the real server for the rest of a sequence's time; -1 is for ever."""
    if "redis" in request.node.callspec.params.values():
        return request.getfixturevalue("redis_server").client().pttl(GROUP.key(user))
    found = []
    for server in request.getfixturevalue("redis_cluster"):
        keys = server.client().keys()
        found += [server.client().pttl(key) for key in keys if key == GROUP.key(user)]
    (one,) = found
    return one


@pytest.mark.parametrize("any_store", EXPIRING, indirect=True)
async def test_redis_ends_a_sequence_after_its_last_recorded_action(any_store, request):
    await load(any_store, [1, 2])
    assert ttl_ms(request, 1) == -1
    await record(any_store, 1)
    await record(any_store, 3)
    for user in (1, 3):
        assert 0.99 * LASTS_S * 1e3 < ttl_ms(request, user) <= LASTS_S * 1e3
    assert ttl_ms(request, 2) == -1
    await record(any_store, 1, first=2, lasts_s=DAY_S)
    assert ttl_ms(request, 1) <= DAY_S * 1e3
    await record(any_store, 1, first=2, lasts_s=LASTS_S)  # sent again: nothing new, so nothing is longer
    assert ttl_ms(request, 1) <= DAY_S * 1e3
    await record(any_store, 1, first=3, lasts_s=None)
    assert ttl_ms(request, 1) == -1
    await record(any_store, 3, first=2)
    await load(any_store, [3])
    assert ttl_ms(request, 3) == -1, "what is loaded in bulk stays"


@pytest.mark.parametrize("any_store", EXPIRING, indirect=True)
async def test_a_sequence_without_new_actions_is_gone_when_its_time_is_over(any_store):
    await record(any_store, 1, lasts_s=0.05)
    async with asyncio.timeout(10):
        while await kept(any_store, [1]):  # noqa: ASYNC110 - the server's clock
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("any_store", ["redis"], indirect=True)
async def test_the_end_is_set_by_the_command_that_writes(any_store, redis_server):
    client = redis_server.client()
    client.config_resetstat()
    for number in range(1, 11):
        await record(any_store, number)
    calls = {name: told["calls"] for name, told in client.info("commandstats").items()}
    assert calls["cmdstat_eval"] == calls["cmdstat_set"] == 10
    assert not {"cmdstat_expire", "cmdstat_pexpire"} & calls.keys()


@pytest.mark.parametrize("any_store", EXPIRING, indirect=True)
async def test_redis_needs_no_sweep(any_store):
    assert not isinstance(any_store, SweptStore)


@pytest.mark.parametrize("any_store", SWEPT, indirect=True)
async def test_a_sweep_deletes_recorded_sequences_whose_newest_action_is_too_old(any_store):
    await write_rows(any_store, tiny.PINS, np.arange(1, 30, dtype=np.uint64), tiny.pin_rows(np.arange(1, 30)))
    await write_rows(any_store, tiny.USERS, np.arange(1, 30, dtype=np.uint64), tiny.user_rows(np.arange(1, 30)))
    await load(any_store, [1, 2])
    await record(any_store, 2)  # loaded, and then recorded
    for user in range(3, 20):
        await record(any_store, user, age_s=(user % 2) * 91 * DAY_S)
    await record(any_store, 3, first=2)  # old, and then acted again
    other = tiny.changed(GROUP, version=GROUP.version + 1)
    await any_store.multi_put([(other.key(1), encode_sequence(other, events(2, age_s=91 * DAY_S)))])
    others = await any_store.count() - 19
    sweep = sweeper(any_store)
    await sweep.sweep(GROUP)
    assert await kept(any_store, range(1, 20)) == [1, 2, 3, *range(4, 20, 2)]
    assert (sweep.read, sweep.deleted) == (19, 8)
    assert await any_store.count() == others + 11
    await sweep.sweep(GROUP)
    assert (sweep.read, sweep.deleted) == (19 + 11, 8)


@pytest.mark.parametrize("any_store", SWEPT, indirect=True)
async def test_a_user_who_was_loaded_and_recorded_ends_as_others_do(any_store):
    await load(any_store, [1, 2])
    await record(any_store, 1)
    await sweeper(any_store, lasts_s=-1.0).sweep(GROUP)  # a second from now on
    assert await kept(any_store, [1, 2]) == [2]


@pytest.mark.parametrize("any_store", SWEPT, indirect=True)
async def test_a_sweep_that_was_cut_off_goes_on_where_it_was(any_store, monkeypatch):
    monkeypatch.setattr("feature_client.activity.retention._NOTE_STEPS", 1)
    for user in range(1, 21):
        await record(any_store, user, age_s=91 * DAY_S)
    steps, works = [], any_store.sweep

    async def cut_off(*step):
        if len(steps) == 3:
            raise asyncio.CancelledError
        steps.append(await works(*step))
        return steps[-1]

    any_store.sweep = cut_off
    with pytest.raises(asyncio.CancelledError):
        await sweeper(any_store).sweep(GROUP)
    any_store.sweep = works
    assert await kept(any_store, range(1, 21)) == list(range(10, 21))
    for user in range(1, 4):  # behind the place where the next one goes on
        await record(any_store, user, age_s=91 * DAY_S)
    again = sweeper(any_store)
    await again.sweep(GROUP)
    assert await kept(any_store, range(1, 21)) == [1, 2, 3]
    await again.sweep(GROUP)
    assert await kept(any_store, range(1, 21)) == []
    assert set(await stat(any_store, lambda _: None)) <= {GROUP.ref, "other"}


@pytest.mark.parametrize("any_store", ["lmdb"], indirect=True)
async def test_an_action_that_comes_while_a_sweep_looks_keeps_its_user(any_store):
    await record(any_store, 1, age_s=91 * DAY_S)
    looked = []

    def over(value):
        looked.append(bytes(value))
        # Between the look and the deletion, the user acts.
        return len(looked) == 1 or is_over(GROUP, value, clock_ms() - round(LASTS_S * 1e3))

    works = any_store._in_thread

    async def act_between(what, work):
        found = await works(what, work)
        if what == "read":
            any_store._in_thread = works
            await record(any_store, 1, first=2)
        return found

    any_store._in_thread = act_between
    swept = await any_store.sweep(GROUP.key_prefix, GROUP.key_prefix, 10, over)
    assert (swept.read, swept.deleted, len(looked)) == (1, 0, 2)
    assert await kept(any_store, [1]) == [1]


@pytest.mark.parametrize("any_store", ["lmdb"], indirect=True)
async def test_one_process_sweeps_a_store(any_store, tmp_path):
    await record(any_store, 1, age_s=91 * DAY_S)
    descriptor = os.open(tmp_path / "store" / "sweep.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    await sweeper(any_store).sweep(GROUP)
    assert await kept(any_store, [1]) == [1]
    os.close(descriptor)
    await sweeper(any_store).sweep(GROUP)
    assert await kept(any_store, [1]) == []


@pytest.mark.parametrize(
    ("value", "over"),
    [
        (encode_sequence(GROUP, events(3, age_s=2 * DAY_S)), True),
        (encode_sequence(GROUP, events(3)), False),
        (encode_sequence(GROUP, tiny.events([1], [0])), False),
        (encode_sequence(GROUP, events(0)), False),
        (encode_sequence(tiny.changed(GROUP, version=99), events(3, age_s=2 * DAY_S)), False),
        (encode_sequence(GROUP, events(3, age_s=2 * DAY_S))[:-1], False),
        (b"", False),
        (b"x", False),
    ],
    ids=["old", "new", "loaded", "empty", "foreign", "truncated", "nothing", "a byte"],
)
def test_only_recorded_sequences_of_the_group_are_over(value, over):
    assert is_over(GROUP, value, clock_ms() - DAY_S * 1_000) is over
    assert is_over(GROUP, memoryview(value), clock_ms() - DAY_S * 1_000) is over


def test_an_action_older_than_the_retention_is_refused_and_the_reason_names_the_setting():
    now_ms = clock_ms()
    assert time_problem(now_ms - LASTS_S * 1_000, now_ms, LASTS_S) is None
    problem = time_problem(now_ms - LASTS_S * 1_000 - 1, now_ms, LASTS_S)
    assert problem is not None
    assert problem.endswith(
        "is older than the 90 days for which sequences are kept; raise record_retention_days (of a follower: "
        "--retention-days) to record older actions"
    )
    assert time_problem(631_152_000_000, now_ms) is None
    assert "looks like seconds" in (time_problem(now_ms // 1_000, now_ms, LASTS_S) or "")
