"""Vectors of pins or users in a Parquet file that says of which embedding space they are, and of which time.

The columns are `item_id` or `user_id` (uint64) and `vector` (a list of fixed length), so that a file of pins can also
serve as a dataset's own vectors. The rest stands in the file's metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from feature_client.bulk.columns import ColumnError, entity_ids, field_values
from feature_client.bulk.source import VECTORS_KEY
from feature_client.groups import Embedding, EmbeddingSpace, Frozen
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinEmbeddings, PinVectors
from ranker.data.problems import date_of
from ranker.errors import DatasetError

_VECTORS = "vector"

Entity = Literal["pin", "user"]
#: The column of identifiers.
_IDS: dict[Entity, str] = {"pin": "item_id", "user": "user_id"}


class VectorsOrigin(Frozen):
    """What a file of vectors says about them.

    Attributes:
        space: their embedding space.
        until_ms: Unix time in milliseconds; their producer has read only events before it. None if its data has no
            times.
        revision: 1 for the vectors with which the space began, one more for each refresh that was aligned to it.
        made_by: the command that made the file.
        made_of: the space in which a refresh was produced, before it was aligned; empty for other files.
        entity: what has the vectors.
    """

    space: EmbeddingSpace
    until_ms: int | None
    revision: Annotated[int, Field(ge=1)] = 1
    made_by: str = ""
    made_of: str = ""
    entity: Entity = "pin"

    def refuse_after(self, until_ms: int) -> None:
        """Raise DatasetError unless they are known to be made of events before a time: a test would see the future."""
        refuse_after(f"vectors of {self.entity}s", self.until_ms, until_ms)


class GivenVectors(PinVectors, Protocol):
    """Vectors of pins that a ranker is given to learn from: a file of them, or a network that makes them."""

    def refuse_after(self, until_ms: int) -> None:
        """Raise DatasetError unless they are known to be made of events before a time: a test would see the future."""
        ...

    def saved(self, log: ActionLog, before_ms: int) -> PinEmbeddings:
        """Return those that a bundle carries: as of a time, in the order of pins' identifiers."""
        ...


def refuse_after(what: str, own_ms: int | None, until_ms: int) -> None:
    """Raise DatasetError unless what knows events before `own_ms` knows only events before `until_ms`.

    Args:
        what: what it is, in the plural.
        own_ms: Unix time in milliseconds; None if it is not known.
        until_ms: Unix time in milliseconds.
    """
    if own_ms is not None and own_ms <= until_ms:
        return
    made = "do not say until when" if own_ms is None else f"were made of events until {date_of(own_ms)}"
    date = date_of(until_ms)
    raise DatasetError(
        f"the {what} {made}, and here they may know only events before {date}, so that nothing is measured on "
        "what they have seen; make them of data with times, with `pinrank embed ... --before training`, or --before "
        f"{date}"
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
        self.origin.refuse_after(until_ms)

    def saved(self, _log: ActionLog, _before_ms: int) -> PinEmbeddings:
        """Do what `GivenVectors.saved` says."""
        return self.embeddings


@dataclass(frozen=True, slots=True)
class UserVectors:
    """Vectors of users, and what their file says about them.

    Attributes:
        user_ids: uint64[U], ascending.
        vectors: float16[U, D], of length one; zeros for a user of whom nothing is known.
        origin: what the file says.
    """

    user_ids: np.ndarray
    vectors: np.ndarray
    origin: VectorsOrigin


def write_vectors(path: Path, embeddings: PinEmbeddings, origin: VectorsOrigin) -> None:
    """Write vectors of pins; the file appears when it is complete.

    Raises:
        ValueError: `origin` names another space than the vectors are of, or another entity.
        OSError: the file cannot be written.
    """
    if origin.space != embeddings.space:
        raise ValueError(f"vectors of {embeddings.space.ref} cannot be written as {origin.space.ref}")
    _write(path, "pin", embeddings.pin_ids, embeddings.vectors, origin)


def write_user_vectors(path: Path, users: UserVectors) -> None:
    """Write vectors of users; the file appears when it is complete.

    Raises:
        ValueError: their origin names another entity.
        OSError: the file cannot be written.
    """
    _write(path, "user", users.user_ids, users.vectors, users.origin)


def _write(path: Path, entity: Entity, ids: np.ndarray, vectors: np.ndarray, origin: VectorsOrigin) -> None:
    if origin.entity != entity:
        raise ValueError(f"vectors of a {entity} cannot be written as those of a {origin.entity}")
    flat = pa.array(np.ascontiguousarray(vectors, origin.space.dtype).ravel())
    columns = {
        _IDS[entity]: pa.array(ids.astype(np.uint64, copy=False)),
        _VECTORS: pa.FixedSizeListArray.from_arrays(flat, origin.space.dim),
    }
    table = pa.table(columns).replace_schema_metadata({VECTORS_KEY: origin.model_dump_json().encode()})
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        pq.write_table(table, unfinished, compression="zstd")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class SavedVectorFile:
    """A file of vectors of pins that need not fit into memory.

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
            return SavedVectorFile(
                path, _origin(path, file.schema_arrow, "pin"), file.metadata.num_rows, file.num_row_groups
            )
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def read_vectors(path: Path) -> SavedVectors:
    """Read what `write_vectors` has written.

    Raises:
        DatasetError: the file does not exist, is damaged, says nothing of its space, is not of pins, or holds a pin
            twice or a number that is not finite. The message names the file and the fix.
    """
    pin_ids, vectors, origin = _read(path, "pin")
    return SavedVectors(PinEmbeddings(pin_ids, vectors, origin.space), origin)


def read_user_vectors(path: Path) -> UserVectors:
    """Read what `write_user_vectors` has written. Raises DatasetError as `read_vectors` does."""
    return UserVectors(*_read(path, "user"))


def _read(path: Path, entity: Entity) -> tuple[np.ndarray, np.ndarray, VectorsOrigin]:
    _check(path)
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    origin = _origin(path, table.schema, entity)
    return *_ascending(path, entity, *_values(str(path), table, origin)), origin


def ascending(path: Path, pin_ids: np.ndarray, vectors: np.ndarray, space: EmbeddingSpace) -> PinEmbeddings:
    """Return vectors of a file in the order of their pins. Raises DatasetError if a pin occurs twice."""
    return PinEmbeddings(*_ascending(path, "pin", pin_ids, vectors), space)


def _ascending(path: Path, entity: Entity, ids: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        raise DatasetError(f"{path} has {entity} {ids[twice[0]]} more than once; keep one of its vectors")
    return ids, vectors[order]


def _check(path: Path) -> None:
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; write vectors with `pinrank embed`")


def _unreadable(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"{path} cannot be read as a Parquet file: {error}; write it again")


def _values(where: str, table: pa.Table, origin: VectorsOrigin) -> tuple[np.ndarray, np.ndarray]:
    try:
        return (
            entity_ids(table.column(_IDS[origin.entity]).combine_chunks()),
            field_values(Embedding(name="own", space=origin.space), table.column(_VECTORS).combine_chunks()),
        )
    except KeyError as error:
        raise DatasetError(f"{where} lacks a column {error.args[0]}; write it with `pinrank embed`") from error
    except ColumnError as error:
        row = "" if error.row is None else f", row {error.row} (the first is 0)"
        raise DatasetError(f"{where}{row}: {error}; write it with `pinrank embed`") from error


def _origin(path: Path, schema: Any, entity: Entity) -> VectorsOrigin:
    held = (schema.metadata or {}).get(VECTORS_KEY)
    if held is None:
        raise DatasetError(
            f"{path} does not say of which embedding space its vectors are, so nothing can be compared with them; "
            "`pinrank embed` writes files that do"
        )
    try:
        origin = VectorsOrigin.model_validate(json.loads(held))
    except (ValueError, ValidationError) as error:
        raise DatasetError(f"{path}: what it says about its vectors cannot be read: {error}") from error
    if origin.entity != entity:
        raise DatasetError(f"{path} has vectors of {origin.entity}s, and those of {entity}s are needed")
    return origin
