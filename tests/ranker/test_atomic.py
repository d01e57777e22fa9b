from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from ranker.atomic import distinct_ids, read_atomic, token_id
from ranker.errors import DatasetError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def dataset_at(folder: Path, inter: str, item: str | None = None) -> Path:
    (folder / "toy.inter").write_text(inter)
    if item is not None:
        (folder / "toy.item").write_text(item)
    return folder


def test_columns_are_read_in_order_of_time_and_ties_keep_file_order(tmp_path: Path) -> None:
    folder = dataset_at(tmp_path, INTER + "7\t30\t4.5\t2\n8\t31\t1\t1.5\n7\t32\t5\t1.5\n")
    dataset = read_atomic(folder)
    assert dataset.name == "toy"
    assert dataset.users.tolist() == [8, 7, 7]
    assert dataset.users.dtype == dataset.pins.dtype == np.uint64
    assert dataset.pins.tolist() == [31, 32, 30]
    assert dataset.labels[:, 0].tolist() == [False, True, False]
    assert dataset.time_ms.tolist() == [1500, 1500, 2000]
    assert dataset.sha256 == hashlib.sha256((folder / "toy.inter").read_bytes()).hexdigest()


def test_quotes_are_plain_characters_and_titles_come_from_the_item_file(tmp_path: Path) -> None:
    folder = dataset_at(
        tmp_path,
        INTER + 'u\t"Quoted\t3\t1\nu\t5\t3\t2\n',
        'item_id:token\tgenre:token\tmovie_title:token_seq\n"Quoted\tDrama\tA "fine" film\n6\tDrama\tUnseen\n',
    )
    dataset = read_atomic(folder)
    assert dataset.titles == {token_id('"Quoted'): 'A "fine" film', 6: "Unseen", 5: "5"}
    assert dataset.tokens[token_id('"Quoted')] == '"Quoted'


def test_an_item_file_without_titles_and_no_item_file_give_the_tokens(tmp_path: Path) -> None:
    folder = dataset_at(tmp_path, INTER + "u\tp\t3\t1\n", "item_id:token\tyear:float\np\t1999\n")
    assert read_atomic(folder).titles == {token_id("p"): "p"}
    (folder / "toy.item").unlink()
    assert read_atomic(folder).titles == {token_id("p"): "p"}


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("0", 0),
        ("42", 42),
        ("9223372036854775807", 9223372036854775807),
        ("-3", None),
        ("4.5", None),
        ("\u0664", None),  # a digit, but not an ASCII one
        ("99999999999999999999", None),  # more than 64 bits
        ("Toy Story (1995)", None),
    ],
)
def test_decimal_tokens_keep_their_value_and_others_are_hashed_into_63_bits(token: str, expected: int | None) -> None:
    if expected is not None:
        assert token_id(token) == expected
    else:
        digest = hashlib.blake2b(token.encode(), digest_size=8).digest()
        assert token_id(token) == int.from_bytes(digest, "big") % 2**63


def test_tokens_that_share_an_id_are_refused_by_name() -> None:
    with pytest.raises(DatasetError, match=r"user identifiers '7' and '07' have the same id"):
        distinct_ids(["7", "x", "07"], "user")


def test_an_item_file_cannot_reuse_an_id_of_the_interactions(tmp_path: Path) -> None:
    folder = dataset_at(tmp_path, INTER + "u\t7\t3\t1\n", "item_id:token\n07\n")
    with pytest.raises(DatasetError, match="'07' and '7' have the same id"):
        read_atomic(folder)


@pytest.mark.parametrize(
    ("inter", "message"),
    [
        ("user_id:token\titem_id:token\n1\t2\n", r"no column 'timestamp'; it has user_id, item_id"),
        (
            "user_id:token\tpin:token\ttimestamp:float\n1\t2\t3\n",
            r"no column 'item_id'; it has user_id, pin, timestamp",
        ),
        ("user_id\titem_id:token\ttimestamp:float\n1\t2\t3\n", r"must name each column as name:type"),
        ("user_id:token\titem_id:token\ttimestamp:token\n1\t2\t3\n", r"must be declared timestamp:float"),
        (INTER + "1\t2\t\t4\n", r"line 2: column 'rating' is empty or no number"),
        (INTER + "1\t2\tgood\t4\n", r"cannot read .*toy.inter"),
        (INTER + "1\t2\t3\n", r"cannot read .*toy.inter"),
    ],
)
def test_unreadable_files_are_refused_with_what_is_wrong(tmp_path: Path, inter: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_atomic(dataset_at(tmp_path, inter))


def test_a_folder_must_hold_exactly_one_interaction_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no dataset folder at"):
        read_atomic(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"exactly one NAME\.inter file; it holds nothing"):
        read_atomic(tmp_path)
    for name in ("a.inter", "b.inter"):
        (tmp_path / name).write_text(INTER)
    with pytest.raises(DatasetError, match=r"it holds a.inter, b.inter"):
        read_atomic(tmp_path)
