"""Vectors of pins in a Parquet file that says of which embedding space they are, and of which time.

The columns are `item_id` (uint64) and `vector` (a list of fixed length), so that such a file can also serve as a
dataset's own vectors. The rest stands in the file's metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from feature_client.bulk.columns import ColumnError, entity_ids, field_values
from feature_client.groups import Embedding, EmbeddingSpace, Frozen
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinEmbeddings, PinVectors
from ranker.data.problems import date_of
from ranker.errors import DatasetError

_KEY = b"pinrank.vectors"
_IDS, _VECTORS = "item_id", "vector"


class VectorsOrigin(Frozen):
    """What a file of vectors says about them.

    Attributes:
        space: their embedding space.
        until_ms: Unix time in milliseconds; their producer has read only events before it. None if its data has no
            times.
        revision: 1 for the vectors with which the space began, one more for each refresh that was aligned to it.
        made_by: the command that made the file.
        made_of: the space in which a refresh was produced, before it was aligned; empty for other files.
    """

    space: EmbeddingSpace
    until_ms: int | None
    revision: Annotated[int, Field(ge=1)] = 1
    made_by: str = ""
    made_of: str = ""


class GivenVectors(PinVectors, Protocol):
    """Vectors of pins that a ranker is given to learn from: a file of them, or a network that makes them."""

    def refuse_after(self, until_ms: int) -> None:
        """Raise DatasetError unless they are known to be made of events before a time: a test would see the future."""
        ...

    def saved(self, log: ActionLog, before_ms: int) -> PinEmbeddings:
        """Return those that a bundle carries: as of a time, in the order of pins' identifiers."""
        ...


def refuse_vectors_after(own_ms: int | None, until_ms: int) -> None:
    """Raise DatasetError unless vectors that know events before `own_ms` know only events before `until_ms`."""
    if own_ms is not None and own_ms <= until_ms:
        return
    made = "do not say until when" if own_ms is None else f"were made of events until {date_of(own_ms)}"
    date = date_of(until_ms)
    raise DatasetError(
        f"the vectors {made}, and here they may know only events before {date}, so that nothing is measured on "
        f"what they have seen; make them with `pinrank embed ... --before training`, or --before {date}"
    )


def latest_ms(*times_ms: int | None) -> int | None:
    """Return until when something knows events whose parts know them until these times; None if one is not known."""
    known = [time_ms for time_ms in times_ms if time_ms is not None]
    return max(known) if len(known) == len(times_ms) else None


@dataclass(frozen=True, slots=True)
class SavedVectors:
    """The vectors of a file, with the pins in ascending order, and what it says about them."""

    embeddings: PinEmbeddings
    origin: VectorsOrigin

    @property
    def space(self) -> EmbeddingSpace:
        return self.embeddings.space

    def as_of(self, log: ActionLog, before_ms: int) -> np.ndarray:
        """Do what `PinVectors.as_of` says."""
        return self.embeddings.as_of(log, before_ms)

    def refuse_after(self, until_ms: int) -> None:
        """Do what `GivenVectors.refuse_after` says."""
        refuse_vectors_after(self.origin.until_ms, until_ms)

    def saved(self, _log: ActionLog, _before_ms: int) -> PinEmbeddings:
        """Do what `GivenVectors.saved` says."""
        return self.embeddings


def write_vectors(path: Path, embeddings: PinEmbeddings, origin: VectorsOrigin) -> None:
    """Write vectors; the file appears when it is complete.

    Raises:
        ValueError: `origin` names another space than the vectors are of.
        OSError: the file cannot be written.
    """
    if origin.space != embeddings.space:
        raise ValueError(f"vectors of {embeddings.space.ref} cannot be written as {origin.space.ref}")
    flat = pa.array(np.ascontiguousarray(embeddings.vectors, embeddings.space.dtype).ravel())
    columns = {
        _IDS: pa.array(embeddings.pin_ids.astype(np.uint64, copy=False)),
        _VECTORS: pa.FixedSizeListArray.from_arrays(flat, embeddings.space.dim),
    }
    table = pa.table(columns).replace_schema_metadata({_KEY: origin.model_dump_json().encode()})
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        pq.write_table(table, unfinished, compression="zstd")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class SavedVectorFile:
    """A file of vectors that need not fit into memory.

    Attributes:
        path: the file.
        origin: what it says about its vectors.
        pins: the number of its pins.
        parts: the number of parts in which it can be read.
    """

    path: Path
    origin: VectorsOrigin
    pins: int
    parts: int

    def read(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Return uint64[N] pins and [N, D] vectors, in the file's order. Raises DatasetError if that cannot be read."""
        try:
            table = pq.ParquetFile(self.path, page_checksum_verification=True).read_row_group(part)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(self.path, error) from error
        return _values(f"{self.path}, row group {part}", table, self.origin)


def open_saved_vectors(path: Path) -> SavedVectorFile:
    """Open what `write_vectors` has written, and do not read its pins. Raises DatasetError as `read_vectors` does."""
    _check(path)
    try:
        with pq.ParquetFile(path) as file:
            return SavedVectorFile(path, _origin(path, file.schema_arrow), file.metadata.num_rows, file.num_row_groups)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def read_vectors(path: Path) -> SavedVectors:
    """Read what `write_vectors` has written.

    Raises:
        DatasetError: the file does not exist, is damaged, says nothing of its space, or holds a pin twice or a number
            that is not finite. The message names the file and the fix.
    """
    _check(path)
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    origin = _origin(path, table.schema)
    return SavedVectors(ascending(path, *_values(str(path), table, origin), origin.space), origin)


def ascending(path: Path, pin_ids: np.ndarray, vectors: np.ndarray, space: EmbeddingSpace) -> PinEmbeddings:
    """Return vectors of a file in the order of their pins. Raises DatasetError if a pin occurs twice."""
    order = np.argsort(pin_ids, kind="stable")
    pin_ids = pin_ids[order]
    twice = np.flatnonzero(pin_ids[1:] == pin_ids[:-1])
    if len(twice):
        raise DatasetError(f"{path} has pin {pin_ids[twice[0]]} more than once; keep one of its vectors")
    return PinEmbeddings(pin_ids, vectors[order], space)


def _check(path: Path) -> None:
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; write vectors with `pinrank embed`")


def _unreadable(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"{path} cannot be read as a Parquet file: {error}; write it again")


def _values(where: str, table: pa.Table, origin: VectorsOrigin) -> tuple[np.ndarray, np.ndarray]:
    try:
        return (
            entity_ids(table.column(_IDS).combine_chunks()),
            field_values(Embedding(name="own", space=origin.space), table.column(_VECTORS).combine_chunks()),
        )
    except KeyError as error:
        raise DatasetError(f"{where} lacks a column {error.args[0]}; write it with `pinrank embed`") from error
    except ColumnError as error:
        row = "" if error.row is None else f", row {error.row} (the first is 0)"
        raise DatasetError(f"{where}{row}: {error}; write it with `pinrank embed`") from error


def _origin(path: Path, schema: Any) -> VectorsOrigin:
    held = (schema.metadata or {}).get(_KEY)
    if held is None:
        raise DatasetError(
            f"{path} does not say of which embedding space its vectors are, so nothing can be compared with them; "
            "`pinrank embed` writes files that do"
        )
    try:
        return VectorsOrigin.model_validate(json.loads(held))
    except (ValueError, ValidationError) as error:
        raise DatasetError(f"{path}: what it says about its vectors cannot be read: {error}") from error
