"""Shared by tests of the log: logs in folders, written and read on the test's own thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from impressions.archive import Archive, ClockSteps
from impressions.places import file_of, new_stem, open_place
from impressions.reading import read_tables
from impressions.schema import FINGERPRINT_KEY, IMPRESSIONS, TABLES, fingerprint
from impressions.segments import Segment
from impressions.writing.log import ImpressionLog, LogSettings
from tests.impressions import logs


def opened(folder: Path | str, **settings) -> ImpressionLog:
    where = folder if isinstance(folder, str) else f"file://{folder}"
    return ImpressionLog(LogSettings(where, **settings))


def archive_of(log: ImpressionLog) -> Archive:
    """Return what the log's process runs, for this process."""
    settings = log._settings
    return Archive(
        open_place(settings.to), log._spool, settings.retention_days, ClockSteps(log.archive._settings.clock_offset_s)
    )


def finish(log: ImpressionLog) -> None:
    """Write and archive all, on this thread."""
    log.close()
    log.write()
    archive_of(log).look()


def ids(folder: Path | str, table: str = "impressions") -> list[int]:
    return [one for part in read_tables(str(folder), table) for one in part["request_id"].to_pylist()]


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def parquet(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.parquet"))


def write_segment(folder: Path, count: int = 4, first: int = 1, per_batch: int = 1) -> Path:
    """Write a segment as a process leaves it that is killed between two batches."""
    spool = folder / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    segment = Segment(spool, new_stem("impressions", first), IMPRESSIONS)
    for start in range(first, first + count, per_batch):
        rows = [logs.impression(i, 1_000 + i, 7, [1, 2, 3]) for i in range(start, start + per_batch)]
        segment.append(logs.table("impressions", rows).combine_chunks().to_batches()[0])
    segment.close()
    return segment.path


def write_file(folder: Path, table: str, rows: Sequence[logs.Row], number: int = 0, group_rows: int = 2) -> Path:
    """Write a file of a log, with several row groups."""
    path = folder / file_of(f"{table}-2023-11-14-000000-host-1-0-{number}")
    path.parent.mkdir(parents=True, exist_ok=True)
    marked = logs.table(table, rows).replace_schema_metadata({FINGERPRINT_KEY: fingerprint(TABLES[table])})
    pq.write_table(marked, path, row_group_size=group_rows)
    return path
