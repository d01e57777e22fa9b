"""The join reads only what it needs of a log's files, and gives what it gives from all of them."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impressions.dataset import JoinError, read_manifest
from impressions.errors import LogError
from impressions.joining.join import Wanted, join_log
from impressions.joining.records import Span
from impressions.reading import Selection, log_files, read_tables
from tests.impressions.log_files import write_file
from tests.impressions.logs import action, impression, log_of, seen
from tests.impressions.random_logs import BASE_MS, WINDOW, Log, content
from tests.impressions.random_logs import logs as random_logs


def spoil(path: Path, group: int, column: str) -> None:
    """Overwrite one column of a row group."""
    found = pq.read_metadata(path).row_group(group)
    (chunk,) = (found.column(i) for i in range(found.num_columns) if found.column(i).path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * chunk.total_compressed_size)


def result(read, folder: Path, wanted: Wanted) -> dict[str, bytes] | str:
    try:
        join_log(read, folder, wanted)
    except JoinError as error:
        return str(error)
    return content(folder)


@settings(max_examples=80, deadline=None)
@given(random_logs(), st.tuples(st.integers(0, 3_000), st.integers(1, 1_000)), st.booleans())
def test_a_join_of_a_span_gives_the_same_bytes_from_a_part_of_the_files(tmp_path_factory, log: Log, span, endless):
    folder = tmp_path_factory.mktemp("log")
    half = len(log.impressions) // 2
    for number, rows in enumerate((log.impressions[:half], log.impressions[half:])):
        write_file(folder, "impressions", sorted(rows, key=lambda row: row["time_ms"]), number)
    write_file(folder, "actions", log.actions)
    write_file(folder, "seen", log.seen)
    since_ms = BASE_MS + span[0]
    wanted = Wanted(WINDOW, Span(since_ms, None if endless else since_ms + span[1]))
    from_files = result(lambda table, needed: read_tables(str(folder), table, wanted=needed), folder / "a", wanted)
    from_memory = result(log_of(log.impressions, log.actions, log.seen), folder / "b", wanted)
    assert from_files == from_memory


@pytest.fixture
def long_log(tmp_path: Path) -> Path:
    """Return a log of 12 requests, ten seconds apart, in two files of three row groups each."""
    rows = [impression(n, BASE_MS + 10_000 * n, 7, [10 + n, 11, 12]) for n in range(1, 13)]
    write_file(tmp_path, "impressions", rows[:6], 1)
    write_file(tmp_path, "impressions", rows[6:], 2)
    write_file(tmp_path, "actions", [action(n, 7, 11, BASE_MS + 10_000 * n + 500, request_id=n) for n in range(1, 13)])
    write_file(tmp_path, "seen", [seen(n, 1) for n in range(1, 13, 2)])
    return tmp_path


def join(log: Path, out: Path, first: int, last: int) -> None:
    span = Span(BASE_MS + 10_000 * first, BASE_MS + 10_000 * last + 1)
    join_log(lambda table, needed: read_tables(str(log), table, wanted=needed), out, Wanted(WINDOW, span))


def test_row_groups_out_of_the_span_are_not_read_beyond_ids_users_and_times(long_log):
    join(long_log, long_log / "whole", 7, 10)
    before = content(long_log / "whole")
    first, second = sorted(long_log.glob("impressions/*/*.parquet"))
    for path, group in ((first, 0), (first, 1), (first, 2), (second, 2)):
        for column in ("probabilities.list.element", "pin_ids.list.element", "surface"):
            spoil(path, group, column)
    join(long_log, long_log / "again", 7, 10)
    assert content(long_log / "again") == before
    assert read_manifest(long_log / "again").counts.requests == 4
    with pytest.raises(LogError, match=f"{second}: the file is damaged"):
        join(long_log, long_log / "again", 7, 11)
    assert content(long_log / "again") == before


def test_actions_on_requests_out_of_the_span_are_told_apart_from_those_on_unknown_ones(long_log):
    stray = [action(event, 7, 11, BASE_MS + 80_000, request_id=named) for event, named in ((98, 1), (99, 99))]
    write_file(long_log, "actions", stray, 2)
    join(long_log, long_log / "joined", 8, 8)
    assert read_manifest(long_log / "joined").counts.unattributed == {"no_such_request": 1, "not_selected": 1}


def test_a_row_out_of_the_span_that_contradicts_one_within_is_read(tmp_path):
    within = impression(1, BASE_MS, 7, [10, 11])
    beyond = impression(1, BASE_MS + 900_000, 7, [10, 11], utilities=[math.nan, 1.0])
    rows = [within, impression(2, BASE_MS + 1, 7, [10]), beyond, impression(3, BASE_MS + 900_000, 7, [10])]
    write_file(tmp_path, "impressions", rows)
    wanted = Wanted(WINDOW, Span(BASE_MS, BASE_MS + 100))
    found = result(lambda table, needed: read_tables(str(tmp_path), table, wanted=needed), tmp_path / "a", wanted)
    assert found == result(log_of(rows), tmp_path / "b", wanted)
    assert read_manifest(tmp_path / "a").counts.left_out == {"scores that are not finite": 1}


def test_files_of_many_row_groups_are_read_in_parts_and_as_a_whole(tmp_path):
    rows = [impression(n, BASE_MS + n, 7, [10, 11], heads=["save", f"head{n % 3}"]) for n in range(1, 5_001)]
    write_file(tmp_path, "impressions", rows, group_rows=512)
    (file,) = log_files(str(tmp_path), "impressions")
    assert file.rows().num_rows == 5_000
    parts = list(file.parts(Selection(since_ms=BASE_MS + 600, until_ms=BASE_MS + 5_100)))
    assert [part.num_rows for part in parts] == [4_096, 5_000 - 512 - 4_096]
    assert parts[0]["heads"].to_pylist()[0] == ["save", "head0"]
    ids = partial(read_tables, str(tmp_path), "impressions", wanted=Selection(("request_id",)))
    assert [name for part in ids() for name in part.column_names] == ["request_id"] * 2
    assert [one for part in ids() for one in part["request_id"].to_pylist()] == list(range(1, 5_001))
