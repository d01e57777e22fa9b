"""The stream of actions: folded once whatever dies, trimmed, and what is no action set aside."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from feature_client.action_stream import StreamFollower
from feature_client.codec import decode_sequence
from feature_client.opening import open_store
from tests import tiny
from tests.redis_servers import RedisServer

_streams = itertools.count()


@pytest.fixture
async def scene(redis_server):
    """An empty store, a stream's name, and a way to make followers of it."""
    redis_server.client().flushall()
    store = open_store(redis_server.url)
    await store.start()
    stream = f"actions:{next(_streams)}"

    def follower(name="one", group=tiny.ACTIONS, **changes):
        return StreamFollower(redis_server.url, stream, "fold", name, store, group, **changes)

    yield store, stream, redis_server.client(), follower
    await store.close()


def send(client, stream, number, **changes):
    fields = {
        "event_id": number, "user_id": 1 + number % 3, "pin_id": number, "action": tiny.ACTIONS.actions[0],
        "surface": tiny.ACTIONS.surfaces[0], "time_ms": 1000 + number,
    }  # fmt: skip
    client.xadd(stream, fields | changes)


async def stored(store, user):
    (value,) = await store.multi_get([tiny.ACTIONS.key(user)])
    return decode_sequence(tiny.ACTIONS, value)[0]["event_id"].tolist()


async def follow_until(follower, condition):
    stop = asyncio.Event()
    following = asyncio.create_task(follower.follow(stop))
    async with asyncio.timeout(20):
        while not condition() and not following.done():  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(0.01)
    stop.set()
    await following


async def test_entries_are_folded_acknowledged_and_trimmed(scene):
    store, stream, client, follower = scene
    for number in range(1, 31):
        send(client, stream, number)
    one = follower(batch=7)
    await follow_until(one, lambda: client.xlen(stream) == 0)
    assert one.counts.added == 30
    assert await stored(store, 1) == list(range(3, 31, 3))[-tiny.ACTIONS.length_max :]
    assert client.xpending(stream, "fold")["pending"] == 0


async def test_an_entry_sent_twice_counts_once(scene):
    store, stream, client, follower = scene
    for number in (1, 1, 4, 1):
        send(client, stream, number, user_id=9)
    one = follower()
    await follow_until(one, lambda: client.xlen(stream) == 0)
    assert (one.counts.added, one.counts.repeated) == (2, 2)
    assert await stored(store, 9) == [1, 4]


async def test_what_a_dead_follower_read_is_folded_by_its_successor(scene):
    store, stream, client, follower = scene
    for number in range(1, 6):
        send(client, stream, number, user_id=9)
    client.xgroup_create(stream, "fold", id="0")
    client.xreadgroup("fold", "one", {stream: ">"}, count=3)  # read, and died
    one = follower()
    await follow_until(one, lambda: client.xlen(stream) == 0)
    assert await stored(store, 9) == [1, 2, 3, 4, 5]


async def test_what_another_follower_abandoned_is_taken_over(scene, monkeypatch):
    monkeypatch.setattr("feature_client.action_stream._ABANDONED_MS", 1)
    store, stream, client, follower = scene
    for number in range(1, 6):
        send(client, stream, number, user_id=9)
    client.xgroup_create(stream, "fold", id="0")
    client.xreadgroup("fold", "gone", {stream: ">"}, count=3)
    two = follower("two")
    await follow_until(two, lambda: client.xlen(stream) == 0)
    assert await stored(store, 9) == [1, 2, 3, 4, 5]


async def test_what_is_no_action_is_set_aside_with_the_reason(scene):
    store, stream, client, follower = scene
    send(client, stream, 1, action="dance")
    send(client, stream, 2, user_id="me")
    send(client, stream, 3, event_id=0)
    send(client, stream, 4, user_id=9)
    client.xadd(stream, {"hello": "world"})
    one = follower()
    await follow_until(one, lambda: client.xlen(stream) == 0)
    assert one.counts.refused == 4
    assert await stored(store, 9) == [4]
    assert client.xlen(f"{stream}:refused") == 4
    assert b"dance" in client.xrange(f"{stream}:refused")[0][1][b"reason"]


async def test_another_groups_entries_are_not_trimmed_before_it_read_them(scene):
    _, stream, client, follower = scene
    client.xgroup_create(stream, "audit", id="0", mkstream=True)
    for number in range(1, 11):
        send(client, stream, number)
    client.xreadgroup("audit", "a", {stream: ">"}, count=4)
    one = follower()
    await follow_until(one, lambda: one.counts.added == 10 and client.xpending(stream, "fold")["pending"] == 0)
    assert client.xlen(stream) == 10, "the audit group has not acknowledged its first"
    client.xack(stream, "audit", *(entry for entry, _ in client.xrange(stream, count=4)))
    send(client, stream, 11)
    await follow_until(follower(), lambda: client.xlen(stream) == 7)


async def test_a_restarted_redis_is_followed_on(tmp_path):
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    server.start()
    try:
        store = open_store(server.url)
        await store.start()
        one = StreamFollower(server.url, "s", "fold", "one", store, tiny.ACTIONS)
        stop = asyncio.Event()
        following = asyncio.create_task(one.follow(stop))
        for number in range(1, 4):
            send(server.client(), "s", number, user_id=9)
        async with asyncio.timeout(20):
            while one.counts.added < 3:  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.01)
        server.kill()
        server.start()
        for number in range(3, 6):
            send(server.client(), "s", number, user_id=9)
        async with asyncio.timeout(20):
            while one.counts.added < 5:  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.01)
        stop.set()
        await following
        assert await stored(store, 9) == [1, 2, 3, 4, 5]
        await store.close()
    finally:
        server.kill()
