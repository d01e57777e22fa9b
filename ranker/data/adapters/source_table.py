"""Tables as others published them: read strictly, so that a file of another kind is refused and not misread."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ranker.data.atomic.identifiers import misspelt
from ranker.data.problems import LATEST_MS

#: Errors raised by a damaged or unexpected source.
UNREADABLE = (ValueError, EOFError, csv.Error, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True, slots=True)
class Row:
    """The fields of one line. An invalid field raises a ValueError that names its place."""

    line: int
    fields: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.fields[column]

    def fault(self, column: str, message: str) -> ValueError:
        return ValueError(f"line {self.line}: column {column!r} holds {self[column]!r}: {message}")

    def identifier(self, column: str) -> str:
        if wrong := misspelt(self[column]):
            raise self.fault(column, f"the identifier {wrong}")
        if not self[column].isprintable():
            raise self.fault(column, "the identifier contains unprintable characters; remove them")
        return self[column]

    def time_ms(self, column: str, factor: int) -> int:
        text = self[column]
        if not (text.isascii() and text.isdigit()) or int(text[:20]) * factor >= LATEST_MS:
            raise self.fault(column, "it is not a Unix time between 1970 and 2200")
        return int(text) * factor


def read_table(source: Path, delimiter: str, columns: Sequence[str]) -> list[Row]:
    """Read the given columns of all lines. Raises one of `UNREADABLE`."""
    rows = []
    with _opened(source) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(reader, [])
        for column in columns:
            if header.count(column) != 1:
                raise ValueError(f"{'no' if column not in header else 'more than one'} column {column!r}")
        places = [header.index(column) for column in columns]
        for fields in reader:
            if fields and len(fields) != len(header):
                raise ValueError(
                    f"line {reader.line_num}: {len(fields)} fields, but the header names {len(header)} columns"
                )
            if fields:
                read = {column: fields[place] for column, place in zip(columns, places, strict=True)}
                rows.append(Row(reader.line_num, read))
    if not rows:
        raise ValueError("it has no lines after the header")
    return rows


@contextmanager
def _opened(source: Path) -> Iterator[IO[str]]:
    """Open a table that is plain text, compressed with gzip, or the only file in a zip archive."""
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            if len(names) != 1:
                raise ValueError(
                    f"the archive must contain exactly one file, but contains {', '.join(names) or 'none'}"
                )
            if archive.getinfo(names[0]).flag_bits & 1:
                raise ValueError("the archive is encrypted; unpack it first")
            with archive.open(names[0]) as member, io.TextIOWrapper(member, encoding="utf-8-sig", newline="") as text:
                yield text
    elif source.suffix == ".gz":
        with gzip.open(source, "rt", encoding="utf-8-sig", newline="") as text:
            yield text
    else:
        with source.open(encoding="utf-8-sig", newline="") as text:
            yield text
