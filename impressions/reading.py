"""Reads a log: its Parquet files, and the rows in segments that are still on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from impressions.archive import DAMAGED, parquet_files
from impressions.errors import LogError
from impressions.places import SPOOL, Place, file_of, open_place
from impressions.row_groups import outside
from impressions.schema import EARLIER, FINGERPRINT_KEY, TABLES, as_today, fingerprint
from impressions.segments import ENDING, DamagedSegmentError, read_segment, segments, size_of

#: A file that joined datasets have and logs do not.
_JOINED = "requests-*.parquet"
#: Rows that are read at once, unless a row group of a file has more.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Selection:
    """What a reader of a table needs; it may get more.

    Attributes:
        columns: in the order of the table's schema; None for all.
        since_ms: Unix milliseconds; rows of `impressions` with a `time_ms` before it are not needed. None for all.
        until_ms: nor are rows of `impressions` from this time on.
    """

    columns: tuple[str, ...] | None = None
    since_ms: int | None = None
    until_ms: int | None = None


EVERYTHING = Selection()


def read_tables(
    where: str, table: str, spools: Sequence[Path] = (), wanted: Selection = EVERYTHING
) -> Iterator[pa.Table]:
    """Yield the rows of a table of a log in parts, file by file, oldest first.

    A folder's log includes the segments in its folder `spool`, up to the last whole batch, also while a server writes
    them. Rows of a server that was killed may stand in no file, but none stands in two.

    Args:
        where: `file:///folder`, a path, or `s3://bucket/prefix`.
        table: a name of `TABLES`.
        spools: other spool folders of the log's servers, whose segments are read, too.
        wanted: what is needed of it; other columns and row groups of Parquet files are not read.

    Raises:
        LogError: there is no log, a spool folder is none, or a file is damaged or has another fingerprint; the message
            names it.
    """
    for file in log_files(where, table, spools):
        yield from file.parts(wanted)


@dataclass(frozen=True, slots=True)
class LogFile:
    """A Parquet file of a log, or a segment that is not one yet.

    Attributes:
        table: its table, a name of `TABLES`.
        where: its path.
        bytes: its size.
        segment: whether it is a segment.
        rows: reads it; of a segment that has become a file since, the file. A file that was deleted since has no rows.
            Raises LogError: it is damaged or has another fingerprint; the message starts with its path.
        parts: reads what is needed of it, with some thousands of rows in memory; else as `rows`.
    """

    table: str
    where: str
    bytes: int
    segment: bool
    rows: Callable[[], pa.Table]
    parts: Callable[[Selection], Iterator[pa.Table]]


def log_files(where: str, table: str, spools: Sequence[Path] = ()) -> Iterator[LogFile]:
    """Yield a table's files without reading them, oldest first, and then its segments. See `read_tables`."""
    place = open_place(where)
    if place.folder is not None and not place.folder.is_dir():
        raise LogError(f"{where}: there is no such folder; name the one in the setting impressions.to")
    folders = _spool_folders(place, spools)
    try:
        # Segments first: one that becomes a file in the meantime is then seen twice, by the same name, and not missed.
        waiting = _segments(folders, table)
        files = parquet_files(place, table)
        empty = not any((files, waiting)) and not any(
            parquet_files(place, name) or _segments(folders, name) for name in TABLES
        )
        found = place.files.get_file_info(files)
    except OSError as error:
        raise LogError(f"{where}: cannot be listed: {error}; check its name, and what you may read there") from error
    if empty:
        raise LogError(_no_log(where, place))
    for info in found:
        size, rows, parts = info.size or 0, *(partial(read, place, info.path, table) for read in (_parquet, _parts))
        yield LogFile(table, info.path, size, segment=False, rows=rows, parts=parts)
    known = set(files)
    for path in waiting:
        target = f"{place.root}/{file_of(path.stem)}"
        if target not in known:
            known.add(target)  # a copy of a spool folder has the same segments
            rows = partial(_segment, place, path, target, table)
            yield LogFile(table, str(path), size_of(path), segment=True, rows=rows, parts=partial(_whole, rows))


def _no_log(where: str, place: Place) -> str:
    if place.folder is not None and any(place.folder.glob(_JOINED)):
        return (
            f"{where}: this is a joined dataset, which `pinrank impressions join` wrote, and not an impression log; "
            "name the log that it was joined from, which is what the setting impressions.to names. `pinrank train`, "
            "`tune` and `explore evaluate` read joined datasets"
        )
    return f"{where}: there is no impression log; name what the setting impressions.to names"


def set_aside(where: str, spools: Sequence[Path] = ()) -> list[Path]:
    """Return the segments of a log that could not be read to their end."""
    folders = _spool_folders(open_place(where), spools)
    return [path for folder in folders for path in sorted((folder / DAMAGED).glob(f"*{ENDING}"))]


def _spool_folders(place: Place, spools: Sequence[Path]) -> list[Path]:
    """Return the folder `spool` of a log in a folder, and the others, each once."""
    for spool in spools:
        _check_spool(spool)
    own = [] if place.folder is None else [place.folder / SPOOL]
    return list({folder.resolve(): folder for folder in (*own, *spools)}.values())


def _check_spool(folder: Path) -> None:
    fix = "name the folder of the servers' setting impressions.spool_folder"
    if not folder.is_dir():
        raise LogError(f"--spool {folder}: there is no such folder; {fix}")
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise LogError(
            f"--spool {folder}: cannot be listed: {error.strerror}; check what you may read there"
        ) from error
    # A spool folder is empty while nothing is on its way, and the root of a volume may hold more than segments.
    if names and not any(name == DAMAGED or name.endswith(ENDING) for name in names):
        raise LogError(f"--spool {folder}: it holds {names[0]} and no segments (*{ENDING}), so it is no spool; {fix}")


def _segments(folders: Sequence[Path], table: str) -> list[Path]:
    return [path for folder in folders for path in segments(folder, table)]


def _segment(place: Place, path: Path, target: str, table: str) -> pa.Table:
    try:
        rows, _ = read_segment(path)
    except FileNotFoundError:  # it has just become a file
        return _parquet(place, target, table)
    except (DamagedSegmentError, OSError) as error:
        raise LogError(f"{path}: the segment is damaged: {error}; move it away, and keep it for a repair") from error
    schema = rows.schema.remove_metadata()
    if any(schema.equals(earlier) for earlier in EARLIER.get(table, ())):
        return as_today(rows, table)
    if not schema.equals(TABLES[table]):
        raise _of_another_version(str(path), "other columns", table)
    return rows


def _whole(rows: Callable[[], pa.Table], _: Selection) -> Iterator[pa.Table]:
    yield rows()


def _parquet(place: Place, path: str, table: str) -> pa.Table:
    parts = list(_parts(place, path, table, EVERYTHING))
    return pa.concat_tables(parts) if parts else TABLES[table].empty_table()


def _parts(place: Place, path: str, table: str, wanted: Selection) -> Iterator[pa.Table]:
    try:
        with place.files.open_input_file(path) as file, pq.ParquetFile(file, pre_buffer=True) as parquet:
            found = (parquet.schema_arrow.metadata or {}).get(FINGERPRINT_KEY, b"none").decode(errors="replace")
            known = next((one for one in (TABLES[table], *EARLIER.get(table, ())) if fingerprint(one) == found), None)
            if known is None:
                raise _of_another_version(path, f"fingerprint {found}", table)
            columns = None if wanted.columns is None else [name for name in wanted.columns if name in known.names]
            for groups in _row_groups(parquet.metadata, wanted):
                # One by one: pyarrow cannot read lists of names from several row groups at once.
                part = pa.concat_tables(parquet.read_row_group(group, columns) for group in groups)
                yield part if known is TABLES[table] else as_today(part, table, wanted.columns)
    except FileNotFoundError:  # retention has just deleted it
        return
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"{path}: the file is damaged: {error}; move it away, and keep it for a repair") from error


def _row_groups(metadata: pq.FileMetaData, wanted: Selection) -> Iterator[list[int]]:
    """Yield the numbers of row groups with rows that are needed, some thousands of rows at once."""
    some: list[int] = []
    rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if outside(group, wanted.since_ms, wanted.until_ms):
            continue
        if some and rows + group.num_rows > _ROWS_AT_ONCE:
            yield some
            some, rows = [], 0
        some, rows = [*some, number], rows + group.num_rows
    if some:
        yield some


def _of_another_version(path: str, found: str, table: str) -> LogError:
    return LogError(
        f"{path}: written by another version of pinrank: it has {found}, and this version reads {table} with "
        f"fingerprint {fingerprint(TABLES[table])}; read it with the version that wrote it"
    )
