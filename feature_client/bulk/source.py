"""Files with the rows of a group, in Parquet or NumPy format, which are read in chunks of exact values."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from feature_client.bulk.columns import ColumnError, entity_ids, field_values
from feature_client.bulk.row_groups import batches
from feature_client.groups import Embedding, EmbeddingSpace, FeatureGroup

CHUNK_ROWS = 20_000

#: Under this key, the metadata of a Parquet file of vectors say in JSON of which embedding space they are.
VECTORS_KEY = b"pinrank.vectors"

#: The errors that NumPy raises for a broken file. Arrow has an exception class of its own.
_READER_ERRORS: tuple[type[Exception], ...] = (
    OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip

#: The ids, uint64[N], and their rows, structured[N].
Chunk = tuple[np.ndarray, np.ndarray]


class SourceError(Exception):
    """A file does not fit the description of its group. The message names the file, row and column, and the fix."""


class Source:
    """The rows of a group in a file: `.parquet`, or `.npz` with one array per field.

    The column `id` holds the ids. In a file of vectors that `pinrank embed` wrote, it is `item_id` or `user_id`.

    Attributes:
        name: the name of the file, without its folder.
        rows: the number of rows.
        ignored: the columns that are no fields of the group.
    """

    def __init__(self, path: Path, group: FeatureGroup) -> None:
        """Open a file. Raises SourceError if it does not fit the group."""
        self._path, self._group = path, group
        self.name = path.name
        self._reader_errors = _READER_ERRORS
        self._id = "id"
        self._wanted = [self._id, *(field.name for field in group.fields)]
        with self._named():
            if not path.is_file():
                raise SourceError(f"{path}: the file does not exist")
            self._opened_as = _state(path)
            if path.suffix == ".parquet":
                self._open_parquet()
            elif path.suffix == ".npz":
                self._open_npz()
            else:
                raise SourceError(f"{path}: the file type is not supported; use a .parquet or an .npz file")

    def _open_parquet(self) -> None:
        try:
            import pyarrow as pa  # noqa: PLC0415 - serving does not need it
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError as error:
            raise SourceError("pyarrow is needed to read Parquet files; run: pip install 'pinrank[data]'") from error
        self._reader_errors = (*_READER_ERRORS, pa.ArrowException)
        self._parquet = pq.ParquetFile(self._path, page_checksum_verification=True)  # if the file has checksums
        metadata = self._parquet.metadata
        self.rows = int(metadata.num_rows)
        described = (self._parquet.schema_arrow.metadata or {}).get(VECTORS_KEY)
        if described is not None:
            self._open_vectors(described)
        self._check_names(self._parquet.schema_arrow.names)
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        #: int64, the first row after each row group.
        self._group_ends = np.cumsum(counts, dtype=np.int64)

    def _open_vectors(self, described: bytes) -> None:
        """Check that the vectors of a file are of the space that the group has."""
        about = json.loads(described)
        space = EmbeddingSpace.model_validate(about["space"])
        entity = about.get("entity", "pin")
        if entity != self._group.entity:
            raise SourceError(
                f"{self._path}: has vectors of {entity}s, and group {self._group.ref} is of {self._group.entity}s"
            )
        for field in self._group.fields:
            if isinstance(field, Embedding) and field.space != space:
                raise SourceError(
                    f"{self._path}: has vectors of {space.ref}, and field {field.name!r} of {self._group.ref} needs "
                    f"{field.space.ref}; load vectors of that space, or describe a group for this one"
                )
        self._id = "item_id" if entity == "pin" else "user_id"
        self._wanted[0] = self._id

    def _open_npz(self) -> None:
        self._parquet = None
        with zipfile.ZipFile(self._path) as archive:
            self._check_names([name.removesuffix(".npy") for name in archive.namelist()])
        with np.load(self._path, allow_pickle=False) as arrays:
            self._arrays: Mapping[str, np.ndarray] = {name: arrays[name] for name in self._wanted}
        if strange := [name for name, array in self._arrays.items() if not isinstance(array, np.ndarray)]:
            raise SourceError(f"{self._path}: {', '.join(strange)} is not an array; write the file with numpy.savez")
        shapes = {name: array.shape for name, array in self._arrays.items()}
        self.rows = shapes["id"][0] if len(shapes["id"]) == 1 else 0
        for name, shape in shapes.items():
            if not shape or shape[0] != self.rows:
                raise SourceError(f"{self._path}: column {name} has shape {shape}, column id has {shapes['id']}")

    def _check_names(self, names: list[str]) -> None:
        counts = Counter(names)
        ref = self._group.ref
        if lacking := [name for name in self._wanted if name not in counts]:
            raise SourceError(
                f"{self._path}: no column {', '.join(lacking)}; group {ref} needs a column {self._id} and one for "
                "each field"
            )
        if repeated := [name for name in self._wanted if counts[name] > 1]:
            raise SourceError(f"{self._path}: more than one column {', '.join(repeated)}; keep one of each")
        self.ignored = tuple(name for name in counts if name not in self._wanted)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 digest of the file's content, in hex digits."""
        with self._named(), self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check(self, progress: Callable[[int], None]) -> None:
        """Check that every row can be stored. Raises SourceError for the first one that cannot.

        Args:
            progress: is called with the number of rows checked so far.

        Cost: one pass over the file, and 8 bytes of memory per row for the ids.
        """
        found, done = [np.empty(0, np.uint64)], 0
        for ids, _ in self.chunks(0):
            found.append(ids)
            done += len(ids)
            progress(done)
        if done != self.rows:
            raise SourceError(f"{self._path}: the file holds {done} rows but declares {self.rows}; write it again")
        ids = np.concatenate(found)
        order = np.argsort(ids, kind="stable")
        again = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
        if len(again):
            first, second = order[again[0]], order[again[0] + 1]
            place = self._place(int(second))
            raise SourceError(
                f"{self._path}: {place}: id {ids[second]} is already in row {first}; keep one of the two rows"
            )

    def check_unchanged(self) -> None:
        """Raise SourceError if the file was changed or replaced since it was opened."""
        with self._named():
            changed = _state(self._path) != self._opened_as
        if changed:
            raise SourceError(f"{self._path}: the file changed during the load; load again")

    def chunks(self, start: int) -> Iterator[Chunk]:
        """Yield the rows from position `start` on, in the order of the file. Raises SourceError."""
        with self._named():
            for first, columns in self._parquet_columns(start) if self._parquet else self._npz_columns(start):
                yield self._structured(first, columns)

    def _npz_columns(self, start: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for first in range(start, self.rows or 1, CHUNK_ROWS):
            yield first, {name: array[first : first + CHUNK_ROWS] for name, array in self._arrays.items()}

    def _parquet_columns(self, start: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        assert self._parquet is not None, "only called for Parquet files"  # noqa: S101
        import pyarrow as pa  # noqa: PLC0415

        schema = self._parquet.schema_arrow
        if not self.rows:  # the types of the columns are checked all the same
            kinds = {name: schema.field(name).type for name in self._wanted}
            yield 0, {name: pa.array([], kind) for name, kind in kinds.items()}
        position = 0
        for batch in batches(self._parquet, CHUNK_ROWS, self._wanted):
            first = max(0, start - position)
            if first < len(batch):
                yield position + first, {name: batch.column(name)[first:] for name in self._wanted}
            position += len(batch)

    def _structured(self, first: int, columns: Mapping[str, Any]) -> Chunk:
        name = self._id
        try:
            ids = entity_ids(columns[self._id])
            rows = np.zeros(len(ids), self._group.dtype)
            for field in self._group.fields:
                name = field.name
                rows[name] = field_values(field, columns[name])
        except ColumnError as error:
            if error.row is None:
                raise SourceError(f"{self._path}: column {name} {error}") from error
            raise SourceError(f"{self._path}: {self._place(first + error.row)}, column {name}: {error}") from error
        return ids, rows

    def _place(self, row: int) -> str:
        """Describe where a row, counted from 0, is in the file."""
        if self._parquet is None or len(self._group_ends) < 2:
            return f"row {row} (the first is 0)"
        return f"row {row} (the first is 0; row group {int(np.searchsorted(self._group_ends, row, side='right'))})"

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Convert the errors of the file readers to a SourceError that names the file."""
        try:
            yield
        except self._reader_errors as error:
            raise SourceError(f"{self._path}: the file cannot be read: {error}") from error


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
