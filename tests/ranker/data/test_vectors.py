"""The user's own vectors: what becomes of a Parquet file beside the data, what is refused, and what is proposed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranker.data.actions import action_log
from ranker.data.atomic.described import Described, Vectors, fields_of, read_described
from ranker.data.atomic.identifiers import token_id
from ranker.data.atomic.proposals import proposals
from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.data.embeddings import space_of
from ranker.data.features import Groups, pin_rows, user_rows
from ranker.errors import DatasetError, SettingError
from tests.ranker.commands import run
from tests.ranker.interactions import write_atomic

FEATURES = '[[pins]]\nvectors = "text.parquet"\n'


def write(path: Path, ids: Sequence[Any], vectors: Any, id_column: str = "item_id") -> None:
    pq.write_table(pa.table({id_column: ids, "vector": vectors}), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_atomic(tmp_path / "data", per_user=12)
    write(folder / "text.parquet", ["p1", "p0", "nobody's"], [[3.0, 4.0], [1.0, 2.0], [9.0, 9.0]])
    (folder / "features.toml").write_text(FEATURES)
    return folder


def values(dataset: AtomicDataset, token: str) -> list[float]:
    found: list[float] = dataset.pin_values.of(np.array([token_id(token)], np.uint64))[0].tolist()
    return found


def problems(folder: Path) -> str:
    return " ".join(str(problem) for problem in read_atomic(folder).problems)


def test_each_number_becomes_a_field_and_a_pin_without_a_vector_has_zeros(folder: Path) -> None:
    dataset = read_atomic(folder)
    log = action_log(dataset)
    groups = Groups.of(space_of("toy"), log.schema, log.described)
    assert groups.pin_scalars[-2:] == ("text_0", "text_1")
    rows = pin_rows(log, groups.pin, np.zeros((len(log.pin_ids), 32), np.float16), int(log.time_ms[-1]) + 1)

    def of_pin(token: str) -> list[float]:
        row = rows.rows[int(np.flatnonzero(log.pin_ids == np.uint64(token_id(token)))[0])]
        return [float(row["text_0"]), float(row["text_1"])]

    assert [of_pin(token) for token in ("p0", "p1", "p2")] == [[1, 2], [3, 4], [0, 0]]
    assert "text.parquet: 88 of the 90 items of the interactions have no vector, such as 'p" in problems(folder)


def test_columns_and_vectors_of_pins_and_users_stand_side_by_side(folder: Path) -> None:
    (folder / "tiny-taste.item").write_text("item_id:token\tprice:float\np0\t7\np2\t8\n")
    write(folder / "taste.parquet", ["u0"], [[0.5]], "user_id")
    (folder / "features.toml").write_text(
        FEATURES + '[[pins]]\ncolumn = "price"\n[[users]]\nvectors = "taste.parquet"\n'
    )
    dataset = read_atomic(folder)
    assert fields_of(dataset.described.pins) == ("price", "text_0", "text_1")
    assert [values(dataset, token) for token in ("p0", "p1", "p2")] == [[7, 1, 2], [0, 3, 4], [8, 0, 0]]
    log = action_log(dataset)
    groups = Groups.of(space_of("toy"), log.schema, log.described)
    rows = user_rows(log, groups.user, np.zeros((len(log.pin_ids), 32), np.float16), int(log.time_ms[-1]) + 1)
    assert rows.rows["taste_0"].sum() == 0.5


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float16()), pa.list_(pa.int32())),
        *(pa.large_list(pa.float32()), pa.list_(pa.float32(), 2)),
    ],
    ids=str,
)
def test_every_type_of_lists_of_numbers_is_read(folder: Path, kind: pa.DataType) -> None:
    lists = [[np.float16(1), np.float16(2)]] if pa.types.is_float16(kind.value_type) else [[1, 2]]
    write(folder / "text.parquet", ["p0"], pa.array(lists, kind))
    assert values(read_atomic(folder), "p0") == [1, 2]


@pytest.mark.parametrize(
    "ids",
    [
        *(pa.array([17, 4], pa.int64()), pa.array([17, 4], pa.uint8()), pa.array(["17", "4"], pa.large_string())),
        pa.array(["17", "4"]).dictionary_encode(),
    ],
    ids=lambda ids: str(ids.type),
)
def test_identifiers_may_be_texts_or_whole_numbers(folder: Path, ids: pa.Array) -> None:
    write(folder / "text.parquet", ids, [[1.0], [2.0]])
    assert [values(read_atomic(folder), token) for token in ("17", "4")] == [[1], [2]]


def test_the_only_columns_that_fit_need_no_name_and_others_are_listed_as_unread(folder: Path) -> None:
    columns = {"embedding": [[1.0]], "asin": ["p0"], "made": [0.5], "raw": [b"x"]}
    pq.write_table(pa.table(columns), folder / "text.parquet")
    dataset = read_atomic(folder)
    assert values(dataset, "p0") == [1]
    assert dataset.unread["text.parquet"] == ("made", "raw")


def test_dim_takes_the_first_numbers(folder: Path) -> None:
    write(folder / "text.parquet", ["p0", "p1"], [[float(i) for i in range(500)]] * 2)
    (folder / "features.toml").write_text(FEATURES + "dim = 3\n")
    dataset = read_atomic(folder)
    assert fields_of(dataset.described.pins) == ("text_0", "text_1", "text_2")
    assert values(dataset, "p1") == [0, 1, 2]


def test_vectors_that_are_too_long_are_refused_with_what_to_do(folder: Path) -> None:
    write(folder / "text.parquet", ["p0"], [[1.0] * 384])
    message = "text.parquet has vectors of 384 numbers, and at most 128 become features; reduce them, .* or set dim in"
    with pytest.raises(DatasetError, match=message):
        read_atomic(folder)
    (folder / "features.toml").unlink()
    (proposal,) = proposals(folder)
    assert "# text.parquet has vectors of 384 numbers" in proposal.text
    assert "[[pins]]" not in proposal.text


def test_one_side_has_a_limit_for_words_and_vectors_together(folder: Path) -> None:
    for name in ("text", "image"):
        write(folder / f"{name}.parquet", ["p0"], [[1.0] * 100])
    (folder / "features.toml").write_text(FEATURES + '[[pins]]\nvectors = "image.parquet"\ndim = 28\n')
    assert len(fields_of(read_atomic(folder).described.pins)) == 128
    (folder / "features.toml").write_text(FEATURES + '[[pins]]\nvectors = "image.parquet"\ndim = 29\n')
    with pytest.raises(DatasetError, match="names 0 words and 129 numbers of vectors of items, more than 128 together"):
        read_atomic(folder)


def test_the_bytes_of_vectors_are_part_of_the_datasets_digest(folder: Path) -> None:
    plain = hashlib.sha256((folder / "tiny-taste.inter").read_bytes()).hexdigest()
    first = read_atomic(folder).sha256
    write(folder / "text.parquet", ["p0"], [[1.0, 2.0]])
    assert len({plain, first, read_atomic(folder).sha256}) == 3
    (folder / "features.toml").unlink()
    assert read_atomic(folder).sha256 == plain


def test_a_parquet_file_that_nothing_names_is_told(folder: Path) -> None:
    (folder / "features.toml").write_text('[[pins]]\ncolumn = "price"\n')
    (folder / "tiny-taste.item").write_text("item_id:token\tprice:float\np0\t7\n")
    assert "text.parquet is not used, because features.toml does not name it" in problems(folder)
    code, output = run("data", "check", folder)
    assert code == 0
    assert "warning: text.parquet is not used" in output


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["p0", "p1", "p0"], [[1.0]] * 3, r"row 2 .*: 'p0' has a vector already in row 0; keep one of the two"),
        (["p0", "p1"], [[1.0, 2.0], [1.0]], r"row 1 .*: the vector has 1 numbers, the first one has 2; write vectors"),
        (["p0", "p1"], [[1.0], None], r"row 1 .*: the vector is missing; leave out the row: a missing vector counts"),
        (["p0", "p1"], [None, [1.0]], r"row 0 .*: the vector is missing; leave out the row"),
        (
            ["p0", "p1"],
            [[], [1.0]],
            r"row 0 .*: the vector has 0 numbers; shorten all vectors: vectors have 1 to 4,096",
        ),
        (["p0"], [[0.0] * 4097], r"row 0 .*: the vector has 4,097 numbers; shorten all vectors"),
        (["p0", "p1"], [[1.0], [float("nan")]], r"row 1 .*: the vector holds nan, which is not finite; correct it, or"),
        (["p0", "p1"], [[1.0], [float("inf")]], r"row 1 .*: the vector holds inf, which is not finite"),
        (["p0", "p1"], [[1.0], [1e300]], r"row 1 .*: the vector holds 1e\+300, which is beyond the largest float32"),
        (["p0", "p1"], [[1.0, 1.0], [None, 1.0]], r"row 1 .*: the vector holds a missing number; correct it"),
        (["p0", None], [[1.0], [1.0]], r"row 1 .*: the identifier in column 'item_id' is missing; remove the row"),
        (["p0", "17.0"], [[1.0]] * 2, r"row 1 .*: the identifier '17.0' in column 'item_id' is a whole number written"),
        (["", "p0"], [[1.0]] * 2, r"row 0 .*: the identifier '' in column 'item_id' is empty"),
        (
            [1.0, 2.0],
            [[1.0]] * 2,
            r"no column holds identifiers .*; name the one that does item_id. The columns are it",
        ),
        (["p0"], ["1 2"], r"no column holds vectors \(lists of numbers\); name the one that does vector"),
        (["p0"], [["a"]], r"no column holds vectors"),
        (
            pa.array([], pa.string()),
            pa.array([], pa.list_(pa.float32())),
            "has no rows; write a vector for each item_id",
        ),
        (["17", "017"], [[1.0]] * 2, "text.parquet: item identifiers '17' and '017' have the same id"),
    ],
)
def test_vectors_that_cannot_be_meant_are_refused(folder: Path, ids: Any, vectors: Any, message: str) -> None:
    write(folder / "text.parquet", ids, vectors)
    with pytest.raises(DatasetError, match=message) as refused:
        read_atomic(folder)
    assert "text.parquet" in str(refused.value)


def test_the_row_of_a_fault_is_counted_over_all_batches(folder: Path) -> None:
    vectors = [[1.0]] * 20_000
    vectors[17_001] = [float("nan")]
    write(folder / "text.parquet", list(range(20_000)), vectors)
    with pytest.raises(DatasetError, match=r"text.parquet, row 17001 \(the first is 0\): the vector holds nan"):
        read_atomic(folder)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ('[[pins]]\nvectors = "lost.parquet"\n', DatasetError, "reads the vectors lost.parquet, but .* does not exist"),
        (
            '[[pins]]\nvectors = "tiny-taste.inter"\n',
            DatasetError,
            "tiny-taste.inter cannot be read as a Parquet file: ",
        ),
        (
            '[[pins]]\nvectors = "part.parquet"\n',
            DatasetError,
            "part.parquet is a folder; write its Parquet files as one",
        ),
        (
            FEATURES + "dim = 3\n",
            DatasetError,
            "has vectors of 2 numbers, fewer than dim = 3 of features.toml; leave out",
        ),
        (
            '[[users]]\nvectors = "text.parquet"\n',
            DatasetError,
            "no column holds identifiers .*name the one .* user_id",
        ),
        ('[[pins]]\nvectors = "../text.parquet"\n', SettingError, "is no name of a file beside the data; put it there"),
        (FEATURES + "dim = 129\n", SettingError, "dim: Input should be less than or equal to 128"),
        (FEATURES + "dim = 0\n", SettingError, "dim: Input should be greater than or equal to 1"),
        (FEATURES + 'words = ["a"]\n', SettingError, "words: Extra inputs are not permitted"),
        (FEATURES * 2, SettingError, "pins: a file of vectors is named twice"),
    ],
)
def test_what_features_toml_cannot_mean_is_refused(
    folder: Path, features: str, error: type[Exception], message: str
) -> None:
    (folder / "part.parquet").mkdir()
    (folder / "features.toml").write_text(features)
    with pytest.raises(error, match=message):
        read_atomic(folder)


def test_a_file_that_is_cut_off_is_named(folder: Path) -> None:
    path = folder / "text.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"text.parquet cannot be read as a Parquet file: .*; write it again"):
        read_atomic(folder)


def test_several_columns_that_fit_are_ambiguous(folder: Path) -> None:
    columns = {"sku": ["p0"], "asin": ["p0"], "title": [[1.0]], "image": [[2.0]]}
    pq.write_table(pa.table(columns), folder / "text.parquet")
    with pytest.raises(
        DatasetError, match=r"several columns could hold identifiers .*; name the one that does item_id"
    ):
        read_atomic(folder)
    pq.write_table(pa.table(columns).rename_columns(["sku", "item_id", "title", "image"]), folder / "text.parquet")
    with pytest.raises(
        DatasetError, match=r"several .* vectors .* does vector. The columns are sku \(string\), item_id"
    ):
        read_atomic(folder)


def test_vectors_of_other_identifiers_are_told(folder: Path) -> None:
    write(folder / "text.parquet", ["song/1"], [[1.0]])
    assert "text.parquet has no item of the interactions: it has 'song/1', they have 'p" in problems(folder)


def test_long_file_names_give_fields_of_their_own() -> None:
    names = fields_of(
        [Vectors(vectors=f"{'long-name-' * 5}{end}.parquet", dim=30) for end in "ab"]
        + [Vectors(vectors="7 ü.parquet", dim=2)]
    )
    assert len(set(names)) == len(names) == 62
    assert all(len(name) <= 40 for name in names)
    assert names[-1] == "own_7_1"


# What is proposed.


def test_check_proposes_the_vectors_that_it_finds(folder: Path) -> None:
    (folder / "features.toml").unlink()
    write(folder / "image.parquet", ["p3", "p4"], [[float(i) for i in range(50)]] * 2, "sku")
    write(folder / "taste.parquet", ["u3"], [[1.0]], "id")
    write(folder / "both.parquet", ["u3", "p3"], [[1.0]] * 2, "id")
    write(folder / "none.parquet", ["x"], [[1.0]], "id")
    pq.write_table(pa.table({"id": ["p0"], "a": [[1.0]], "b": [[1.0]]}), folder / "unclear.parquet")
    (folder / "broken.parquet").write_text("no")
    code, output = run("data", "check", folder)
    assert code == 0
    assert "text.parquet is not used, because features.toml does not name it" in output
    code, output = run("data", "check", folder, "--propose")
    assert code == 0
    proposed = read_described(folder / "features.toml")
    assert proposed == Described(
        pins=(Vectors(vectors="image.parquet"), Vectors(vectors="text.parquet")),
        users=(Vectors(vectors="taste.parquet"),),
    )
    text = (folder / "features.toml").read_text()
    assert "# of 50 numbers" in text
    for reason in (
        "# both.parquet: its identifiers are those of both pins and users; name their column item_id or user_id",
        "# none.parquet: its identifiers are those of neither pins nor users",
        "# unclear.parquet: several columns could hold vectors",
        "# broken.parquet cannot be read as a Parquet file",
    ):
        assert reason in text
    assert proposals(folder) == []
    assert "both.parquet is not used" in output


def test_no_more_vectors_are_proposed_than_a_side_may_have(folder: Path) -> None:
    (folder / "features.toml").unlink()
    for number in range(5):
        write(folder / f"{number}.parquet", ["p3"], [[1.0] * 32])
    (proposal,) = proposals(folder)
    assert proposal.text.count("vectors = ") == 4
    assert "# 4.parquet: with it, pins would have more than 128 numbers of vectors" in proposal.text
