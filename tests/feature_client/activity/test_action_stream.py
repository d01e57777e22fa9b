"""The stream of actions: folded once whatever dies, trimmed, and what is no action set aside."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re

import pytest
from redis import RedisCluster

from bench.fuzz import fuzz_stream
from feature_client.activity.stream import StreamFollower
from feature_client.activity.stream_entries import ClaimedEntries, StreamEntry, read_claimed, read_entries
from feature_client.codec import decode_sequence, encode_sequence
from feature_client.stores.memory_store import MemoryStore
from feature_client.stores.open_store import open_store
from feature_client.stores.store import StoreUnavailableError
from tests import tiny
from tests.conftest import eventually
from tests.redis_servers import RedisServer

_streams = itertools.count()
FIRST_MS = 1_700_000_000_000


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
        "surface": tiny.ACTIONS.surfaces[0], "time_ms": FIRST_MS + number,
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


async def test_a_follower_gives_sequences_their_end_and_sets_aside_what_is_older(scene):
    _, stream, client, follower = scene
    day_s = 86_400
    now_ms = FIRST_MS + 40 * day_s * 1_000
    send(client, stream, 1, user_id=8)
    send(client, stream, 2, user_id=9, time_ms=now_ms)
    one = follower(now_ms=lambda: now_ms, lasts_s=30.0 * day_s)
    await follow_until(one, lambda: client.xlen(stream) == 0)
    assert (one.counts.added, one.counts.refused) == (1, 1)
    assert 0.99 * 30 * day_s < client.ttl(tiny.ACTIONS.key(9)) <= 30 * day_s
    ((_, refused),) = client.xrange(f"{stream}:refused")
    assert refused[b"reason"].endswith(
        b"is older than the 30 days for which sequences are kept; raise record_retention_days (of a follower: "
        b"--retention-days) to record older actions"
    )


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


async def test_what_another_follower_abandoned_is_taken_over(scene):
    store, stream, client, follower = scene
    for number in range(1, 6):
        send(client, stream, number, user_id=9)
    client.xgroup_create(stream, "fold", id="0")
    client.xreadgroup("fold", "gone", {stream: ">"}, count=3)
    two = follower("two", abandoned_ms=1)
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


async def test_entries_that_were_trimmed_while_they_were_owed_are_counted_and_the_rest_is_folded(scene):
    store, stream, client, follower = scene
    for number in range(1, 6):
        send(client, stream, number, user_id=9)
    client.xgroup_create(stream, "fold", id="0")
    client.xreadgroup("fold", "one", {stream: ">"}, count=4)  # read, and died
    client.xtrim(stream, maxlen=2, approximate=False)
    one = follower()
    await one.turn(block_ms=None)
    assert (one.counts.added, one.counts.lost) == (2, 3)
    assert await stored(store, 9) == [4, 5]
    assert client.xpending(stream, "fold")["pending"] == client.xlen(stream) == 0
    await one.close()


async def test_entries_that_were_trimmed_while_another_owed_them_are_taken_off_the_list(scene):
    store, stream, client, follower = scene
    for number in range(1, 6):
        send(client, stream, number, user_id=9)
    client.xgroup_create(stream, "fold", id="0")
    client.xreadgroup("fold", "gone", {stream: ">"}, count=4)
    client.xtrim(stream, maxlen=2, approximate=False)
    two = follower("two", abandoned_ms=0)
    await two.turn(block_ms=None)
    assert await stored(store, 9) == [4, 5]
    assert two.counts.lost == 3
    assert client.xpending(stream, "fold")["pending"] == 0
    await two.close()


async def test_abandoned_entries_behind_many_that_are_not_are_reached(scene):
    _, stream, client, follower = scene
    for number in range(1, 41):
        send(client, stream, number, user_id=9)
    client.xgroup_create(stream, "fold", id="0")
    client.xreadgroup("fold", "gone", {stream: ">"}, count=40)
    entries = [entry for entry, _ in client.xrange(stream)]
    # The first thirty are somebody's who is alive; a claim of two looks at ten times as many.
    client.xclaim(stream, "fold", "alive", 0, entries[:30], idle=0)
    client.xclaim(stream, "fold", "gone", 0, entries[30:], idle=60_000)
    one = follower(batch=2)
    await one.turn(block_ms=None)
    for _ in range(9):
        await one.claim_abandoned()
    assert one.counts.added == 10
    await one.close()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("time_ms", FIRST_MS * 1000, "time_ms: 1700000000000000 is not a Unix time.* it looks like microseconds"),
        ("time_ms", FIRST_MS // 1000, "time_ms: 1700000000 is not a Unix time.* it looks like seconds"),
        ("time_ms", "nan", "time_ms: 'nan' is not a whole number"),
        ("time_ms", f"{FIRST_MS}.0", "time_ms: '1700000000000.0' is not a whole number"),
        ("user_id", "-1", "user_id: '-1' is not a whole number"),
        ("user_id", "1_0", "user_id: '1_0' is not a whole number"),
        ("user_id", " 1", "user_id: ' 1' is not a whole number"),
        ("user_id", "", "user_id: '' is not a whole number"),
        ("pin_id", 2**64, "pin_id: '18446744073709551616' is not a whole number"),
        ("pin_id", "9" * 5000, r"pin_id: '9{40}'\.\.\. is not a whole number"),
        ("event_id", 0, "event_id: 0; give every action a unique id"),
        ("action", b"\xff\xfe", r"action: unknown action '\\\\xff\\\\xfe'; known: save, hide"),
        ("surface", "moon", "surface: unknown surface 'moon'; known: home, related"),
    ],
)
async def test_a_field_that_is_none_is_set_aside_with_its_name_and_what_it_seems_to_be(scene, field, value, reason):
    store, stream, client, follower = scene
    send(client, stream, 1, **{field: value})
    send(client, stream, 2, user_id=9)
    one = follower()
    await one.turn(block_ms=None)
    assert (one.counts.refused, one.counts.added) == (1, 1)
    ((_, fields),) = client.xrange(f"{stream}:refused")
    assert re.search(reason, fields[b"reason"].decode()), fields[b"reason"]
    assert await stored(store, 9) == [2]
    await one.close()


async def test_a_field_that_stands_twice_is_set_aside_as_it_came(scene):
    _, stream, client, follower = scene
    pairs = ["event_id", 1, "user_id", 9, "pin_id", 3, "action", "save", "surface", "home", "time_ms", FIRST_MS]
    client.execute_command("XADD", stream, "*", *pairs, "user_id", 10)
    client.execute_command("XADD", stream, "*", *pairs[2:], "reason", "the producer's own")
    one = follower()
    await one.turn(block_ms=None)
    assert one.counts.refused == 2
    client.set_response_callback("XRANGE", lambda reply, **_: reply)
    twice, lacking = (fields for _, fields in client.xrange(f"{stream}:refused"))
    assert twice.count(b"user_id") == 2
    assert twice[-1] == b"user_id: occurs 2 times"
    assert lacking[-4:] == [b"reason", b"the producer's own", b"reason", b"event_id: missing"]
    await one.close()


async def test_what_cannot_be_set_aside_keeps_nothing_waiting_and_is_set_aside_later(scene):
    store, stream, client, follower = scene
    client.set(f"{stream}:refused", "no stream")
    send(client, stream, 1, action="dance")
    send(client, stream, 2, user_id=9)
    one = follower(abandoned_ms=0)
    await one.turn(block_ms=None)
    assert await stored(store, 9) == [2]
    assert client.xpending(stream, "fold")["pending"] == 1
    client.delete(f"{stream}:refused")
    await one.turn(block_ms=None)
    assert client.xlen(f"{stream}:refused") == one.counts.refused == 1
    assert client.xpending(stream, "fold")["pending"] == 0
    await one.close()


async def test_a_destroyed_group_a_deleted_stream_and_a_key_of_another_type_are_followed_on(scene):
    store, stream, client, follower = scene
    one = follower()
    await one.turn(block_ms=None)
    client.xgroup_destroy(stream, "fold")
    send(client, stream, 1, user_id=9)
    await turn_until_well(one)
    client.delete(stream)
    send(client, stream, 2, user_id=9)
    await turn_until_well(one)
    client.delete(stream)
    client.set(stream, "no stream")
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="WRONGTYPE"):
            await one.turn(block_ms=None)
    client.delete(stream)
    send(client, stream, 3, user_id=9)
    await turn_until_well(one)
    assert await stored(store, 9) == [1, 2, 3]
    await one.close()


async def turn_until_well(follower):
    """One turn may meet the fault; the next begins anew."""
    with contextlib.suppress(StoreUnavailableError):
        await follower.turn(block_ms=None)
    await follower.turn(block_ms=None)


async def test_actions_in_the_future_that_were_stored_are_dropped_and_counted(scene):
    store, stream, client, follower = scene
    poison = tiny.events([1] * 8, [0] * 8)
    poison["time_ms"], poison["event_id"] = FIRST_MS * 1000, range(100, 108)
    await store.multi_put([(tiny.ACTIONS.key(9), encode_sequence(tiny.ACTIONS, poison))])
    send(client, stream, 1, user_id=9)
    one = follower()
    await one.turn(block_ms=None)
    assert await stored(store, 9) == [1]
    assert one.counts.future_dropped == 8
    await one.close()


async def test_an_unexpected_error_is_counted_and_followed_on(scene, monkeypatch):
    monkeypatch.setattr("feature_client.activity.stream._PAUSE_FIRST_S", 0.001)
    store, stream, client, follower = scene
    send(client, stream, 1, user_id=9)
    works, store.update = store.update, None
    one = follower()
    following = follow_until(one, lambda: client.xlen(stream) == 0)
    task = asyncio.create_task(following)
    await eventually(lambda: one.counts.interrupted > 1)
    store.update = works
    await task
    assert await stored(store, 9) == [1]


async def test_a_stream_in_a_cluster_is_followed(redis_cluster):
    url = f"redis+cluster://127.0.0.1:{redis_cluster[0].port}"
    store = MemoryStore()
    one = StreamFollower(url, "acts", "fold", "one", store, tiny.ACTIONS)
    fields = {
        "event_id": 1, "user_id": 9, "pin_id": 3, "action": "save", "surface": "home", "time_ms": FIRST_MS,
    }  # fmt: skip
    with RedisCluster(host="127.0.0.1", port=redis_cluster[0].port) as client:
        client.xadd("acts", fields)
        client.xadd("acts", fields | {"time_ms": 1})
        await one.turn(block_ms=None)
        assert client.xlen("acts") == 0
        assert client.xlen("acts:refused") == 1
    assert await stored(store, 9) == [1]
    await one.close()


def test_five_hundred_hostile_streams_store_what_a_slow_reader_says(redis_server):
    tally = fuzz_stream.StreamTally()
    fuzz_stream.fuzz(500, tally, redis_server)
    assert tally.cases >= 500
    reached = ("added", "repeated", "too_old", "refused", "lost", "future_dropped", "fault: group destroyed")
    assert min(tally.outcomes[what] for what in reached) > 10


def test_a_follower_that_stores_what_the_slow_reader_refuses_is_found_by_the_fuzz(redis_server, monkeypatch):
    monkeypatch.setattr(fuzz_stream, "_slow_action", lambda _: None)
    with pytest.raises(fuzz_stream.WrongStateError):
        fuzz_stream.fuzz(20, fuzz_stream.StreamTally(), redis_server)


def test_replies_of_every_version_are_read():
    fields, read = (
        [b"a", b"1", b"a", b"2"],
        (StreamEntry(b"1-1", ((b"a", b"1"), (b"a", b"2"))), StreamEntry(b"1-2", None)),
    )
    entries = [[b"1-1", fields], [b"1-2", None]]
    assert read_entries([[b"s", entries]]) == list(read)
    assert read_entries(None) == []
    assert read_claimed([b"0-0", [None, entries[0]]]) == ClaimedEntries(b"0-0", [read[0]], nameless=1, deleted=0)
    assert read_claimed([b"1-2", [entries[0]], [b"1-7", b"1-8"]]) == ClaimedEntries(
        b"1-2", [read[0]], nameless=0, deleted=2
    )
