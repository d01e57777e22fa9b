"""Segments: files of rows on their way to Parquet. Each is an Arrow IPC stream that one process appends to.

Its writer holds a lock on it (flock) for as long as it lives, so a segment that can be locked is one that nobody writes
any more: its process closed it, or was killed. Batches are whole or at the torn end, which readers leave out. A segment
gets its name when it has its schema and an empty batch, so whatever kills its writer, it is the beginning of a stream.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from impressions.places import is_stem

ENDING = ".arrows"
#: A segment that is being created; it has no rows yet.
_NEW = ".new"
#: What each message of a stream begins with.
_MESSAGE = b"\xff\xff\xff\xff"


class Segment:
    """A segment that this process appends to. It belongs to one thread."""

    def __init__(self, folder: Path, stem: str, schema: pa.Schema) -> None:
        """Create a segment, and lock it before others can see it."""
        self.began_s = time.monotonic()
        self.path = folder / f"{stem}{ENDING}"
        created = folder / f"{stem}{_NEW}"
        self._descriptor = os.open(created, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(self._descriptor).st_nlink:  # `clear_unborn` of another process was faster
                raise FileNotFoundError(errno.ENOENT, "another process cleared it before it was locked", str(created))
            self._sink = pa.OSFile(str(created), "wb")
            self._writer = pa.ipc.new_stream(self._sink, schema)
            self._writer.write_batch(pa.RecordBatch.from_pylist([], schema))  # pyarrow writes the schema with it
            created.rename(self.path)
        except BaseException:
            os.close(self._descriptor)
            created.unlink(missing_ok=True)
            raise
        self.bytes = self._sink.tell()

    @property
    def in_place(self) -> bool:
        """Whether its file still is where others look for it; if not, somebody has deleted or moved it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def append(self, batch: pa.RecordBatch) -> None:
        """Append a batch. When this returns, the rows survive a kill of this process.

        Raises:
            OSError: the batch could not be written whole; append no more, and close the segment.
        """
        self._writer.write_batch(batch)
        self.bytes = self._sink.tell()

    def close(self) -> None:
        """Drop what a failed append left behind, and unlock."""
        with contextlib.suppress(OSError):  # readers leave out a torn end anyway
            os.ftruncate(self._descriptor, self.bytes)
        with contextlib.suppress(OSError):
            self._sink.close()
        os.close(self._descriptor)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Lock a segment that nobody writes for the time of the block; yield whether that worked.

    Raises:
        OSError: it cannot be opened: it is a folder, or this process may not write it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # Another process may have finished and deleted it in the meantime.
        yield os.fstat(descriptor).st_nlink > 0
    finally:
        os.close(descriptor)


def segments(folder: Path, table: str | None = None) -> list[Path]:
    """Return the segments in a spool folder by name, of one table or all."""
    return sorted(path for path in folder.glob(f"{table or '*'}-*{ENDING}") if is_stem(path.stem))


def strays(folder: Path) -> list[Path]:
    """Return what looks like a segment in a spool folder, and has a name that no log gives."""
    return sorted(path for path in folder.glob(f"*{ENDING}") if not is_stem(path.stem))


def size_of(path: Path) -> int:
    """Return the size of a segment in bytes; 0 if it has become a file in the meantime, or cannot be reached."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def clear_unborn(folder: Path) -> None:
    """Delete what processes left that were killed while they created a segment; it never had rows."""
    for path in folder.glob(f"*{_NEW}"):
        with contextlib.suppress(OSError), claimed(path) as mine:  # one of another user does no harm
            if mine:
                path.unlink(missing_ok=True)


class DamagedSegmentError(Exception):
    """A segment goes on with something that is no batch, and it is not the torn end that a killed writer leaves.

    Attributes:
        rows: what could be read before it.
    """

    def __init__(self, message: str, rows: pa.Table | None) -> None:
        super().__init__(message)
        self.rows = rows


class _Source(io.RawIOBase):
    """A file that notices when it has fewer bytes left than were asked for."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        found = self._file.read(size) or b""
        while len(found) < size and (more := self._file.read(size - len(found))):
            found += more
        self.ended |= len(found) < size
        return found


def read_segment(path: Path) -> tuple[pa.Table, bool]:
    """Read a segment up to its last whole batch.

    Returns:
        Its rows, and whether it ends in the middle of a batch.

    Raises:
        FileNotFoundError: it is not there any more.
        DamagedSegmentError: it is not the beginning of a stream.
    """
    batches: list[pa.RecordBatch] = []
    with path.open("rb", buffering=0) as file:
        source, end = _Source(file), 0
        try:
            reader = pa.ipc.open_stream(pa.PythonFile(source, "r"))
            for batch in reader:
                batches.append(batch)
                end = file.tell()
        except (pa.ArrowException, OSError, ValueError) as error:
            rows = pa.Table.from_batches(batches) if batches else None
            # A segment has one batch before it has a name, and what comes next was begun as a message.
            if rows is None or not source.ended or not _MESSAGE.startswith(os.pread(file.fileno(), len(_MESSAGE), end)):
                raise DamagedSegmentError(f"unreadable after {len(batches)} batches: {error}", rows) from error
            return rows, True
        return pa.Table.from_batches(batches, reader.schema), False
