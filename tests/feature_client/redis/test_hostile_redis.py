"""A Redis that answers nonsense is a Redis that is away: no caller is failed, stalled, or given another one's bytes."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from structlog.testing import capture_logs

from feature_client.action_times import clock_ms
from feature_client.activity.stream import StreamFollower
from feature_client.activity.writer import write_events
from feature_client.fetch import fetch
from feature_client.stores.open_store import open_store
from feature_client.stores.store import StoreUnavailableError
from tests import tiny
from tests.conftest import eventually
from tests.scripted_redis import ScriptedRedis, array, bulk

PINS = np.arange(1, 9, dtype=np.uint64)
PASSWORD = "S3cretOfTheStore"

READS = {
    "an array of two billion": b"*2147483647\r\n",
    "arrays that sum up to many": b"*1000000\r\n*1000000\r\n",
    "arrays in arrays without end": b"*1\r\n" * 10_000,
    "a value of two gigabytes": b"$2147483647\r\nabc",
    "a length below nothing": b"$-7\r\n",
    "a length that is no number": b"$1x\r\n\r\n",
    "too few values": array(b"$-1\r\n"),
    "too many values": array(*[b"$-1\r\n"] * 50),
    "a number": b":7\r\n",
    "a status": b"+OK\r\n",
    "one value": bulk(b"abc"),
    "nil": b"*-1\r\n",
    "numbers for values": array(*[b":1\r\n"] * 8),
    "arrays for values": array(*[array(b":1\r\n")] * 8),
    "a value longer than it claims": array(*[b"$3\r\nabcd\r\n"] * 8),
    "the page of another protocol": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "bytes": bytes(range(256)),
    "nothing but newlines": b"\r\n" * 100,
    "a map of the next protocol": b"%1\r\n+a\r\n+b\r\n",
    "a line without end": b"+" + b"a" * 100_000,
    "a redirect to nowhere": b"-MOVED everywhere\r\n",
}


@pytest.fixture
async def hostile():
    async with ScriptedRedis() as server:
        yield server


@pytest.fixture
async def store(hostile):
    """A store that has used its connection once."""
    opened = open_store(hostile.url.replace("redis://", f"redis://:{PASSWORD}@"))
    await opened.start()
    yield opened
    await opened.close()


async def read(store, budget_s=0.5):
    return await fetch(store, tiny.manifest().needs, 1, PINS, budget_s=budget_s)


def node(store):
    (only,) = store.nodes.values()
    return only


def answering(name: bytes, answer: bytes):
    return lambda command: answer if command[0] == name else None


@pytest.mark.parametrize("answer", READS.values(), ids=READS)
async def test_nonsense_in_place_of_values_degrades_the_request_and_opens_the_circuit(hostile, store, answer):
    hostile.answer = answering(b"MGET", answer)
    await asyncio.gather(*(read(store, 0.05) for _ in range(4)))
    fetched = await read(store, 0.05)
    assert fetched.store_unavailable
    assert fetched.missing().candidates == len(PINS)
    assert node(store).breaker.open
    assert PASSWORD not in fetched.store_failure
    hostile.answer = lambda _: None
    async with asyncio.timeout(10):
        while (await read(store)).store_unavailable:  # noqa: ASYNC110 - the circuit closes by itself
            await asyncio.sleep(0.01)


async def test_nonsense_is_counted_and_logged_once_without_what_was_sent(hostile, store):
    hostile.answer = answering(
        b"MGET", b"-ERR unknown command, with args beginning with: " + PASSWORD.encode() + b"\r\n"
    )
    with capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(StoreUnavailableError) as told:
                await store.multi_get([b"a"])
            assert PASSWORD not in str(told.value)
        hostile.answer = answering(b"MGET", b"*1\r\n$9\r\n" + PASSWORD.encode() + b"\r\n")
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="sent a malformed reply: a value whose length is not"):
                await store.multi_get([b"a"])
    assert node(store).counts.malformed == 2
    assert [line["event"] for line in logs] == ["redis_reply_malformed"]
    assert PASSWORD not in str(logs)


@pytest.mark.parametrize(
    "refused", [b"-ERR " + PASSWORD.encode(), b"-WRONGPASS " + PASSWORD.encode(), b"+" + PASSWORD.encode()]
)
async def test_a_password_that_a_server_sends_back_is_not_told(hostile, refused):
    hostile.answer = answering(b"AUTH", refused + b"\r\n")
    opened = open_store(hostile.url.replace("redis://", f"redis://:{PASSWORD}@"))
    with capture_logs() as logs:
        try:
            await opened.start()
        except Exception as error:
            logs.append({"raised": str(error)})
        fetched = await read(opened)
    await opened.close()
    assert logs
    assert fetched.store_unavailable
    assert PASSWORD not in f"{logs} {fetched.store_failure}"


async def test_a_refused_handshake_says_why_and_does_not_wait_for_its_time_limit(hostile):
    hostile.answer = answering(b"SELECT", b"-ERR DB index is out of range\r\n")
    opened = open_store(hostile.url.removesuffix("/0") + "/7")
    await opened.start()
    with pytest.raises(StoreUnavailableError, match="failed: DB index is out of range"):
        await opened.multi_get([b"a"], timeout_s=60.0)
    await opened.close()


def for_user(user: int) -> bytes:
    return b"this is of user %d" % user


async def read_users(store, users, timeout_s=0.5):
    """What each got, None for a failure; values that are another's fail the test."""
    found = []
    for user in users:
        try:
            (value,) = await store.multi_get([b"user:%d" % user], timeout_s)
        except StoreUnavailableError:
            found.append(None)
        else:
            assert value == for_user(user)
            found.append(value)
    return found


def own_value(command):
    return array(bulk(for_user(int(command[1].rpartition(b":")[2]))))


EXTRA = {
    "one reply too many": lambda command: own_value(command) * 2,
    "another's reply first": lambda command: array(bulk(for_user(0))) + own_value(command),
    "another's reply and its end first": lambda command: array(bulk(for_user(0))) + bulk(b"1f") + own_value(command),
    "no reply at all": lambda _: b"",
    "a status too many": lambda command: own_value(command) + b"+OK\r\n",
    "half a reply too many": lambda command: own_value(command) + b"*1\r\n$20\r\nthis",
}


@pytest.mark.parametrize("answer", EXTRA.values(), ids=EXTRA)
async def test_a_connection_out_of_step_gives_nobody_what_another_asked_for(hostile, store, answer):
    """By design of a fault that many had: one reply too many, and each caller gets the one before him."""
    turn = iter(range(1, 1000))
    hostile.answer = lambda c: (answer(c) if next(turn) % 3 == 0 else own_value(c)) if c[0] == b"MGET" else None
    found = await read_users(store, range(1, 40))
    assert None in found
    assert any(found), "connections in step give what was asked for"


async def test_replies_that_come_late_and_in_a_burst_are_nobodys(hostile, store):
    """The reply that a caller no longer waits for is there when the next one asks."""
    late: list[bytes] = []

    def answer(command):
        if command[0] != b"MGET":
            return None
        late.append(own_value(command))
        return b"" if len(late) % 2 else b"".join(late)

    hostile.answer = answer
    assert None in await read_users(store, range(1, 20))


async def test_callers_that_hang_up_at_any_moment_leave_nothing_for_the_next(hostile, store):
    hostile.pause_s = 0.0
    hostile.answer = lambda command: own_value(command) if command[0] == b"MGET" else None
    for turns in range(60):
        gone = asyncio.create_task(store.multi_get([b"user:0"], timeout_s=5.0))
        for _ in range(turns):
            await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert await read_users(store, [turns + 1], timeout_s=10.0) == [for_user(turns + 1)]


@pytest.mark.parametrize(
    "greeting", [b"+OK\r\n", b"-ERR go away\r\n", b"*1\r\n$3\r\nabc\r\n", b"220 smtp.example ESMTP\r\n"]
)
async def test_a_server_that_speaks_first_is_no_redis(hostile, store, greeting):
    hostile.greeting = greeting
    await node(store).close()
    assert (await read(store)).store_unavailable
    assert node(store).counts.failures


async def test_a_reply_that_trickles_costs_its_budget(hostile, store):
    hostile.pause_s = 0.01
    hostile.answer = answering(b"MGET", array(bulk(bytes(1000))))
    assert (await read(store, 0.1)).store_unavailable


async def test_a_reply_in_single_bytes_is_read(hostile, store):
    hostile.pause_s = 0.0
    hostile.answer = lambda command: own_value(command) if command[0] == b"MGET" else None
    assert await read_users(store, range(1, 4), timeout_s=10.0) == [for_user(user) for user in range(1, 4)]


WRITES = {
    "EVAL": [b"+OK\r\n", b"*0\r\n", b"$1\r\n1\r\n", b"*2147483647\r\n"],
    "MSET": [b":1\r\n", b"$-1\r\n", b"*-1\r\n"],
}


@pytest.mark.parametrize(("command", "answer"), [(name, answer) for name, them in WRITES.items() for answer in them])
async def test_nonsense_after_a_write_fails_it(hostile, store, command, answer):
    hostile.answer = answering(command.encode(), answer)
    if command == "EVAL":
        write = write_events(store, tiny.ACTIONS, np.array([1], np.uint64), tiny.events([1], [0]), clock_ms())
    else:
        write = store.multi_put([(b"a", b"1")])
    with pytest.raises(StoreUnavailableError, match="sent a malformed reply"):
        await write


@pytest.mark.parametrize(
    "page",
    [
        array(bulk(b"x"), array()),
        array(bulk(b"0")),
        array(bulk(b"0"), array(b":1\r\n")),
        b"+OK\r\n",
        array(b":0\r\n", array()),
    ],
)
async def test_nonsense_for_a_page_of_keys_ends_the_scan_by_name(hostile, store, page):
    hostile.answer = answering(b"SCAN", page)
    with pytest.raises(StoreUnavailableError, match="sent a malformed reply"):
        _ = [keys async for keys in store.scan()]


LAYOUTS = {
    "no list": b"+OK\r\n",
    "numbers": array(b":1\r\n"),
    "slots beyond the last": array(array(b":0\r\n", b":99999\r\n", array(bulk(b"127.0.0.1"), b":7000\r\n"))),
    "a range backwards": array(array(b":9\r\n", b":1\r\n", array(bulk(b"127.0.0.1"), b":7000\r\n"))),
    "no node": array(array(b":0\r\n", b":16383\r\n")),
    "a port beyond the last": array(array(b":0\r\n", b":16383\r\n", array(bulk(b"127.0.0.1"), b":70000\r\n"))),
    "a host that is none": array(array(b":0\r\n", b":16383\r\n", array(bulk(b"\xff\r\n"), b":7000\r\n"))),
    "two billion ranges": b"*2147483647\r\n",
    "no ranges": b"*0\r\n",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
async def test_a_layout_that_makes_no_sense_is_no_layout(hostile, layout):
    hostile.answer = answering(b"CLUSTER", layout)
    store = open_store(hostile.url.replace("redis://", "redis+cluster://"))
    await store.start()
    with pytest.raises(StoreUnavailableError):
        await store.multi_get([b"a"], timeout_s=0.5)
    nodes = b"*1\r\n" + array(b":0\r\n", b":16383\r\n", array(bulk(b"127.0.0.1"), b":%d\r\n" % hostile.port))
    hostile.answer = answering(b"CLUSTER", nodes)
    async with asyncio.timeout(10):
        while True:
            try:
                assert await store.multi_get([b"a"], timeout_s=0.5) == [None]
                break
            except StoreUnavailableError:
                await asyncio.sleep(0.01)
    await store.close()


STREAM_ANSWERS = {
    "XREADGROUP": [
        b"*2147483647\r\n", b"+OK\r\n", array(array(bulk(b"s"), b":1\r\n")), array(array(bulk(b"s"), array(b":1\r\n"))),
        array(array(bulk(b"s"), array(array(bulk(b"1-1"), array(bulk(b"odd")))))),
        array(array(bulk(b"s"), array(array(bulk(b"no number"), array())))),
    ],
    "XAUTOCLAIM": [b":1\r\n", array(bulk(b"0-0")), array(bulk(b"0-0"), array(b":1\r\n")), array(bulk(b"x"), array())],
    "XGROUP": [b":1\r\n"],
    "XINFO": [b"+OK\r\n", array(array(bulk(b"name"))), array(array(bulk(b"name"), b":1\r\n"))],
    "XACK": [b"+OK\r\n"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "nonsense"), [(name, each) for name, them in STREAM_ANSWERS.items() for each in them])
async def test_a_follower_takes_nonsense_for_an_absence_and_goes_on_after_it(
    hostile, store, monkeypatch, name, nonsense
):
    monkeypatch.setattr("feature_client.activity.stream._PAUSE_FIRST_S", 0.01)
    action, surface = (names[0].encode() for names in (tiny.ACTIONS.actions, tiny.ACTIONS.surfaces))
    fields = [b"event_id", b"1", b"user_id", b"1", b"pin_id", b"1", b"time_ms", b"1700000000000"]
    entry = array(bulk(b"1-1"), array(*map(bulk, [*fields, b"action", action, b"surface", surface])))
    follower = StreamFollower(hostile.url, "s", "fold", "one", store, tiny.ACTIONS)
    added_before: list[int] = []

    def answer(command):
        if command[0] == name.encode() and len(added_before) < 2:
            added_before.append(follower.counts.added)
            return nonsense
        return array(array(bulk(b"s"), array(entry))) if command[0] == b"XREADGROUP" and command[-1] == b">" else None

    hostile.answer = answer
    stop = asyncio.Event()
    following = asyncio.create_task(follower.follow(stop))
    await eventually(lambda: len(added_before) == 2 and follower.counts.added > added_before[-1])
    stop.set()
    await following
