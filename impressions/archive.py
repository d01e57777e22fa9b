"""Makes Parquet files of segments that nobody writes any more, and deletes files that are too old."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import structlog

from impressions.places import Place, day_of, file_of
from impressions.schema import FINGERPRINT_KEY, TABLES, fingerprint
from impressions.segments import DamagedSegmentError, claimed, clear_unborn, read_segment, segments, size_of, strays

_log = structlog.get_logger(__name__)

#: How often the log is looked through for files that are too old.
_RETENTION_S = 600.0
#: Steps of the clock that count, and how long nothing is deleted after one.
_STEP_S, _STEADY_S = 3_600.0, 86_400.0
#: Requests of a row group: what a reader must hold at once, and what is written between two rests.
_ROW_GROUP = 512
#: The folder, in the spool folder, of segments that could not be understood.
DAMAGED = "damaged"


class Archive:
    """Turns segments into Parquet files. It belongs to one thread; several processes may share a spool folder.

    Attributes:
        files: number of Parquet files written.
        bytes: their size.
        damaged: number of segments that could not be understood and were moved to the folder `damaged`.
    """

    def __init__(
        self,
        place: Place,
        spool: Path,
        retention_days: float | None,
        clock: ClockSteps,
        rest: Callable[[float], object] = lambda _: None,
    ) -> None:
        """Store the settings.

        Args:
            place: where the files go.
            spool: the folder of the segments.
            retention_days: age from which files are deleted; None keeps them.
            clock: says whether the age of a file can be trusted.
            rest: called with the seconds that each part of a file took.
        """
        self._place = place
        self._spool = spool
        self._retention_days = retention_days
        self._rest = rest
        self._looked_s = float("-inf")
        self._clock = clock
        self.files = self.bytes = self.damaged = 0

    @property
    def waiting_bytes(self) -> int:
        """Size of the segments that nobody writes any more."""
        found = 0
        for path in segments(self._spool):
            with contextlib.suppress(OSError), claimed(path) as mine:  # what cannot be opened is reported by `look`
                found += size_of(path) if mine else 0
        return found

    def look(self) -> None:
        """Delete what is too old, and archive every segment that nobody writes.

        Raises:
            OSError: the place takes no files now; the segments stay, and a later call goes on with them.
        """
        self._delete_old()  # first: it may make the room that a file needs
        self.archive_all()

    def archive_all(self) -> None:
        """Archive every segment that nobody writes.

        Raises:
            OSError: the place takes no files now, or a segment cannot be opened; the others have become files then.
        """
        clear_unborn(self._spool)
        unopened: OSError | None = None
        for path in segments(self._spool):
            with contextlib.ExitStack() as stack:
                try:
                    mine = stack.enter_context(claimed(path))
                except OSError as error:  # such as one of another user: it must not hold up the others
                    unopened = error
                    continue
                if mine:
                    self._archive(path)
        for path in strays(self._spool):
            self._set_aside(path, "no log gives such a name")
        if unopened is not None:
            raise unopened

    def _archive(self, path: Path) -> None:
        name = path.name.partition("-")[0]
        damage: DamagedSegmentError | None = None
        table: pa.Table | None
        try:
            table, torn = read_segment(path)
        except DamagedSegmentError as error:
            table, torn, damage = error.rows, False, error
        if name not in TABLES:
            self._set_aside(path, "the log has no such table")
            return
        if torn:
            _log.warning("segment_ended_early", segment=path.name, rows=table.num_rows if table else 0)
        if table is not None and table.num_rows:
            self._put(table, f"{self._place.root}/{file_of(path.stem)}")
        if damage is None:
            path.unlink()
        else:  # what could be read is in the Parquet file now; the rest may be repaired by hand
            self._set_aside(path, str(damage))

    def _put(self, table: pa.Table, target: str) -> None:
        """Write a Parquet file, whole or not at all."""
        files, folder = self._place.files, target.rpartition("/")[0]
        local = self._place.folder is not None
        written = f"{folder}/.{target.rpartition('/')[2]}" if local else target
        if local:
            files.create_dir(folder, recursive=True)
        try:
            write_parquet(table, written, files, self._rest)
        except BaseException:
            if local:  # the disk may be full
                Path(written).unlink(missing_ok=True)
            raise
        size = files.get_file_info(written).size
        if local:
            descriptor = os.open(written, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            Path(written).replace(target)
        self.files += 1
        self.bytes += size

    def _set_aside(self, path: Path, reason: str) -> None:
        """Keep a segment that cannot be understood where nobody trips over it."""
        folder = self._spool / DAMAGED
        folder.mkdir(exist_ok=True)
        target, number = folder / path.name, 1
        while os.path.lexists(target):  # what was set aside before is kept
            target, number = folder / f"{path.stem}-{number}{path.suffix}", number + 1
        path.rename(target)
        self.damaged += 1
        _log.error("segment_not_understood", segment=path.name, moved_to=str(target), reason=reason)

    def _delete_old(self) -> None:
        now_s = time.monotonic()
        if self._retention_days is None or now_s - self._looked_s < _RETENTION_S:
            return
        self._looked_s = now_s
        if not self._clock.steady(time.time(), now_s):
            _log.warning("impressions_kept", reason="the clock has jumped within a day; nothing is deleted until then")
            return
        oldest = (datetime.now(UTC) - timedelta(days=self._retention_days)).strftime("%Y-%m-%d")
        for path in parquet_files(self._place):
            day = day_of(path)
            if day is not None and day < oldest:
                with contextlib.suppress(FileNotFoundError):  # another server with the same log was faster
                    self._place.files.delete_file(path)
                _log.info("impressions_deleted", file=path, retention_days=self._retention_days)


class ClockSteps:
    """Notices steps of the clock, after which a file's age is not to be trusted. Pure."""

    def __init__(self, offset_s: float) -> None:
        """Start with a clock that is steady, which was so many seconds ahead of `time.monotonic`."""
        self._offset_s = offset_s
        self._stepped_s = float("-inf")

    def steady(self, time_s: float, monotonic_s: float) -> bool:
        """Return whether the clock has made no step of an hour or more for a day."""
        if abs(time_s - monotonic_s - self._offset_s) >= _STEP_S:
            self._offset_s, self._stepped_s = time_s - monotonic_s, monotonic_s
        return monotonic_s - self._stepped_s >= _STEADY_S


def parquet_files(place: Place, table: str | None = None) -> list[str]:
    """Return the paths of a log's Parquet files, of one table or all, by day and time."""
    found = []
    for name in [table] if table else TABLES:
        selector = pyarrow.fs.FileSelector(f"{place.root}/{name}", allow_not_found=True, recursive=True)
        found += [info.path for info in place.files.get_file_info(selector) if info.is_file and day_of(info.path)]
    return sorted(found)


def write_parquet(
    table: pa.Table,
    path: str,
    files: pyarrow.fs.FileSystem,
    rest: Callable[[float], object] = lambda _: None,
) -> None:
    """Write rows of a table as a Parquet file that states the table's fingerprint.

    `rest` is called after each row group, with the seconds that it took.
    """
    # Its own fingerprint: a server of another version, which was killed, may have left these rows.
    metadata = {FINGERPRINT_KEY: fingerprint(table.schema).encode()}
    names, floats = _columns(table.schema)
    marked = table.replace_schema_metadata(metadata)
    with pq.ParquetWriter(
        path,
        marked.schema,
        filesystem=files,
        compression="zstd",
        compression_level=1,
        use_dictionary=names,
        use_byte_stream_split=floats,
    ) as writer:
        for start in range(0, table.num_rows, _ROW_GROUP):
            began_s = time.perf_counter()
            writer.write_table(marked.slice(start, _ROW_GROUP))
            rest(time.perf_counter() - began_s)


def _columns(schema: pa.Schema) -> tuple[list[str], list[str]]:
    """Return the Parquet columns of names, which repeat, and of floats, whose bytes compress better one by one."""
    names, floats = [], []
    for field in schema:
        listed = pa.types.is_list(field.type)
        value, path = (field.type.value_type, f"{field.name}.list.element") if listed else (field.type, field.name)
        if pa.types.is_dictionary(value):
            names.append(path)
        elif pa.types.is_floating(value):
            floats.append(path)
    return names, floats
