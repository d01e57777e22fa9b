"""Parquet files of a range of pins each, in a folder that says what they were made of.

A file appears when it is complete, so a run that was interrupted goes on with those that are missing. A folder keeps to
what it was begun with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from feature_client.bulk.row_groups import batches
from ranker.errors import DatasetError, SettingError

#: Pins of a file, and of a part of a file that can be read alone.
PINS_PER_FILE, _PINS_READ = 1 << 15, 1 << 11


@dataclass(frozen=True, slots=True)
class Parts:
    """The files of a folder.

    Attributes:
        folder: the folder.
        kind: what the files hold; their names begin with it.
        command: the command that makes them.
        content: 16 hex digits, the digest of what they are made of.
        pins: the number of pins.
        until_ms: Unix time in milliseconds; they are made of events before it. None if these have no times.
    """

    folder: Path
    kind: str
    command: str
    content: str
    pins: int
    until_ms: int | None

    @property
    def paths(self) -> list[Path]:
        """The files, in ascending order of their pins."""
        firsts = range(0, self.pins, PINS_PER_FILE)
        return [self.folder / f"{self.kind}-{first:010d}.parquet" for first in firsts]

    @property
    def ranges(self) -> dict[Path, tuple[int, int]]:
        """The positions of the first pin of each file, and after its last one."""
        firsts = range(0, self.pins, PINS_PER_FILE)
        return {path: (n, min(n + PINS_PER_FILE, self.pins)) for path, n in zip(self.paths, firsts, strict=True)}

    def begin(self, settings: Mapping[str, object]) -> list[Path]:
        """Say what the folder will hold, or check that it has begun with the same; return the files that are missing.

        Raises:
            SettingError: it has files of something else.
        """
        path = self.folder / f"{self.kind}.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {"content": self.content, "pins": self.pins, "until_ms": self.until_ms, **settings}
            unfinished = path.with_name(f".{path.name}")
            unfinished.write_text(json.dumps(about))
            unfinished.replace(path)
        elif _content_in(path) != self.content:
            raise SettingError(
                f"{self.folder} has {self.kind} of other settings or data; choose another folder, or remove it"
            )
        for left in self.folder.glob(f".{self.kind}-*"):  # of a run that was killed
            left.unlink()
        return [path for path in self.paths if not path.exists()]

    def read(self, columns: list[str], paths: Iterable[Path] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield these columns of some pins at a time, in ascending order.

        Args:
            columns: names of the columns.
            paths: the files to read; None for all.

        Raises:
            DatasetError: a file is damaged.
        """
        for path in self.paths if paths is None else paths:
            try:
                parquet = pq.ParquetFile(path, page_checksum_verification=True)
                yield from batches(parquet, _PINS_READ, columns)
            except (OSError, KeyError, pa.ArrowException) as error:
                raise DatasetError(f"{path} cannot be read: {error}; run `{self.command}` again") from error


def _content_in(about: Path) -> str | None:
    """Return of what a folder was begun; None if that cannot be read."""
    try:
        content: str = json.loads(about.read_text())["content"]
    except (ValueError, KeyError, TypeError):
        return None
    return content


def open_parts(folder: Path, kind: str, command: str) -> Parts:
    """Open the files in a folder. Raises DatasetError if there are none, or not all."""
    try:
        about = json.loads((folder / f"{kind}.json").read_text())
        found = Parts(folder, kind, command, about["content"], about["pins"], about["until_ms"])
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{folder} holds no {kind} ({error}); make them with `{command}`") from error
    missing = [path for path in found.paths if not path.exists()]
    if missing:
        raise DatasetError(
            f"{folder} lacks {len(missing)} of {len(found.paths)} files of {kind}; run `{command}` again, which makes "
            "only those"
        )
    return found


def write_part(path: Path, tables: Iterator[pa.Table]) -> Path:
    """Write tables of some pins each, at least one; the file appears when it is complete."""
    # A cluster repeats the work of a machine that it has lost, which may go on with it: both must not write one file.
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        first = next(tables)
        with pq.ParquetWriter(unfinished, first.schema, compression="zstd") as writer:
            for table in chain([first], tables):
                writer.write_table(table, row_group_size=_PINS_READ)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
