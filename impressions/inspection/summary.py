"""What a log holds: rows, requests, users, days, surfaces, models, what was explored, and how many bytes that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from impressions.reading import LogFile, Selection, log_files, set_aside
from impressions.schema import TABLES

_MS_PER_DAY = 86_400_000
#: The columns of each table that are read; the first is the server's clock.
_COUNTED = {
    "impressions": ("time_ms", "user_id", "surface", "model", "arm", "pin_ids"),
    "actions": ("received_ms",),
    "seen": ("received_ms",),
}


@dataclass(slots=True)
class TableSummary:
    """One table of a log; times are Unix milliseconds, None without rows."""

    rows: int = 0
    files: int = 0
    segments: int = 0
    bytes: int = 0
    segment_bytes: int = 0
    oldest_ms: int | None = None
    newest_ms: int | None = None


@dataclass(slots=True)
class LogSummary:
    """A whole log.

    Attributes:
        tables: by name.
        pins: how many pins the answers returned.
        users: how many users got answers.
        days: answers by day, YYYY-MM-DD in UTC.
        surfaces: answers by surface.
        models: answers by "name@version".
        explored: answers that an arm of an explorer ordered.
        set_aside: segments that could not be read to their end.
    """

    tables: dict[str, TableSummary] = field(default_factory=lambda: {name: TableSummary() for name in TABLES})
    pins: int = 0
    users: int = 0
    days: Counter[str] = field(default_factory=Counter)
    surfaces: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    explored: int = 0
    set_aside: int = 0

    @property
    def requests(self) -> int:
        return self.tables["impressions"].rows


def summarize(where: str, spools: Sequence[Path] = ()) -> LogSummary:
    """Read a whole log and the segments in other spool folders, file by file. Holds 8 bytes for each user.

    Raises:
        LogError: there is no log, a spool folder is none, or a file is damaged or has another fingerprint; the message
            names it.
    """
    summary, users = LogSummary(set_aside=len(set_aside(where, spools))), np.array([], np.uint64)
    for name in TABLES:
        for file in log_files(where, name, spools):
            _count_file(summary.tables[name], file)
            found = [users]
            for rows in file.parts(Selection(_COUNTED[name])):
                _count(summary.tables[name], rows, _COUNTED[name][0])
                if name == "impressions" and rows.num_rows:
                    found.append(rows["user_id"].to_numpy())
                    _count_answers(summary, rows)
            users = np.unique(np.concatenate(found))
    summary.users = len(users)
    return summary


def _count_file(table: TableSummary, file: LogFile) -> None:
    if file.segment:
        table.segments += 1
        table.segment_bytes += file.bytes
    else:
        table.files += 1
        table.bytes += file.bytes


def _count(table: TableSummary, rows: pa.Table, time: str) -> None:
    table.rows += rows.num_rows
    if rows.num_rows:
        times = rows[time].to_numpy()
        table.oldest_ms = int(min(times.min(), times.min() if table.oldest_ms is None else table.oldest_ms))
        table.newest_ms = int(max(times.max(), times.max() if table.newest_ms is None else table.newest_ms))


def _count_answers(summary: LogSummary, rows: pa.Table) -> None:
    summary.pins += pc.sum(pc.list_value_length(rows["pin_ids"])).as_py()
    summary.explored += rows.num_rows - rows["arm"].null_count
    for name, counts in (("surface", summary.surfaces), ("model", summary.models)):
        for found in pc.value_counts(pc.cast(rows[name], pa.string())).to_pylist():
            counts[found["values"]] += found["counts"]
    days, counted = np.unique(rows["time_ms"].to_numpy() // _MS_PER_DAY, return_counts=True)
    for day, count in zip(days.tolist(), counted.tolist(), strict=True):
        summary.days[f"{datetime.fromtimestamp(day * 86_400, UTC):%Y-%m-%d}"] += count
