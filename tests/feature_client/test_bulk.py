"""Loading whole groups from files: typed, resumable, verified, announced; and what `stat` makes of a store."""

from __future__ import annotations

import numpy as np
import pytest

from feature_client.bulk import CHUNK_ROWS, Source, SourceError, VerificationError, load, stat
from feature_client.codec import decode_rows
from feature_client.memory import MemoryStore
from feature_client.store import StoreUnavailableError
from tests import tiny


def columns(count, first=1):
    ids = np.arange(first, first + count, dtype=np.uint64)
    rows = np.tile(tiny.pin_rows(np.arange(1, 51, dtype=np.uint64)), count // 50 + 1)[:count]
    return {"id": ids, **{name: rows[name] for name in rows.dtype.names}}, rows


def npz(path, found):
    np.savez(path, **found)
    return path


def parquet(path, found):
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
        if array.ndim == 2
        else pa.array(array)
        for name, array in found.items()
    }
    pq.write_table(pa.table(arrays), path)
    return path


WRITERS = {".npz": npz, ".parquet": parquet}


@pytest.mark.parametrize("suffix", WRITERS)
async def test_rows_come_back_from_every_store(any_store, tmp_path, suffix):
    found, rows = columns(300)
    source = Source(WRITERS[suffix](tmp_path / f"pins{suffix}", found), tiny.PINS)
    seen = []
    announced = await load(any_store, tiny.PINS, source, seen.append)
    assert (announced.ref, announced.rows, seen[-1]) == (tiny.PINS.ref, 300, 300)
    read = decode_rows(tiny.PINS, await any_store.multi_get(tiny.PINS.keys(found["id"])))
    assert read.rows.tobytes() == rows.tobytes()
    group = (await stat(any_store, seen.append))[tiny.PINS.ref]
    assert (group.values, group.announcement) == (300, announced)
    assert group.fingerprints == {tiny.PINS.fingerprint.hex(): 300}


class StoreThatFailsOnce(MemoryStore):
    """Fails the write after `good` writes."""

    def __init__(self, good):
        super().__init__()
        self.good, self.written = good, 0

    async def multi_put(self, items):
        self.good -= 1
        if self.good == -1:
            raise StoreUnavailableError("told to fail")
        count = await super().multi_put(items)
        self.written += count
        return count


async def test_an_interrupted_load_goes_on_where_it_was(tmp_path):
    found, _ = columns(2 * CHUNK_ROWS + 10)
    source = Source(npz(tmp_path / "pins.npz", found), tiny.PINS)
    store = StoreThatFailsOnce(good=2)  # the first chunk and its mark
    with pytest.raises(StoreUnavailableError):
        await load(store, tiny.PINS, source, lambda done: None)
    store.written, seen = 0, []
    await load(store, tiny.PINS, source, seen.append)
    assert seen == [CHUNK_ROWS, 2 * CHUNK_ROWS, 2 * CHUNK_ROWS + 10]
    assert store.written < CHUNK_ROWS + 20
    assert (await stat(store, seen.append))[tiny.PINS.ref].values == 2 * CHUNK_ROWS + 10


async def test_another_file_begins_anew(tmp_path):
    store = StoreThatFailsOnce(good=2)
    with pytest.raises(StoreUnavailableError):
        await load(
            store, tiny.PINS, Source(npz(tmp_path / "a.npz", columns(2 * CHUNK_ROWS)[0]), tiny.PINS), lambda done: None
        )
    seen = []
    await load(store, tiny.PINS, Source(npz(tmp_path / "b.npz", columns(100)[0]), tiny.PINS), seen.append)
    assert seen == [0, 100]


async def test_a_store_that_gives_back_other_rows_is_not_announced(tmp_path):
    class Forgetful(MemoryStore):
        async def multi_put(self, items):
            return await super().multi_put([(k, v) for k, v in items if not k.endswith(b"\x07")])

    store = Forgetful()
    source = Source(npz(tmp_path / "pins.npz", columns(100)[0]), tiny.PINS)
    with pytest.raises(VerificationError, match="1 of 100 sampled rows came back otherwise, id 7"):
        await load(store, tiny.PINS, source, lambda done: None)
    assert (await stat(store, lambda seen: None))[tiny.PINS.ref].announcement is None


async def test_two_versions_stand_side_by_side_and_each_model_reads_its_own(tmp_path):
    store = MemoryStore()
    new = tiny.changed(tiny.PINS, version=tiny.PINS.version + 1)
    found, rows = columns(60)
    await load(store, tiny.PINS, Source(npz(tmp_path / "a.npz", found), tiny.PINS), lambda done: None)
    await load(store, new, Source(npz(tmp_path / "b.npz", found), new), lambda done: None)
    assert set(await stat(store, lambda seen: None)) == {tiny.PINS.ref, new.ref}
    for group in (tiny.PINS, new):
        assert decode_rows(group, await store.multi_get(group.keys(found["id"]))).rows.tobytes() == rows.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("id"), "no column id"),
        (lambda c: c.pop("embedding"), "no column embedding"),
        (lambda c: c.update(id=-np.arange(50)), "whole numbers from 0"),
        (lambda c: c.update(id=np.arange(50.0)), "whole numbers from 0"),
        (lambda c: c.update(embedding=c["embedding"][:, :2]), "column embedding has shape"),
    ],
)
async def test_a_file_that_is_not_the_groups_is_refused_by_column(tmp_path, change, message):
    found, _ = columns(50)
    change(found)
    with pytest.raises(SourceError, match=message):
        await load(MemoryStore(), tiny.PINS, Source(npz(tmp_path / "x.npz", found), tiny.PINS), lambda done: None)


async def test_rows_that_the_group_rules_out_are_refused_with_their_place(tmp_path):
    found, _ = columns(50)
    found["embedding"] = found["embedding"].copy()
    found["embedding"][7] = np.nan
    with pytest.raises(SourceError, match=r"rows 0 to 50: .*the first at 7"):
        await load(MemoryStore(), tiny.PINS, Source(npz(tmp_path / "x.npz", found), tiny.PINS), lambda done: None)


@pytest.mark.parametrize("name", ["absent.npz", "absent.parquet", "pins.csv"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(SourceError, match=name):
        Source(tmp_path / name, tiny.PINS)


async def test_keys_that_are_none_of_ours_are_counted_as_other():
    store = MemoryStore({b"session:1": b"x", b"a@1:short": b"y", tiny.PINS.key(1): b"z" * 20})
    found = await stat(store, lambda seen: None)
    assert {ref: own.values for ref, own in found.items()} == {"other": 2, tiny.PINS.ref: 1}
