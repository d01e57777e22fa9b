from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_client.groups import EmbeddingSpace
from ranker.data.atomic.described import Vectors
from ranker.data.atomic.vectors import open_vectors
from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.vector_file import (
    UserVectors,
    VectorsOrigin,
    open_saved_vectors,
    read_user_vectors,
    read_vectors,
    write_user_vectors,
    write_vectors,
)
from ranker.errors import DatasetError

SPACE = EmbeddingSpace(name="toy", version=2, dim=3, content="0123456789abcdef")
ORIGIN = VectorsOrigin(space=SPACE, until_ms=1_700_000_000_000, revision=2, made_by="pinrank embed", made_of="other@1")
HELD = PinEmbeddings(np.array([2, 2**64 - 1], np.uint64), np.array([[0, 1, 2], [3, 4, 5]], np.float16), SPACE)


def test_vectors_come_back_with_what_was_said_about_them(tmp_path):
    path = tmp_path / "v.parquet"
    write_vectors(path, HELD, ORIGIN)
    found = read_vectors(path)
    assert found.origin == ORIGIN
    assert found.embeddings.space == SPACE
    assert found.embeddings.pin_ids.tolist() == [2, 2**64 - 1]
    assert found.embeddings.vectors.dtype == np.float16
    assert np.array_equal(found.embeddings.vectors, HELD.vectors)
    assert [one.name for one in tmp_path.iterdir()] == ["v.parquet"]


def test_a_dataset_can_name_such_a_file_as_its_own_vectors(tmp_path):
    path = tmp_path / "v.parquet"
    write_vectors(path, PinEmbeddings(np.array([2, 7], np.uint64), HELD.vectors, SPACE), ORIGIN)
    _, tokens, numbers = open_vectors(path, "item").read(Vectors(vectors="v.parquet"))
    assert tokens == ["2", "7"]
    assert np.array_equal(numbers, HELD.vectors)


def test_vectors_are_not_written_under_another_space(tmp_path):
    with pytest.raises(ValueError, match="cannot be written as"):
        write_vectors(
            tmp_path / "v.parquet", HELD, VectorsOrigin(space=SPACE.model_copy(update={"version": 3}), until_ms=1)
        )
    assert list(tmp_path.iterdir()) == []


def changed(path, edit):
    write_vectors(path, HELD, ORIGIN)
    table = pq.read_table(path)
    pq.write_table(edit(table), path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda table: table.replace_schema_metadata({}), "does not say of which embedding space"),
        (lambda table: table.replace_schema_metadata({b"pinrank.vectors": b"{"}), "cannot be read"),
        (lambda table: table.replace_schema_metadata({b"pinrank.vectors": b'{"until_ms": 1}'}), "cannot be read"),
        (lambda table: table.drop_columns(["vector"]), "lacks a column"),
        (lambda table: pa.concat_tables([table, table]), "has pin 2 more than once"),
        (
            lambda table: table.set_column(1, "vector", pa.array([[1.0, 2.0, 3.0], [1.0, float("nan"), 2.0]])),
            r"row 1 \(the first is 0\): nan",
        ),
        (lambda table: table.set_column(1, "vector", pa.array([[1.0, 2.0], [1.0, 2.0]])), "3"),
        (lambda table: table.set_column(0, "item_id", pa.array(["a", "b"])), "holds string; the field needs numbers"),
    ],
)
def test_files_that_are_not_understood_are_refused(tmp_path, edit, message):
    path = tmp_path / "v.parquet"
    changed(path, edit)
    with pytest.raises(DatasetError, match=message):
        read_vectors(path)


def test_pins_may_be_in_any_order(tmp_path):
    path = tmp_path / "v.parquet"
    changed(path, lambda table: table.take([1, 0]))
    found = read_vectors(path).embeddings
    assert found.pin_ids.tolist() == [2, 2**64 - 1]
    assert np.array_equal(found.vectors, HELD.vectors)


def test_no_file_and_no_parquet_file_say_what_to_do(tmp_path):
    with pytest.raises(DatasetError, match="does not exist; write vectors with `pinrank embed`"):
        read_vectors(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(DatasetError, match="cannot be read as a Parquet file"):
        read_vectors(tmp_path / "text.parquet")


@pytest.mark.parametrize(("until_ms", "refused"), [(10, False), (11, True), (None, True)])
def test_vectors_that_may_have_seen_the_test_are_refused(until_ms, refused, tmp_path):
    path = tmp_path / "v.parquet"
    write_vectors(path, HELD, ORIGIN.model_copy(update={"until_ms": until_ms}))
    found = read_vectors(path)
    if refused:
        with pytest.raises(DatasetError, match="--before training"):
            found.refuse_after(10)
    else:
        found.refuse_after(10)


def test_a_file_is_read_in_parts_as_it_stands(tmp_path):
    path = tmp_path / "v.parquet"
    held = PinEmbeddings(np.array([9, 2, 5], np.uint64), np.arange(9, dtype=np.float16).reshape(3, 3), SPACE)
    write_vectors(path, held, ORIGIN)
    pq.write_table(pq.read_table(path), path, row_group_size=2)
    file = open_saved_vectors(path)
    assert (file.origin, file.pins, file.parts) == (ORIGIN, 3, 2)
    pins, vectors = (np.concatenate(parts) for parts in zip(*map(file.read, range(2)), strict=True))
    assert pins.tolist() == [9, 2, 5]
    assert np.array_equal(vectors, held.vectors)
    with pytest.raises(DatasetError, match="does not exist; write vectors with `pinrank embed`"):
        open_saved_vectors(tmp_path / "lost.parquet")


def test_a_fault_in_a_part_is_named_with_its_row(tmp_path):
    path = tmp_path / "v.parquet"
    numbers = np.array([[0, 1, 2], [3, 4, 5], [6, np.nan, 8]], np.float16)
    write_vectors(path, PinEmbeddings(np.arange(3, dtype=np.uint64), numbers, SPACE), ORIGIN)
    pq.write_table(pq.read_table(path), path, row_group_size=2)
    file = open_saved_vectors(path)
    file.read(0)
    with pytest.raises(DatasetError, match=r"v\.parquet, row group 1, row 0 \(the first is 0\): .* is not finite"):
        file.read(1)


def test_vectors_of_users_come_back_and_are_not_those_of_pins(tmp_path):
    path, origin = tmp_path / "u.parquet", ORIGIN.model_copy(update={"entity": "user"})
    users = UserVectors(HELD.pin_ids, HELD.vectors, origin)
    write_user_vectors(path, users)
    found = read_user_vectors(path)
    assert (found.origin, found.user_ids.tolist()) == (origin, [2, 2**64 - 1])
    assert np.array_equal(found.vectors, HELD.vectors)
    with pytest.raises(DatasetError, match="has vectors of users, and those of pins are needed"):
        read_vectors(path)
    with pytest.raises(ValueError, match="vectors of a pin cannot be written as those of a user"):
        write_vectors(path, HELD, origin)
    write_vectors(path, HELD, ORIGIN)
    with pytest.raises(DatasetError, match="has vectors of pins, and those of users are needed"):
        read_user_vectors(path)


def test_files_that_were_written_before_there_were_users_are_of_pins(tmp_path):
    path = tmp_path / "v.parquet"
    described = ORIGIN.model_dump_json(exclude={"entity"}).encode()
    changed(path, lambda table: table.replace_schema_metadata({b"pinrank.vectors": described}))
    assert read_vectors(path).origin.entity == "pin"
