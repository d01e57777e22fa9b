"""Loading whole groups from files: typed, resumable, verified, announced; and what `stat` makes of a store."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.fuzz import fuzz_parquet
from feature_client.bulk.load import VerificationError, load, stat
from feature_client.bulk.source import CHUNK_ROWS, Source, SourceError
from feature_client.bulk.write import ForeignValuesError
from feature_client.codec import decode_rows
from feature_client.groups import Categorical, Embedding, EmbeddingSpace, FeatureGroup, Scalar
from feature_client.stores.memory_store import MemoryStore
from feature_client.stores.store import StoreUnavailableError
from tests import tiny


def columns(count, first=1):
    ids = np.arange(first, first + count, dtype=np.uint64)
    rows = np.tile(tiny.pin_rows(np.arange(1, 51, dtype=np.uint64)), count // 50 + 1)[:count]
    return {"id": ids, **{name: rows[name] for name in rows.dtype.names}}, rows


def npz(path, found):
    np.savez(path, **found)
    return path


def parquet(path, found):
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
    with pytest.raises(VerificationError, match="1 of 100 sampled rows differ from the file, such as that of id 7"):
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


async def test_rows_of_another_space_are_not_replaced_unless_it_is_said(tmp_path):
    store = MemoryStore()
    field = tiny.PINS.fields[0]
    space = field.space.model_copy(update={"content": "0123456789abcdef"})
    other = tiny.changed(tiny.PINS, fields=(tiny.changed(field, space=space), *tiny.PINS.fields[1:]))
    found, rows = columns(60)
    await load(store, tiny.PINS, Source(npz(tmp_path / "a.npz", found), tiny.PINS), lambda done: None)
    source = Source(npz(tmp_path / "b.npz", found), other)
    with pytest.raises(ForeignValuesError, match=r"the store has pin_core@1 of another description \(60 of 60 sampled"):
        await load(store, other, source, lambda done: None)
    assert decode_rows(tiny.PINS, await store.multi_get(tiny.PINS.keys(found["id"]))).rows.tobytes() == rows.tobytes()
    await load(store, other, source, lambda done: None, replace=True)
    await load(store, other, source, lambda done: None)  # its own rows it may replace
    assert decode_rows(other, await store.multi_get(other.keys(found["id"]))).rows.tobytes() == rows.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("id"), "no column id"),
        (lambda c: c.pop("embedding"), "no column embedding"),
        (lambda c: c.update(id=-np.arange(50)), "row 1 .*column id: -1 is negative"),
        (lambda c: c.update(id=np.arange(50.0)), "whole numbers from 0"),
        (
            lambda c: c.update(embedding=c["embedding"][:, :2]),
            "column embedding holds float16 of shape \\(50, 2\\); the field needs vectors of width 4",
        ),
    ],
)
async def test_a_file_that_is_not_the_groups_is_refused_by_column(tmp_path, change, message):
    found, _ = columns(50)
    change(found)
    with pytest.raises(SourceError, match=message):
        await load(MemoryStore(), tiny.PINS, Source(npz(tmp_path / "x.npz", found), tiny.PINS), lambda done: None)


MIXED = FeatureGroup(
    name="mixed", version=1, entity="pin",
    fields=(
        Categorical(name="country", cardinality=200), Scalar(name="views", dtype="int32"), Scalar(name="score"),
        Embedding(name="code", space=EmbeddingSpace(name="c", version=1, dim=2, dtype="int8", scale=0.1)),
    ),
)  # fmt: skip


def mixed(**changes):
    return {
        "id": np.array([1, 2, 3], np.uint64), "country": np.array([0, 44, 199]), "views": np.array([1, 2, 3]),
        "score": np.array([0.5, 1.5, 2.5]), "code": np.array([[1, 2], [3, 4], [-128, 127]]),
    } | changes  # fmt: skip


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("country", [0.0, 300.0, 1.0], "row 1 .*column country: 300.0 is not a code of the vocabulary.* from 0 to 199"),
        ("country", [0, 1, -1], "row 2 .*column country: -1 is not a code"),
        ("country", ["DE", "FR", "IT"], "column country holds .*needs numbers"),
        ("views", [1.0, 1e10, 1.0], "row 1 .*column views: 10000000000.0 does not fit int32"),
        ("views", [1, 2, 2**31], "row 2 .*column views: 2147483648 does not fit int32"),
        ("views", [10.7, 1.0, 1.0], "row 0 .*column views: 10.7 is not a whole number"),
        ("views", [1.0, float("nan"), 1.0], "row 1 .*column views: nan is not finite"),
        ("score", [0.0, 1e39, 0.0], "row 1 .*column score: 1e\\+39 is beyond the largest float32"),
        ("score", [0.0, 0.0, -np.inf], "row 2 .*column score: -inf is not finite"),
        ("score", [2**24 + 1, 0, 0], "row 0 .*column score: 16777217 is a whole number that float32 cannot hold"),
        ("score", [[0.0], [1.0], [2.0]], "column score holds"),
        ("code", [[0.5, 1.0], [0.0, 0.0], [0.0, 0.0]], "row 0 .*column code: 0.5 is not a whole number, and int8"),
        ("code", [[0, 1], [0, 0], [0, 128]], "row 2 .*column code: 128 does not fit int8"),
        ("code", [[0, 1, 2], [0, 0, 0], [0, 1, 2]], "column code"),
        ("code", [1, 2, 3], "column code"),
        ("id", [1, 2, -3], "row 2 .*column id: -3 is negative"),
        ("id", [1.0, 2.0, 3.0], "column id holds .*write them as integers"),
        ("id", ["1", "2", "3"], "column id holds"),
        ("id", [5, 6, 5], "row 2 .*id 5 is already in row 0"),
    ],
)  # fmt: skip
async def test_a_value_that_its_field_cannot_hold_is_refused_before_anything_is_written(
    tmp_path, suffix, column, values, says
):
    path = WRITERS[suffix](tmp_path / f"pins{suffix}", mixed(**{column: np.array(values)}))
    store = MemoryStore()
    with pytest.raises(SourceError, match=f"pins{suffix}: .*{says}"):
        await load(store, MIXED, Source(path, MIXED), lambda done: None)
    assert not store.values


@pytest.mark.parametrize("suffix", WRITERS)
async def test_whole_floats_and_large_ids_are_stored_as_what_they_are(tmp_path, suffix):
    columns = mixed(
        id=np.array([0, 2**63 + 1, 2**64 - 1], np.uint64), country=np.array([0.0, 44.0, 199.0]),
        views=np.array([-1.0, -0.0, 2.0**31 - 1]), score=np.array([True, False, True]),
    )  # fmt: skip
    store = MemoryStore()
    await load(store, MIXED, Source(WRITERS[suffix](tmp_path / f"pins{suffix}", columns), MIXED), lambda done: None)
    rows = decode_rows(MIXED, await store.multi_get(MIXED.keys(columns["id"]))).rows
    assert rows["country"].tolist() == [0, 44, 199]
    assert rows["views"].tolist() == [-1, 0, 2**31 - 1]
    assert rows["score"].tolist() == [1, 0, 1]
    assert rows["code"].tolist() == [[1, 2], [3, 4], [-128, 127]]


@pytest.mark.parametrize(
    ("column", "array", "says"),
    [
        ("views", pa.array([1, None, 3]), "row 1 .*row group 1\\), column views: the value is missing"),
        ("country", pa.array(["DE", "FR", "DE"]).dictionary_encode(), "column country holds string"),
        ("views", pa.array([1, 2, 3], pa.timestamp("s")), "column views holds timestamp"),
        ("views", pa.array([1, 2, 3], pa.decimal128(5)), "column views holds decimal128"),
        ("views", pa.nulls(3), "column views holds null"),
        ("code", pa.array([[1, 2], [3], [4, 5, 6]], pa.list_(pa.int8())), "row 1 .*column code: \\[3\\] has width 1"),
        ("code", pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2)), "row 1 .*column code: the value is missing"),
        ("code", pa.array([[1, 2], [3, 4], [5, None]], pa.list_(pa.int8())), "row 2 .*column code: the value is miss"),
        ("code", pa.array([["a", "b"]] * 3), "column code holds string"),
        ("code", pa.array([[(1, 2)]] * 3, pa.map_(pa.int8(), pa.int8())), "column code holds map.* lists of 2 numbers"),
    ],
)  # fmt: skip
async def test_arrow_values_that_are_missing_or_no_numbers_are_refused_with_their_row_group(
    tmp_path, column, array, says
):
    arrays = {name: pa.array(list(values)) for name, values in mixed().items()} | {column: array}
    pq.write_table(pa.table(arrays), tmp_path / "pins.parquet", row_group_size=1)
    with pytest.raises(SourceError, match=f"pins.parquet: .*{says}"):
        await load(MemoryStore(), MIXED, Source(tmp_path / "pins.parquet", MIXED), lambda done: None)


def test_a_column_that_stands_twice_is_refused_and_one_that_no_field_has_is_told(tmp_path):
    arrays = {name: pa.array(list(values)) for name, values in mixed().items()}
    twice = pa.Table.from_arrays([*arrays.values(), arrays["views"]], names=[*arrays, "views"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(SourceError, match="twice.parquet: more than one column views"):
        Source(tmp_path / "twice.parquet", MIXED)
    more = Source(npz(tmp_path / "more.npz", mixed(colour=np.zeros(3))), MIXED)
    assert more.ignored == ("colour",)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_that_is_broken_anywhere_is_refused_by_name(tmp_path, suffix):
    whole = WRITERS[suffix](tmp_path / f"whole{suffix}", mixed()).read_bytes()
    path = tmp_path / f"broken{suffix}"
    for broken in (b"", b"PAR1", whole[: len(whole) // 2], whole[:100] + b"\xff" * 100 + whole[200:]):
        path.write_bytes(broken)
        with pytest.raises(SourceError, match=f"broken{suffix}"):
            Source(path, MIXED).check(lambda done: None)


def test_a_page_that_is_not_what_was_written_is_refused_where_the_file_has_checksums(tmp_path):
    arrays = {name: pa.array(list(values)) for name, values in mixed().items()} | {"views": pa.array([7, 77, 777])}
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table(arrays), tmp_path / "pins.parquet", **options)
    whole = (tmp_path / "pins.parquet").read_bytes()
    written, other = (np.array(values).tobytes() for values in ([7, 77, 777], [7, 78, 777]))
    (tmp_path / "pins.parquet").write_bytes(whole.replace(written, other, 1))
    with pytest.raises(SourceError, match="pins.parquet: the file cannot be read: .*CRC"):
        Source(tmp_path / "pins.parquet", MIXED).check(lambda done: None)


def test_an_archive_that_is_encrypted_is_refused(tmp_path):
    path = npz(tmp_path / "pins.npz", mixed())
    content = bytearray(path.read_bytes())
    for at in (match.start() for match in re.finditer(b"PK\x01\x02", content)):
        content[at + 8] |= 1  # of the flags in each name's entry, that it is encrypted
    path.write_bytes(content)
    with pytest.raises(SourceError, match="pins.npz: the file cannot be read: .*encrypted"):
        Source(path, MIXED)


def test_arrays_of_different_lengths_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"column views has shape \(2,\), column id has \(3,\)"):
        Source(npz(tmp_path / "x.npz", mixed(views=np.array([1, 2]))), MIXED)


async def test_the_next_days_file_of_the_same_name_and_size_begins_anew(tmp_path):
    path = tmp_path / "pins.npz"
    first, second = columns(2 * CHUNK_ROWS)[0], columns(2 * CHUNK_ROWS)[0]
    second["popularity"] = 1 - second["popularity"]
    store = StoreThatFailsOnce(good=2)
    with pytest.raises(StoreUnavailableError):
        await load(store, tiny.PINS, Source(npz(path, first), tiny.PINS), lambda done: None)
    size, seen = path.stat().st_size, []
    source = Source(npz(path, second), tiny.PINS)
    assert path.stat().st_size == size
    await load(store, tiny.PINS, source, seen.append)
    assert seen[0] == 0
    read = decode_rows(tiny.PINS, await store.multi_get(tiny.PINS.keys(second["id"])))
    assert np.array_equal(read.rows["popularity"], second["popularity"])


async def test_a_load_whose_rows_were_overwritten_meanwhile_writes_them_all_when_called_again(tmp_path):
    found, rows = columns(2 * CHUNK_ROWS)
    source = Source(npz(tmp_path / "pins.npz", found), tiny.PINS)
    store = StoreThatFailsOnce(good=2)
    with pytest.raises(StoreUnavailableError):
        await load(store, tiny.PINS, source, lambda done: None)
    for key in tiny.PINS.keys(found["id"][:CHUNK_ROWS]):
        store.values[key] = b"another writer's"
    with pytest.raises(VerificationError, match="load again"):
        await load(store, tiny.PINS, source, lambda done: None)
    with pytest.raises(ForeignValuesError, match=r"or replace them \(--replace\)"):
        await load(store, tiny.PINS, source, lambda done: None)
    await load(store, tiny.PINS, source, lambda done: None, replace=True)
    read = decode_rows(tiny.PINS, await store.multi_get(tiny.PINS.keys(found["id"])))
    assert read.rows.tobytes() == rows.tobytes()


async def test_a_file_that_changes_while_it_is_loaded_is_not_announced(tmp_path):
    path = npz(tmp_path / "pins.npz", columns(50)[0])
    source = Source(path, tiny.PINS)
    store = MemoryStore()
    with pytest.raises(SourceError, match=r"pins.npz: the file changed during the load; load again"):
        await load(store, tiny.PINS, source, lambda done: npz(path, columns(60)[0]))
    assert (await stat(store, lambda seen: None))[tiny.PINS.ref].announcement is None


@pytest.mark.parametrize("mark", [b"\xff", b"pins.npz:17:abc:20000", b"%s:", b"%s:-1", b"%s:99", b"%s:x"])
async def test_a_mark_that_is_no_count_of_this_contents_rows_begins_anew(tmp_path, mark):
    source = Source(npz(tmp_path / "pins.npz", columns(50)[0]), tiny.PINS)
    mark = mark.replace(b"%s", f"{source.digest}:{tiny.PINS.fingerprint.hex()}".encode())
    store, seen = MemoryStore({b"pinrank:loading:" + tiny.PINS.ref.encode(): mark}), []
    await load(store, tiny.PINS, source, seen.append)
    assert seen == [0, 50]


async def test_an_announcement_that_cannot_be_read_counts_as_none():
    keys = [b"pinrank:announced:" + tiny.PINS.ref.encode(), b"pinrank:announced:\xff"]
    for content in (b"", b"\xff", b"[]", b'{"ref": 1}', b"null"):
        store = MemoryStore({**dict.fromkeys(keys, content), tiny.PINS.key(1): b"z" * 20})
        assert (await stat(store, lambda seen: None))[tiny.PINS.ref].announcement is None


def test_five_hundred_hostile_files_store_what_a_slow_reader_says_or_are_refused(tmp_path):
    tally = fuzz_parquet.ParquetTally()
    fuzz_parquet.fuzz(500, tally, tmp_path)
    assert tally.cases >= 500
    assert min(tally.outcomes[what] for what in ("stored", "refused")) > 100


def test_a_loader_that_stores_another_value_is_found_by_the_fuzz(tmp_path, monkeypatch):
    def another(table, group):
        read = fuzz_parquet_slow_read(table, group)
        return read and {key: bytes([value[0] ^ 1]) + value[1:] for key, value in read.items()}

    fuzz_parquet_slow_read = fuzz_parquet.slow_read
    monkeypatch.setattr(fuzz_parquet, "slow_read", another)
    with pytest.raises(fuzz_parquet.WrongValueError):
        fuzz_parquet.fuzz(50, fuzz_parquet.ParquetTally(), tmp_path)


async def test_rows_that_the_group_rules_out_are_refused_with_their_place(tmp_path):
    found, _ = columns(50)
    found["embedding"] = found["embedding"].copy()
    found["embedding"][7] = np.nan
    with pytest.raises(SourceError, match=r"x.npz: row 7 .*, column embedding: nan is not finite"):
        await load(MemoryStore(), tiny.PINS, Source(npz(tmp_path / "x.npz", found), tiny.PINS), lambda done: None)


@pytest.mark.parametrize("name", ["absent.npz", "absent.parquet", "pins.csv"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(SourceError, match=name):
        Source(tmp_path / name, tiny.PINS)


async def test_keys_that_are_none_of_ours_are_counted_as_other():
    store = MemoryStore({b"session:1": b"x", b"a@1:short": b"y", tiny.PINS.key(1): b"z" * 20})
    found = await stat(store, lambda seen: None)
    assert {ref: own.values for ref, own in found.items()} == {"other": 2, tiny.PINS.ref: 1}
