from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from ranker.data.atomic.identifiers import distinct_ids, token_id
from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.errors import DatasetError
from tests.ranker.recbole_files import Files, compared, files

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
        pytest.param("\u0664", None, id="a digit that is not ASCII"),
        pytest.param("99999999999999999999", None, id="more than 64 bits"),
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
    with pytest.raises(DatasetError, match="'7' and '07' have the same id"):
        read_atomic(folder)


@pytest.mark.parametrize(
    ("inter", "message"),
    [
        (
            "user_id:token\titem_id:token\n1\t2\n",
            r"line 1: there is no column 'timestamp'; the columns are user_id, item_id",
        ),
        (
            "user_id:token\tpin:token\ttimestamp:float\n1\t2\t3\n",
            r"line 1: there is no column 'item_id'; the columns are user_id, pin, timestamp",
        ),
        ("user_id\titem_id:token\ttimestamp:float\n1\t2\t3\n", r"name:type with .*; column 1 is 'user_id'"),
        (INTER.replace("rating:float", "rating:int") + "1\t2\t3\t4\n", r"line 1: .*; column 3 is 'rating:int'"),
        (INTER.replace("rating:float", "rating:float ") + "1\t2\t3\t4\n", r"line 1: .*; column 3 is 'rating:float '"),
        (INTER.replace("\n", "\t\n") + "1\t2\t3\t4\t\n", r"line 1: .*; column 5 is ''"),
        (
            "user_id:token\titem_id:token\ttimestamp:float\tdwell:float\tdwell:float\tsaved:float\n1\t2\t3\t4\t5\t0\n",
            r"line 1: columns 4 and 5 are both named 'dwell'; remove or rename one",
        ),
        ("user_id:token\titem_id:token\ttimestamp:token\n1\t2\t3\n", r"line 1: .* must be declared timestamp:float"),
        ("user_id:float\titem_id:token\ttimestamp:float\n1\t2\t3\n", r"line 1: .* must be declared user_id:token"),
        ("", "line 1: there is no header; it must name each column as name:type"),
        ("\n" + INTER, "line 1: there is no header"),
        (INTER + "1\t2\t\t4\n", r"line 2: column 'rating' holds '': it is not a number"),
        (INTER + "1\t2\tgood\t4\n", r"line 2: column 'rating' holds 'good': it is not a number"),
        (INTER + "1\t2\t1,5\t4\n", r"line 2: column 'rating' holds '1,5': it is not a number"),
        (INTER + "1\t2\tnan\t4\n", r"line 2: column 'rating' holds 'nan': it is not a number"),
        (INTER + "1\t2\t1\t1e400\n", r"line 2: column 'timestamp' holds '1e400': it is not a number"),
        pytest.param(
            INTER + "\n\r\n1\t2\t3\t4\n\n1\t2\tgood\t4\n",
            r"line 6: column 'rating' holds 'good'",
            id="lines are counted as an editor counts them",
        ),
        (INTER + "\n1\t2\t3\n", r"line 3: 3 fields, but the header names 4 columns$"),
        (
            INTER + "1\t2\t3\t4\t\n",
            r"line 2: 5 fields, but the header names 4 columns; remove the tab at the end of the line",
        ),
        (INTER + "1\t2\t3\t4\n" + INTER, r"line 3: column 'timestamp' holds 'timestamp:float'"),
        (INTER + "\t2\t3\t4\n", r"line 2: column 'user_id' holds '': the identifier is empty"),
        (INTER + "1\t2 \t3\t4\n", r"line 2: column 'item_id' holds '2 ': the identifier starts or ends with a blank"),
        (
            INTER + "1\t2\u00a0\t3\t4\n",
            r"line 2: column 'item_id' holds '2\\xa0': the identifier starts or ends with a blank",
        ),
        (INTER + "1\t2\t3\t4\n1.0\t2\t3\t4\n", r"line 3: column 'user_id' holds '1.0': .* a decimal; write 1$"),
        (INTER + "1.7E+09\t2\t3\t4\n", r"line 2: column 'user_id' holds '1.7E\+09': .* a spreadsheet has shortened"),
        (INTER + "1,234\t2\t3\t4\n", r"line 2: column 'user_id' holds '1,234': .* thousands separators; write 1234"),
        (INTER + "1\t2\t3\t1700000000000\n", r"line 2: .* looks like milliseconds; divide by 1,000$"),
        (INTER + "1\t2\t3\t1700000000000000\n", r"line 2: .* looks like microseconds; divide by 1,000,000$"),
        (INTER + "1\t2\t3\t1700000000000000000\n", r"line 2: .* looks like nanoseconds; divide by 1,000,000,000$"),
        (INTER + "1\t2\t3\t4\n1\t2\t3\t-1\n", r"line 3: column 'timestamp' holds '-1': .* it lies before 1970"),
        (INTER + "1\t2\t3\t1e10\n", r"line 2: column 'timestamp' holds '1e10': .* it lies after the year 2200"),
        (INTER + "1\t2\t10\t4\n", r"line 2: column 'rating' holds '10': .* a scale from 1 to 5 .* in actions.toml"),
        (INTER + "1\t2\t-1\t4\n", r"line 2: column 'rating' holds '-1': .* a scale from 1 to 5"),
        (INTER + "1\t2\0\t3\t4\n", r"line 2: the file contains a NUL byte"),
        (INTER + "1\t2\t3\t4\n\ufeff1\t2\t3\t4\n", r"line 3: there is a byte order mark inside the file"),
        (INTER.replace("\n", "\r") + "1\t2\t3\t4\r", r"line 1: there is a carriage return within a line"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_its_line_and_column(
    tmp_path: Path, inter: str, message: str
) -> None:
    with pytest.raises(DatasetError, match=r"toy\.inter, " + ("" if message.startswith("line") else ".*") + message):
        read_atomic(dataset_at(tmp_path, inter))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (INTER.encode() + b"1\t2\t3\t4\n\xe9\t2\t3\t4\n", r"line 3: the file is not UTF-8 text here; save it as UTF-8"),
        (INTER.encode("utf-16"), "line 1: the file is UTF-16; save it as UTF-8"),
        (gzip.compress(INTER.encode(), mtime=0), r"toy.inter is compressed; decompress it"),
    ],
)
def test_bytes_that_are_no_plain_text_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "toy.inter").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_atomic(tmp_path)


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    rows = "1\t2\t3\t4.5\n1\t3\t 5 \t+5\n"
    plain = read_atomic(dataset_at(tmp_path, INTER + rows, "item_id:token\tname:token\n2\tTwo\n"))
    exported = "\ufeff" + (INTER + "\n" + rows + "\n\n").replace("\n", "\r\n")
    other = read_atomic(dataset_at(tmp_path, exported, "\ufeffitem_id:token\tname:token\r\n\r\n2\tTwo"))
    assert (plain.users.tolist(), plain.pins.tolist(), plain.time_ms.tolist()) == ([1, 1], [2, 3], [4500, 5000])
    for name in ("users", "pins", "time_ms", "labels"):
        assert np.array_equal(getattr(plain, name), getattr(other, name))
    assert plain.titles == other.titles == {2: "Two", 3: "3"}
    assert plain.problems == ()
    assert [problem.what for problem in other.problems] == [
        "toy.inter: 1 blank lines were skipped, the first of them line 2",
        "toy.item: 1 blank lines were skipped, the first of them line 2",
    ]


def test_columns_that_nothing_reads_may_hold_anything_and_are_named(tmp_path: Path) -> None:
    inter = "user_id:token\tdwell:float\titem_id:token\ttimestamp:float\nu\t-\tp\t1\n"
    dataset = read_atomic(
        dataset_at(tmp_path, inter, "item_id:token\tyear:float\ttitle:token\np\t-\tPin\nq\t1999\t \n")
    )
    assert dataset.titles == {token_id("p"): "Pin", token_id("q"): "q"}
    assert dataset.unread == {"toy.inter": ("dwell",), "toy.item": ("year",)}


def test_an_item_that_is_listed_twice_keeps_its_first_title_and_is_named(tmp_path: Path) -> None:
    items = "item_id:token\ttitle:token\np\tFirst\n\nq\tQ\np\tSecond\np\tThird\n"
    dataset = read_atomic(dataset_at(tmp_path, INTER + "u\tp\t3\t1\n", items))
    assert dataset.titles == {token_id("p"): "First", token_id("q"): "Q"}
    assert (
        "toy.item: 1 items are listed more than once, such as 'p' on lines 2 and 5; the first line of each item counts"
        in [problem.what for problem in dataset.problems]
    )


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("item_id:token\ttitle:token\tyear:float\np\tPin\n", r"toy.item, line 2: 2 fields, but the header names 3"),
        ("item_id:token\ttitle:token\tx:float\tx:float\np\tPin\t1\t2\n", r"toy.item, line 1: columns 3 and 4 are both"),
        ("title:token\nPin\n", r"toy.item, line 1: there is no column 'item_id'"),
        ("item_id:token\n1.0\n", r"toy.item, line 2: column 'item_id' holds '1.0': .* write 1$"),
        ("item_id:float\n1\n", r"toy.item, line 1: column 'item_id' must be declared item_id:token"),
    ],
)
def test_an_item_file_that_cannot_be_understood_is_refused(tmp_path: Path, items: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_atomic(dataset_at(tmp_path, INTER + "u\tp\t3\t1\n", items))


@pytest.mark.parametrize(
    ("rows", "items", "message"),
    [
        (
            "nan\tp\t3\t1\nu\tp\t3\t2\nnan\tq\t3\t3\n",
            None,
            "toy.inter: 2 lines have user_id 'nan', the first of them line 2",
        ),
        (
            'u\t"p"\t3\t1\nu\t"q"\t3\t2\n',
            None,
            "toy.inter: every item_id is in quotes, and the quotes are part of the identifier",
        ),
        ("u\tp1\t3\t1\n", "item_id:token\n1\n", "toy.item has no item of the interactions: it has '1', they have 'p1'"),
    ],
)
def test_suspicious_identifiers_are_read_and_named(tmp_path: Path, rows: str, items: str | None, message: str) -> None:
    (problem,) = read_atomic(dataset_at(tmp_path, INTER + rows, items)).problems
    assert problem.what.startswith(message)


def test_a_line_of_many_megabytes_is_refused_or_read_whole(tmp_path: Path) -> None:
    long = "x" * (3 << 20)
    with pytest.raises(DatasetError, match=r"line 2: column 'rating' holds 'x{80}'... \(3,145,728 characters\): it is"):
        read_atomic(dataset_at(tmp_path, INTER + f"u\tp\t{long}\t1\n"))
    assert set(read_atomic(dataset_at(tmp_path, INTER + f"u\t{long}\t3\t1\n")).tokens.values()) == {long}


def test_a_file_of_many_blocks_is_read_in_order_and_keeps_its_line_numbers(tmp_path: Path) -> None:
    def read() -> AtomicDataset:
        return read_atomic(dataset_at(tmp_path, INTER + "\n\n".join(rows) + "\n"), block_bytes=256)

    rows = [f"u{row % 7}\tp{row % 11}\t{1 + row % 5}\t{row}" for row in range(2_000)]
    dataset = read()
    assert dataset.time_ms.tolist() == [1000 * row for row in range(2_000)]
    assert [dataset.tokens[pin] for pin in dataset.pins.tolist()] == [f"p{row % 11}" for row in range(2_000)]
    rows[1_500] = "u\tp\tx\t1"
    with pytest.raises(DatasetError, match=r"line 3002: column 'rating' holds 'x'"):
        read()
    rows[1_500] = "u\tp"
    with pytest.raises(DatasetError, match=r"line 3002: 2 fields, but the header names 4 columns"):
        read()


@settings(max_examples=500, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=files())
def test_five_hundred_invented_datasets_are_read_as_a_slow_reader_reads_them_or_refused(
    drawn: Files, tmp_path_factory: pytest.TempPathFactory
) -> None:
    compared(tmp_path_factory.getbasetemp(), drawn)


def test_a_folder_must_hold_exactly_one_interaction_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no dataset folder"):
        read_atomic(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"exactly one NAME\.inter file, but contains nothing"):
        read_atomic(tmp_path)
    (tmp_path / "toy.inter.gz").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"but contains toy.inter.gz; unpack toy.inter.gz"):
        read_atomic(tmp_path)
    for name in ("a.inter", "b.inter"):
        (tmp_path / name).write_text(INTER)
    with pytest.raises(DatasetError, match=r"but contains a.inter, b.inter"):
        read_atomic(tmp_path)
