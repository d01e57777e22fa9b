"""One suite for every store: memory, LMDB, a real redis-server, and a real cluster of three."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading

import lmdb
import numpy as np
import pytest

from feature_client.bulk.write import write_rows, write_sequences
from feature_client.codec import RowState, decode_rows
from feature_client.features import MissingFeatures
from feature_client.fetch import fetch
from feature_client.redaction import redacted
from feature_client.stores.lmdb_file import open_file, read_values
from feature_client.stores.lmdb_store import EmbeddedStore
from feature_client.stores.memory_store import MemoryStore
from feature_client.stores.open_store import open_store
from feature_client.stores.redis.store import RedisStore
from feature_client.stores.store import StoreConfigError, StoreUnavailableError
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
    assert rows.states[:3].tolist() == [RowState.PRESENT, RowState.PRESENT, RowState.MISSING]
    assert fetched.event_rows("pin_core").tobytes() == tiny.pin_rows(np.array([4, 3, 2])).tobytes()
    assert fetched.query_row("pin_core") == tiny.pin_rows(np.array([5]))[0]
    assert fetched.missing() == MissingFeatures(user=False, candidates=1, event_pins=0, query_pin=False, foreign=0)
    assert not fetched.store_unavailable


async def test_lmdb_readers_see_what_another_environment_wrote(tmp_path):
    writer = EmbeddedStore(tmp_path / "store")
    await writer.start()
    await writer.multi_put([(b"a", b"1")])
    await writer.close()
    reader = EmbeddedStore(tmp_path / "store", read_only=True)
    await reader.start()
    assert await reader.multi_get([b"a"]) == [b"1"]
    with pytest.raises(StoreUnavailableError, match="failed to write"):
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
    with pytest.raises(StoreConfigError, match="is truncated: 100000 of"):
        await EmbeddedStore(tmp_path / "store", read_only=True).start()


@pytest.fixture
async def lmdb_store(tmp_path, monkeypatch):
    """A started store with a=1, whose place may be looked at without a pause."""
    monkeypatch.setattr("feature_client.stores.lmdb_store._REOPEN_PAUSE_S", 0.0)
    store = EmbeddedStore(tmp_path / "store")
    await store.start()
    await store.multi_put([(b"a", b"1")])
    yield store
    await store.close()


async def filled(path, value):
    other = EmbeddedStore(path)
    await other.start()
    await other.multi_put([(b"a", value)])
    await other.close()


async def test_lmdb_store_that_is_replaced_is_read_anew(lmdb_store, tmp_path):
    await filled(tmp_path / "new", b"2")
    (tmp_path / "store").rename(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "store")
    assert await lmdb_store.multi_get([b"a"]) == [b"2"]
    assert lmdb_store.reopened == 1
    await filled(tmp_path / "file", b"3")
    (tmp_path / "file" / "data.mdb").rename(tmp_path / "store" / "data.mdb")
    assert [keys async for keys in lmdb_store.scan()] == [[b"a"]]
    assert await lmdb_store.multi_get([b"a"]) == [b"3"]
    assert lmdb_store.reopened == 2


async def test_lmdb_store_that_is_deleted_is_unavailable_and_not_made_anew_until_one_is_moved_in(lmdb_store, tmp_path):
    await filled(tmp_path / "new", b"2")
    shutil.rmtree(tmp_path / "store")
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="was deleted"):
            await lmdb_store.multi_get([b"a"])
        with pytest.raises(StoreUnavailableError, match="was deleted"):
            await lmdb_store.multi_put([(b"a", b"lost")])
        with pytest.raises(StoreUnavailableError, match="was deleted"):
            [keys async for keys in lmdb_store.scan()]
    (tmp_path / "new").rename(tmp_path / "store")
    await lmdb_store.multi_put([(b"b", b"3")])
    assert await lmdb_store.multi_get([b"a", b"b"]) == [b"2", b"3"]


async def test_lmdb_store_that_is_cut_off_under_a_reader_is_unavailable_until_it_is_whole(lmdb_store, tmp_path):
    await lmdb_store.multi_put((i.to_bytes(4, "big"), bytes(1000)) for i in range(1000))
    data = tmp_path / "store" / "data.mdb"
    whole = data.read_bytes()
    for cut in (100_000, 0):
        os.truncate(data, cut)
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="is truncated: 100000 of|was deleted"):
                await lmdb_store.multi_get([(999).to_bytes(4, "big")])
    data.write_bytes(whole)
    assert await lmdb_store.multi_get([(999).to_bytes(4, "big")]) == [bytes(1000)]


@pytest.mark.parametrize("content", [b"no LMDB" * 10_000, None])
async def test_what_lies_in_the_place_of_an_lmdb_store_and_is_none_is_unavailable(lmdb_store, tmp_path, content):
    (tmp_path / "store" / "data.mdb").unlink()
    if content is None:
        os.mkfifo(tmp_path / "store" / "data.mdb")
    else:
        (tmp_path / "store" / "data.mdb").write_bytes(content)
    with pytest.raises(StoreUnavailableError, match="feature store at"):
        await lmdb_store.multi_get([b"a"])


async def test_a_write_to_an_lmdb_store_that_is_replaced_meanwhile_fails_and_goes_to_the_new_one_when_repeated(
    lmdb_store, tmp_path
):
    await filled(tmp_path / "new", b"2")

    def change(positions, before):
        if before == [b"1"]:
            (tmp_path / "store").rename(tmp_path / "old")
            (tmp_path / "new").rename(tmp_path / "store")
        return [before[0] + b"+"]

    with pytest.raises(StoreUnavailableError, match="replaced during the write; try again"):
        await lmdb_store.update([b"a"], change)
    await lmdb_store.update([b"a"], change)
    assert await lmdb_store.multi_get([b"a"]) == [b"2+"]


async def test_lmdb_store_is_not_reopened_while_a_thread_writes_to_it(lmdb_store, tmp_path):
    await filled(tmp_path / "new", b"2")
    writing, go_on = threading.Event(), threading.Event()

    def change(positions, before):
        writing.set()
        go_on.wait(10)
        return [None]

    update = asyncio.create_task(lmdb_store.update([b"a"], change))
    await asyncio.to_thread(writing.wait, 10)
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "new").rename(tmp_path / "store")
    with pytest.raises(StoreUnavailableError, match="a write is still in progress"):
        await lmdb_store.multi_get([b"a"])
    go_on.set()
    with pytest.raises(StoreUnavailableError, match="replaced during the write"):
        await update
    assert await lmdb_store.multi_get([b"a"]) == [b"2"]


async def test_lmdb_store_is_closed_after_the_write_of_a_caller_that_hung_up(lmdb_store):
    writing, go_on, written = threading.Event(), threading.Event(), threading.Event()

    def change(positions, before):
        writing.set()
        go_on.wait(10)
        written.set()
        return [b"2"]

    update = asyncio.create_task(lmdb_store.update([b"a"], change))
    await asyncio.to_thread(writing.wait, 10)
    update.cancel()
    with pytest.raises(asyncio.CancelledError):
        await update
    closing = asyncio.create_task(lmdb_store.close())
    await asyncio.sleep(0)
    assert not closing.done()
    go_on.set()
    await closing
    assert written.is_set()
    await lmdb_store.start()
    assert await lmdb_store.multi_get([b"a"]) == [b"2"]


@pytest.mark.parametrize("first", ["read", "write"])
async def test_lmdb_store_that_another_process_made_larger_than_was_mapped_is_mapped_anew(tmp_path, monkeypatch, first):
    monkeypatch.setattr("feature_client.stores.lmdb_file.MAP_BYTES", 1 << 20)
    store = EmbeddedStore(tmp_path / "store")
    await store.start()
    grow = (
        "import lmdb, sys; env = lmdb.open(sys.argv[1], map_size=1 << 26)\n"
        "with env.begin(write=True) as t:\n    for i in range(4000): t.put(b'%d' % i, bytes(1000))"
    )
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", grow, str(tmp_path / "store")], check=True)
    if first == "write":
        await store.multi_put([(b"a", b"1")])
        assert await store.multi_get([b"a"]) == [b"1"]
    assert await store.multi_get([b"3999"]) == [bytes(1000)]
    await store.close()


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
    assert not fetched.missing().user
    assert fetched.events["pin_id"].tolist() == [2, 1]
    assert fetched.missing().candidates == 2


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
    assert fetched.sequence_state == RowState.MISSING


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
