"""The log's writer: takes rows from a server without delaying it, and gets them into Parquet files.

    server ── offer ──▶ queue ── every half second ──▶ segments in the spool folder ── a process ──▶ Parquet files
             (drops if full)         `write`              (survive a kill)        `archive_segments`

`write` and `archive_segments` are loops for threads of the server's supervisor. If one raises, nothing that was offered
is lost: it continues with the same rows when it is called again.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import structlog

from impressions.archive_process import ArchiveProcess
from impressions.errors import LogError
from impressions.places import SPOOL, check_writable, new_stem, open_place
from impressions.schema import TABLES
from impressions.segments import Segment, segments, size_of
from impressions.writing.batches import actions_batch, impressions_batch, seen_batch
from impressions.writing.rows import AnsweredRequest, RecordedActions, SeenReport

_log = structlog.get_logger(__name__)

#: The most items of a batch. It bounds the memory and the time that one conversion takes.
_BATCH = {"impressions": 256, "actions": 16, "seen": 4_096}
#: Estimated memory of a batch; a column of Arrow holds 2 GiB.
_BATCH_BYTES = 64 << 20
_CONVERT: dict[str, Callable[[Any], pa.RecordBatch]] = {
    "impressions": lambda rows: impressions_batch(rows, _let_others_run),
    "actions": lambda calls: actions_batch(calls, _let_others_run),
    "seen": seen_batch,
}
#: The part of a spool folder from which Parquet files are made although others want the processor.
_HURRY = 8
#: Memory that a row without pins takes, more or less.
_ROW_BYTES = 400


def _let_others_run() -> None:
    """Give up the interpreter lock: an event loop that wants it would otherwise wait for 5 ms."""
    time.sleep(0)


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How a log is kept.

    Attributes:
        to: `file:///folder` or `s3://bucket/prefix`.
        spool_folder: for rows on their way; None for the folder `spool` in `to`. A bucket needs one.
        flush_s: how often rows are written to the spool folder; a killed process loses the rows of one interval.
        spool_bytes_max: size of the spool folder from which no segment is begun. Rows then wait in memory.
        rotate_bytes, rotate_s: size and age from which a segment becomes a Parquet file.
        queue_bytes_max: memory for rows that wait to be written; actions and reports take half of it at most.
        retention_days: age from which files are deleted; None keeps them.
    """

    to: str
    spool_folder: Path | None = None
    flush_s: float = 0.5
    spool_bytes_max: int = 8 << 30
    rotate_bytes: int = 256 << 20
    rotate_s: float = 300.0
    queue_bytes_max: int = 64 << 20
    retention_days: float | None = None


@dataclass(slots=True)
class TableCounts:
    """The rows of one table.

    Attributes:
        accepted: taken into the queue.
        dropped: not taken, because the queue was full.
        written: written to a segment.
        unfit: taken, but not written, because they could not be converted: a bug, which the log of events shows.
    """

    accepted: int = 0
    dropped: int = 0
    written: int = 0
    unfit: int = 0


@dataclass(slots=True)
class _Queue:
    """Items that wait: each with its size and the number of its rows.

    The server's thread appends and counts what it took, the writer's counts what it wrote.
    """

    items: deque[tuple[Any, int, int]] = field(default_factory=deque)
    counts: TableCounts = field(default_factory=TableCounts)


class ImpressionLog:
    """Writes the log of one server process. `offer_*` belong to one thread, such as an event loop's.

    Attributes:
        tables: counts by table.
        archive: makes Parquet files of the segments, in a process of its own.
    """

    def __init__(self, settings: LogSettings) -> None:
        """Open the log's place, and create its spool folder.

        Raises:
            LogError: the place or the spool folder cannot be used.
        """
        self._settings = settings
        place = open_place(settings.to)
        self._spool = self._spool_of(place.folder)
        self.archive = ArchiveProcess(
            settings.to, self._spool, settings.retention_days, hurry_bytes=settings.spool_bytes_max // _HURRY
        )
        self._queues = {table: _Queue() for table in TABLES}
        self.tables = {table: queue.counts for table, queue in self._queues.items()}
        self._segments: dict[str, Segment] = {}
        self._offered_bytes = self._written_bytes = 0
        self._number = 0
        self._closing = threading.Event()

    def _spool_of(self, folder: Path | None) -> Path:
        spool = self._settings.spool_folder or (folder and folder / SPOOL)
        if spool is None:
            raise LogError(
                f"{self._settings.to}: a log in a bucket needs a local folder for rows on their way; set "
                "impressions.spool_folder"
            )
        check_writable(spool, "spool folder")
        if folder is not None:
            check_writable(folder, "folder of the log")
        return spool

    @property
    def queued_bytes(self) -> int:
        """Estimated memory of the rows that wait."""
        return self._offered_bytes - self._written_bytes

    def offer_impression(self, request: AnsweredRequest) -> bool:
        """Queue an answered request; return False if it was dropped because the queue is full. Cost: 1 us."""
        pins, constants = len(request.pin_ids), request.constants
        wide = len(constants.parties) + len(constants.attributes)
        size = request.features_bytes + _ROW_BYTES * 3 + pins * (24 + 4 * len(constants.heads) + 8 * wide)
        return self._offer("impressions", request, size, 1)

    def offer_actions(self, actions: RecordedActions) -> bool:
        """Queue the actions of a call; return False if they were dropped because the queue is full."""
        return self._offer("actions", actions, _ROW_BYTES * actions.count, actions.count)

    def offer_seen(self, report: SeenReport) -> bool:
        """Queue a report; return False if it was dropped because the queue is full."""
        return self._offer("seen", report, _ROW_BYTES + report.positions.nbytes, 1)

    def _offer(self, table: str, item: Any, size: int, rows: int) -> bool:
        queue, room = self._queues[table], self._settings.queue_bytes_max
        if table != "impressions":  # a flood of reports must not drop the answers
            room //= 2
        if self._offered_bytes + size - self._written_bytes > room:
            queue.counts.dropped += rows
            return False
        self._offered_bytes += size
        queue.counts.accepted += rows
        queue.items.append((item, size, rows))
        return True

    def write(self) -> None:
        """Write queued rows to segments every `flush_s`, until `close`; then write what is left."""
        while not self._closing.wait(self._settings.flush_s):
            self.flush()
        try:
            self.flush()
        finally:  # also if the disk takes no more: the archive then ends with what it has
            for table in list(self._segments):
                self._end(table)
            self.archive.end()

    def flush(self) -> None:
        """Write all queued rows, and end the segments that are large or old enough. For the writer's thread.

        Raises:
            OSError: the spool folder takes no more; the rows stay queued.
        """
        # What users did before what they were shown, so that a reader rarely meets an action without its answer.
        for table, queue in reversed(self._queues.items()):
            left = len(queue.items)  # those that arrive meanwhile wait for the next time
            while left > 0:
                items = _next_batch(queue, min(left, _BATCH[table]))
                self._write(table, queue, items)
                left -= len(items)
            segment = self._segments.get(table)
            if segment is not None and self._due(segment):
                self._end(table)

    def _write(self, table: str, queue: _Queue, items: Sequence[tuple[Any, int, int]]) -> None:
        rows = [item for item, _, _ in items]
        try:
            batch = _CONVERT[table](rows)
        except Exception:  # noqa: BLE001 - one item must not hold up the others for ever
            _log.exception("rows_not_logged", table=table, rows=len(rows))
            rows = [row for row in rows if _fits(table, row)]
            batch = _CONVERT[table](rows) if rows else None
        written = 0 if batch is None else batch.num_rows
        if batch is not None and written:
            self._append(table, batch)
        for _ in items:
            queue.items.popleft()
        queue.counts.written += written
        queue.counts.unfit += sum(count for _, _, count in items) - written
        self._written_bytes += sum(size for _, size, _ in items)

    def _append(self, table: str, batch: pa.RecordBatch) -> None:
        segment = self._segments.get(table)
        if segment is not None and not segment.in_place:
            _log.error("segment_removed", segment=str(segment.path), bytes=segment.bytes)
            self._end(table)
        if table not in self._segments:
            self._check_room()
            self._spool.mkdir(parents=True, exist_ok=True)  # it may have been removed
            self._number += 1
            self._segments[table] = Segment(self._spool, new_stem(table, self._number), TABLES[table])
        try:
            self._segments[table].append(batch)
        except BaseException:
            self._end(table)  # without what this append left behind
            raise

    def _check_room(self) -> None:
        """Raise OSError if the spool folder is full, because Parquet files cannot be made."""
        waiting = sum(map(size_of, segments(self._spool)))
        if waiting >= self._settings.spool_bytes_max:
            raise OSError(
                errno.EDQUOT,
                f"{waiting:,} bytes wait for the archive; the limit is {self._settings.spool_bytes_max:,} "
                "(impressions.spool_bytes_max)",
                str(self._spool),
            )

    def _due(self, segment: Segment) -> bool:
        old = time.monotonic() - segment.began_s >= self._settings.rotate_s
        return old or segment.bytes >= self._settings.rotate_bytes

    def _end(self, table: str) -> None:
        self._segments.pop(table).close()
        self.archive.wake()

    def archive_segments(self) -> None:
        """Make Parquet files of ended segments, and of those of killed processes, until `write` has ended.

        Raises:
            OSError: the place takes no files now, or the process that makes them has ended.
        """
        self.archive.run()

    def close(self) -> None:
        """Ask both threads to finish: to write all rows, and to make Parquet files of all segments."""
        self._closing.set()


def _next_batch(queue: _Queue, count: int) -> list[tuple[Any, int, int]]:
    """Return the first items of a queue: at most so many, and so large that they fit in a batch, but at least one."""
    items: list[tuple[Any, int, int]] = []
    size = 0
    for i in range(count):  # by index: the server's thread appends meanwhile
        item = queue.items[i]
        size += item[1]
        if items and size > _BATCH_BYTES:
            break
        items.append(item)
    return items


def _fits(table: str, row: Any) -> bool:
    try:
        _CONVERT[table]([row])
    except Exception:  # noqa: BLE001 - reported with its traceback before
        return False
    return True
