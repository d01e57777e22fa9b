"""Reads a log: its Parquet files, and the rows in segments that are still on their way."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from impressions.archive import parquet_files
from impressions.errors import LogError
from impressions.places import SPOOL, Place, file_of, open_place
from impressions.schema import FINGERPRINT_KEY, TABLES, fingerprint
from impressions.segments import DamagedSegmentError, read_segment, segments


def read_tables(where: str, table: str) -> Iterator[pa.Table]:
    """Yield the rows of a table of a log, file by file, oldest first.

    A folder's log includes the segments in its folder `spool`, up to the last whole batch, also while a server writes
    them. Rows of a server that was killed may stand in no file, but none stands in two.

    Args:
        where: `file:///folder`, a path, or `s3://bucket/prefix`.
        table: a name of `TABLES`.

    Raises:
        LogError: there is no log, or a file is damaged or has another fingerprint; the message names it.
    """
    for _, rows in read_files(where, table):
        yield rows


def read_files(where: str, table: str) -> Iterator[tuple[str, pa.Table]]:
    """Yield the same with the path of each file."""
    place = open_place(where)
    if place.folder is not None and not place.folder.is_dir():
        raise LogError(f"{where}: there is no such folder; name the one in the setting impressions.to")
    # Segments first: one that becomes a file in the meantime is then seen twice, by the same name, and not missed.
    waiting = _segments(place, table)
    files = parquet_files(place, table)
    if not files and not waiting and not any(parquet_files(place, name) or _segments(place, name) for name in TABLES):
        raise LogError(f"{where}: there is no impression log; name what the setting impressions.to names")
    for path in files:
        try:
            rows = _parquet(place, path, table)
        except FileNotFoundError:  # retention has just deleted it
            continue
        yield path, rows
    for stem, rows in waiting.items():
        if f"{place.root}/{file_of(stem)}" not in files:
            yield f"{place.root}/{SPOOL}/{stem}", rows


def _segments(place: Place, table: str) -> dict[str, pa.Table]:
    if place.folder is None:
        return {}
    found = {}
    for path in segments(place.folder / SPOOL, table):
        try:
            rows, _ = read_segment(path)
        except FileNotFoundError:  # it has just become a file
            continue
        except (DamagedSegmentError, OSError) as error:
            raise LogError(
                f"{path}: the segment is damaged: {error}; move it away, and keep it for a repair"
            ) from error
        _check(rows.schema.remove_metadata().equals(TABLES[table]), str(path), "other columns", table)
        if rows.num_rows:
            found[path.stem] = rows
    return found


def _parquet(place: Place, path: str, table: str) -> pa.Table:
    try:
        with place.files.open_input_file(path) as file:
            rows = pq.read_table(file)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"{path}: the file is damaged: {error}; move it away, and keep it for a repair") from error
    found = (rows.schema.metadata or {}).get(FINGERPRINT_KEY, b"none").decode(errors="replace")
    _check(found == fingerprint(TABLES[table]), path, f"fingerprint {found}", table)
    return rows


def _check(fits: bool, path: str, found: str, table: str) -> None:
    if not fits:
        raise LogError(
            f"{path} was written by another version of pinrank: it has {found}, and this version reads {table} with "
            f"fingerprint {fingerprint(TABLES[table])}; read it with the version that wrote it"
        )
