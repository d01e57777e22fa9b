"""Vectors of pins or users in a Parquet file that says of which embedding space they are, and of which time.

The columns are `item_id` or `user_id` (uint64) and `vector` (a list of fixed length), so that a file of pins can also
serve as a dataset's own vectors. The rest stands in the file's metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from feature_client.bulk.columns import ColumnError, entity_ids, field_values
from feature_client.bulk.source import VECTORS_KEY
from feature_client.groups import Embedding, EmbeddingSpace, Frozen
from ranker.data.embeddings import PinEmbeddings
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
        own_ms = self.until_ms
        if own_ms is not None and own_ms <= until_ms:
            return
        made = "do not say until when" if own_ms is None else f"were made of events until {date_of(own_ms)}"
        date = date_of(until_ms)
        raise DatasetError(
            f"the vectors {made}, and here they may know only events before {date}, so that nothing is measured on "
            f"what they have seen; make them with `pinrank embed ... --before training`, or --before {date}"
        )


@dataclass(frozen=True, slots=True)
class SavedVectors:
    """The vectors of a file, with the pins in ascending order, and what it says about them."""

    embeddings: PinEmbeddings
    origin: VectorsOrigin

    def refuse_after(self, until_ms: int) -> None:
        """See `VectorsOrigin.refuse_after`."""
        self.origin.refuse_after(until_ms)


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
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; write vectors with `pinrank embed`")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read as a Parquet file: {error}; write it again") from error
    origin = _origin(path, table.schema)
    if origin.entity != entity:
        raise DatasetError(f"{path} has vectors of {origin.entity}s, and those of {entity}s are needed")
    try:
        ids = entity_ids(table.column(_IDS[entity]).combine_chunks())
        vectors = field_values(Embedding(name="own", space=origin.space), table.column(_VECTORS).combine_chunks())
    except KeyError as error:
        raise DatasetError(f"{path} lacks a column {error.args[0]}; write it with `pinrank embed`") from error
    except ColumnError as error:
        where = "" if error.row is None else f", row {error.row} (the first is 0)"
        raise DatasetError(f"{path}{where}: {error}; write it with `pinrank embed`") from error
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        raise DatasetError(f"{path} has {entity} {ids[twice[0]]} more than once; keep one of its vectors")
    return ids, vectors[order], origin


def _origin(path: Path, schema: Any) -> VectorsOrigin:
    held = (schema.metadata or {}).get(VECTORS_KEY)
    if held is None:
        raise DatasetError(
            f"{path} does not say of which embedding space its vectors are, so nothing can be compared with them; "
            "`pinrank embed` writes files that do"
        )
    try:
        return VectorsOrigin.model_validate(json.loads(held))
    except (ValueError, ValidationError) as error:
        raise DatasetError(f"{path}: what it says about its vectors cannot be read: {error}") from error
