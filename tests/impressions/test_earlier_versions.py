"""Files and segments of earlier versions of a table, which this version reads."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from impressions.archive import write_parquet
from impressions.inspection.check import check_log
from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from impressions.places import file_of, new_stem, open_place
from impressions.reading import Selection, read_tables
from impressions.schema import EARLIER, FINGERPRINT_KEY, TABLES, as_today, fingerprint
from impressions.segments import Segment
from tests.impressions.log_files import finish, opened, parquet, write_file
from tests.impressions.logs import Row, impression, seen, table
from tests.impressions.random_logs import seen_of

BASE_MS = 1_700_000_000_000
(OLDER,) = EARLIER["seen"]


def older(*rows: Row) -> pa.Table:
    """Rows as the version before user_id wrote them."""
    return pa.Table.from_pylist([{name: row[name] for name in OLDER.names} for row in rows], OLDER)


def write_older(folder: Path, *rows: Row) -> Path:
    path = folder / file_of(new_stem("seen", 1))
    path.parent.mkdir(parents=True)
    write_parquet(older(*rows), str(path), open_place(str(folder)).files)
    return path


def write_older_segment(folder: Path, *rows: Row) -> None:
    """Write a segment as a server of that version leaves it that is killed."""
    (folder / "spool").mkdir(parents=True)
    segment = Segment(folder / "spool", new_stem("seen", 1), OLDER)
    segment.append(older(*rows).combine_chunks().to_batches()[0])
    segment.close()


def rows_of(folder: Path, *columns: str) -> list[Row]:
    wanted = Selection(columns or None)
    return [row for part in read_tables(str(folder), "seen", wanted=wanted) for row in part.to_pylist()]


def test_the_earlier_version_of_seen_is_the_one_that_was_released():
    assert fingerprint(OLDER) == "164a47fd443c64ef"
    assert OLDER.names == TABLES["seen"].names[:3]


def test_a_file_without_users_is_read_beside_those_with_users(tmp_path):
    path = write_older(tmp_path, seen(1, 0, 2), seen(2, 1))
    assert pq.read_schema(path).metadata[FINGERPRINT_KEY].decode() == fingerprint(OLDER)
    write_file(tmp_path, "seen", [seen(3, 1, user_id=7)])
    found = rows_of(tmp_path)
    assert sorted(found, key=lambda row: row["request_id"]) == [seen(1, 0, 2), seen(2, 1), seen(3, 1, user_id=7)]


def test_wanted_columns_of_an_earlier_file_come_in_the_order_of_the_table(tmp_path):
    write_older(tmp_path, seen(1, 0, 2))
    assert [list(row.items()) for row in rows_of(tmp_path, "request_id", "user_id")] == [
        [("request_id", 1), ("user_id", None)]
    ]
    assert rows_of(tmp_path, "request_id") == [{"request_id": 1}]


def test_a_segment_of_a_killed_server_of_the_earlier_version_is_read_before_and_after_it_is_a_file(tmp_path):
    write_older_segment(tmp_path, seen(1, 0), seen(2, 1))
    assert rows_of(tmp_path) == [seen(1, 0), seen(2, 1)]
    finish(opened(tmp_path))
    (path,) = parquet(tmp_path)
    assert pq.read_schema(path).metadata[FINGERPRINT_KEY].decode() == fingerprint(OLDER)
    assert rows_of(tmp_path) == [seen(1, 0), seen(2, 1)]


def test_a_log_of_both_versions_is_joined_and_checked(tmp_path):
    folder = tmp_path / "log"
    write_file(folder, "impressions", [impression(n, BASE_MS, 7, [10, 11]) for n in (1, 2, 3)])
    write_older(folder, seen(1, 0))
    write_file(folder, "seen", [seen(2, 1, user_id=7), seen(3, 1, user_id=8)])
    joined = join_log(
        lambda name, needed: read_tables(str(folder), name, wanted=needed), tmp_path / "out", Wanted(Window(1_000, 0))
    )
    assert seen_of(tmp_path / "out") == {1: [True, False], 2: [False, True], 3: [True, True]}
    assert joined.manifest.counts.seen_of_other_users == 1
    problems = [one.field for one in check_log(str(folder), BASE_MS) if one.field in {"user_id", "positions", ""}]
    assert problems == ["user_id"]


@pytest.mark.parametrize("name", list(TABLES))
def test_rows_of_today_stay_as_they_are(name):
    rows = {"seen": [seen(1, 2, user_id=3)]}.get(name, [])
    assert as_today(table(name, rows), name).equals(table(name, rows))
