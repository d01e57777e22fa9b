"""Edges of a bipartite graph, read in batches: a pin and a context that it shares with other pins.

A context is whatever brings pins together: a user who acted on them, a board that holds them, a session that saw them.
An edge that occurs several times is as many edges: walks take it as often.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_client.bulk.columns import ColumnError, entity_ids
from feature_client.bulk.row_groups import batches
from ranker.data.actions import ActionLog
from ranker.errors import DatasetError

CONTEXT, PIN = "context_id", "pin_id"
_BATCH_EDGES, _BATCH_LINES = 1 << 20, 1 << 14

#: uint64[N] contexts and uint64[N] pins.
Batch = tuple[np.ndarray, np.ndarray]


class Edges(Protocol):
    """A source of edges that can be read several times, in the same order.

    Attributes:
        until_ms: Unix time in milliseconds; all edges are of events before it. None if they have no times.
    """

    @property
    def until_ms(self) -> int | None: ...

    def batches(self) -> Iterator[Batch]:
        """Yield all edges. Raises DatasetError if they cannot be read."""


@dataclass(frozen=True, slots=True)
class LogEdges:
    """The events of a log whose action says that the user liked the pin; the contexts are its users.

    Attributes:
        log: the log.
        until_ms: only events before this Unix time in milliseconds; None for all.
        since_ms: only events from this time on; None for all.
    """

    log: ActionLog
    until_ms: int | None
    since_ms: int | None = None

    def batches(self) -> Iterator[Batch]:
        first = 0 if self.since_ms is None else self.log.before(self.since_ms)
        stop = len(self.log.time_ms) if self.until_ms is None else self.log.before(self.until_ms)
        liked = self.log.schema.affinities > 0
        for start in range(first, stop, _BATCH_EDGES):
            part = slice(start, min(start + _BATCH_EDGES, stop))
            chosen = liked[self.log.action[part]]
            yield self.log.user_ids[self.log.user[part][chosen]], self.log.pin_ids[self.log.pin[part][chosen]]


@dataclass(frozen=True, slots=True)
class ParquetEdges:
    """A Parquet file with the columns `context_id` and `pin_id`, whole numbers."""

    path: Path
    until_ms: int | None = None

    def batches(self) -> Iterator[Batch]:
        try:
            parquet = pq.ParquetFile(self.path, page_checksum_verification=True)
            lacking = {CONTEXT, PIN} - set(parquet.schema_arrow.names)
            if lacking:
                raise DatasetError(
                    f"{self.path} lacks the column {min(lacking)}; edges have {CONTEXT} and {PIN}, whole numbers"
                )
            for batch in batches(parquet, _BATCH_EDGES, [CONTEXT, PIN]):
                yield self._ids(batch, CONTEXT), self._ids(batch, PIN)
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{self.path} cannot be read as a Parquet file: {error}; write it again") from error

    def _ids(self, batch: pa.RecordBatch, column: str) -> np.ndarray:
        try:
            return entity_ids(batch.column(column))
        except ColumnError as error:
            raise DatasetError(f"{self.path}, column {column}: {error}") from error


@dataclass(frozen=True, slots=True)
class ListEdges:
    """A text file with a line for each context: its number, and those of its pins, with blanks between them."""

    path: Path
    until_ms: int | None = None

    def batches(self) -> Iterator[Batch]:
        try:
            with self.path.open("rb") as file:
                first = 1
                while lines := list(islice(file, _BATCH_LINES)):
                    yield self._batch(lines, first)
                    first += len(lines)
        except OSError as error:
            raise DatasetError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def _batch(self, lines: list[bytes], first: int) -> Batch:
        contexts, pins = [], []
        for number, line in enumerate(lines, first):
            try:
                context, *held = map(int, line.split())
                contexts.append(np.full(len(held), context, np.uint64))
                pins.append(np.array(held, np.uint64))
            except (ValueError, OverflowError) as error:
                raise DatasetError(
                    f"{self.path}, line {number}: expected whole numbers from 0 to 2^64 - 1, a context and then its "
                    f"pins, with blanks between them ({error})"
                ) from error
        return np.concatenate(contexts), np.concatenate(pins)


def edges_in(path: Path) -> Edges:
    """Return the edges of a Parquet file, or of a text file of lists."""
    return ListEdges(path) if path.suffix == ".txt" else ParquetEdges(path)
