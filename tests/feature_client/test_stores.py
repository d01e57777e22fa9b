"""One suite for every store: memory, LMDB, a real redis-server, and a real cluster of three."""

from __future__ import annotations

import asyncio
import os

import lmdb
import numpy as np
import pytest

from feature_client.codec import State, decode_rows
from feature_client.embedded import EmbeddedStore
from feature_client.fetcher import Lacks, fetch
from feature_client.lmdb_file import open_file, read_values
from feature_client.memory import MemoryStore
from feature_client.opening import open_store, redacted
from feature_client.redis_store import RedisStore
from feature_client.store import StoreConfigError, StoreUnavailableError
from feature_client.writer import write_rows, write_sequences
from tests import tiny


async def test_values_come_back_in_the_order_of_the_keys(any_store):
    assert await any_store.multi_put([(b"a", b"1"), (b"b", b"\x00\xff"), (b"c", b"3")]) == 3
    assert await any_store.multi_get([b"c", b"nothing", b"a", b"b"]) == [b"3", None, b"1", b"\x00\xff"]
    assert await any_store.multi_get([]) == []


async def test_a_write_replaces_what_was_there(any_store):
    await any_store.multi_put([(b"a", b"old")])
    await any_store.multi_put([(b"a", b"new")])
    assert await any_store.multi_get([b"a"]) == [b"new"]


async def test_thousands_of_values_are_written_and_read(any_store):
    items = [(i.to_bytes(8, "big"), bytes([i % 256]) * 90) for i in range(5_000)]
    assert await any_store.multi_put(iter(items)) == 5_000
    assert await any_store.multi_get([key for key, _ in items]) == [value for _, value in items]


async def test_rows_and_sequences_come_back_through_the_fetcher(any_store):
    pins, users = np.arange(1, 21, dtype=np.uint64), np.array([7, 8], np.uint64)
    await write_rows(any_store, tiny.PINS, pins, tiny.pin_rows(pins))
    await write_rows(any_store, tiny.USERS, users, tiny.user_rows(users))
    events = tiny.events([1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 0, 1])
    await write_sequences(any_store, tiny.ACTIONS, users, events, np.array([0, 4, 6]))
    fetched = await fetch(any_store, tiny.manifest().needs, 7, np.array([9, 2, 900], np.uint64), query_pin_id=5)
    assert fetched.events["pin_id"].tolist() == [4, 3, 2]  # the newest LENGTH, newest first
    assert fetched.user["user_core"].rows[0] == tiny.user_rows(users)[0]
    rows = fetched.pins["pin_core"]
    assert fetched.candidate_rows("pin_core")[:2].tobytes() == tiny.pin_rows(np.array([9, 2])).tobytes()
    assert rows.states[:3].tolist() == [State.PRESENT, State.PRESENT, State.MISSING]
    assert fetched.event_rows("pin_core").tobytes() == tiny.pin_rows(np.array([4, 3, 2])).tobytes()
    assert fetched.query_row("pin_core") == tiny.pin_rows(np.array([5]))[0]
    assert fetched.lacks() == Lacks(user=False, candidates=1, event_pins=0, query_pin=False, foreign=0)
    assert not fetched.store_unavailable


async def test_lmdb_readers_see_what_another_environment_wrote(tmp_path):
    writer = EmbeddedStore(tmp_path / "store")
    await writer.start()
    await writer.multi_put([(b"a", b"1")])
    await writer.close()
    reader = EmbeddedStore(tmp_path / "store", read_only=True)
    await reader.start()
    assert await reader.multi_get([b"a"]) == [b"1"]
    with pytest.raises(StoreUnavailableError, match="failed a write"):
        await reader.multi_put([(b"a", b"2")])
    await reader.close()
    with pytest.raises(StoreUnavailableError, match="not started"):
        await reader.multi_get([b"a"])


async def test_reading_an_lmdb_store_that_is_not_there_names_the_path(tmp_path):
    with pytest.raises(StoreConfigError, match=r"no feature store at .*absent"):
        await open_store(f"lmdb://{tmp_path / 'absent'}", read_only=True).start()


async def test_lmdb_file_that_is_cut_off_is_refused(tmp_path):
    store = EmbeddedStore(tmp_path / "store")
    await store.start()
    await store.multi_put((i.to_bytes(4, "big"), bytes(1000)) for i in range(1000))
    await store.close()
    os.truncate(tmp_path / "store" / "data.mdb", 100_000)
    with pytest.raises(StoreConfigError, match="is cut off: 100000 bytes of"):
        await EmbeddedStore(tmp_path / "store", read_only=True).start()


async def test_redis_that_is_down_starts_and_then_raises_on_every_read():
    store = RedisStore("redis://127.0.0.1:1/0")
    await store.start()
    with pytest.raises(StoreUnavailableError, match=r"Redis at 127\.0\.0\.1:1 failed"):
        await store.multi_get([b"a"])
    await store.close()


@pytest.mark.parametrize(
    "url", ["lmdb://relative", "lmdb:///a#b", "ldap://x", "", "redis", "redis://127.0.0.1:port/0", "redis://:pw@[::1/0"]
)
async def test_unusable_url_is_refused_by_name(url):
    with pytest.raises(StoreConfigError):
        await open_store(url).start()


def test_store_urls_are_shown_without_their_secrets():
    assert redacted("redis://user:secret@host:6379/0?password=secret") == "redis://host:6379/0"
    assert redacted("lmdb:///var/lib/features") == "lmdb:///var/lib/features"


class StoreThatFailsSecond(MemoryStore):
    async def multi_get(self, keys, timeout_s=None):
        values = await super().multi_get(keys)
        self.failing = True
        return values


async def test_what_was_read_before_the_store_failed_is_kept():
    store = StoreThatFailsSecond(tiny.features())
    fetched = await fetch(store, tiny.manifest().needs, 1, np.array([1, 2], np.uint64))
    assert fetched.store_unavailable
    assert not fetched.lacks().user
    assert fetched.events["pin_id"].tolist() == [2, 1]
    assert fetched.lacks().candidates == 2


class StoreThatHangs(MemoryStore):
    local = False

    async def multi_get(self, keys, timeout_s=None):
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.Event().wait()
        except TimeoutError as error:
            raise StoreUnavailableError("told to hang") from error


async def test_a_read_beyond_its_budget_counts_as_an_unavailable_store():
    fetched = await fetch(StoreThatHangs(), tiny.manifest().needs, 1, np.array([1], np.uint64), budget_s=0.01)
    assert fetched.store_unavailable
    assert fetched.sequence_state == State.MISSING


def test_decoding_reads_what_the_store_returned(tmp_path):
    keys = tiny.PINS.keys(np.array([3], np.uint64))
    assert decode_rows(tiny.PINS, [tiny.features()[keys[0]]]).rows[0] == tiny.pin_rows(np.array([3]))[0]


class _Overtaken:
    """A store that others commit to while it is read, as often as is said."""

    def __init__(self, env, times):
        self._env, self._times = env, times

    def begin(self):
        return self._env.begin()

    def info(self):
        self._times -= 1
        return {"last_txnid": self._env.info()["last_txnid"] + (self._times >= 0)}


async def test_a_reader_without_a_lock_reads_again_what_was_overtaken_and_gives_up_in_the_end(tmp_path):
    store = EmbeddedStore(tmp_path)
    await store.start()
    await store.multi_put([(b"key", b"value")])
    await store.close()
    env, locked = open_file(tmp_path, read_only=True)
    assert locked
    assert read_values(_Overtaken(env, 2), [b"key", b"none"], locked=False) == [b"value", None]
    with pytest.raises(lmdb.Error, match="written to during each of three reads"):
        read_values(_Overtaken(env, 3), [b"key"], locked=False)
    assert read_values(_Overtaken(env, 3), [b"key"], locked=True) == [b"value"]
    env.close()
