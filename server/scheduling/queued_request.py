"""A request that waits for its scores, and the engine runs that score it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np

from kernels.engine import EngineError, FeatureBatch
from model_store.model.loaded import LoadedModel
from server.errors import ScoringError
from server.scheduling.contract import Piece, Ticket


class RequestScores(NamedTuple):
    """One request's scores.

    Attributes:
        logits: float32[N, H].
        run_s: seconds from the start of its first run to the end of its last.
        ended_s: when the last one ended, on the runner's clock.
    """

    logits: np.ndarray
    run_s: float
    ended_s: float


#: Entries of answered requests that may stay in `Deadlines` in any case.
_SPARE = 64
NO_LOGITS = np.empty((0, 0), np.float32)


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request that waits for scores; guarded by the runner's lock."""

    ticket: Ticket
    model: LoadedModel
    batch: FeatureBatch
    offered_s: float
    answer: asyncio.Future[RequestScores]
    rows_left: int
    logits: np.ndarray = field(default_factory=lambda: NO_LOGITS)
    started_s: float = float("inf")
    #: When the caller cancelled or the deadline passed.
    gone_s: float = float("inf")

    def take(self, piece: Piece, logits: np.ndarray, started_s: float) -> None:
        """Store a piece's logits in the rows of the piece."""
        if piece.rows == self.batch.rows:
            self.logits = logits
        else:
            if self.logits is NO_LOGITS:
                self.logits = np.empty((self.batch.rows, logits.shape[1]), np.float32)
            self.logits[piece.start : piece.stop] = logits
        self.started_s = min(self.started_s, started_s)
        self.rows_left -= piece.rows


class Deadlines:
    """The deadlines of waiting requests, of which only the earliest needs a timer."""

    def __init__(self) -> None:
        #: Deadline and ticket number of requests, as a heap. Requests that were answered early stay until they are
        #: more than half of it, or until their deadline.
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, number: int, deadline_s: float, waiting: Collection[int]) -> bool:
        """Add a request; return whether its deadline is the earliest. `waiting` holds the requests that still count."""
        if len(self._heap) > _SPARE + 2 * len(waiting):
            self._heap = [entry for entry in self._heap if entry[1] in waiting]
            heapify(self._heap)
        heappush(self._heap, (deadline_s, number))
        return self._heap[0][1] == number

    def passed(self, now_s: float, waiting: Collection[int]) -> list[int]:
        """Remove and return the numbers of all waiting requests whose deadline has passed."""
        found = []
        while self._heap and (self._heap[0][0] <= now_s or self._heap[0][1] not in waiting):
            number = heappop(self._heap)[1]
            if number in waiting:
                found.append(number)
        return found

    @property
    def next_s(self) -> float | None:
        """The earliest deadline, or None if there is none."""
        return self._heap[0][0] if self._heap else None


#: A piece of a run, and the request that it belongs to.
Member = tuple[Piece, QueuedRequest]


def run_members(members: list[Member]) -> np.ndarray | Exception:
    """Score the remaining members of a run; return logits (float32[N, H]) or the error for its requests."""
    if not members:
        return NO_LOGITS
    try:
        batch = FeatureBatch.concat([waiting.batch.piece(piece.start, piece.stop) for piece, waiting in members])
        logits = members[0][1].model.engine.run(batch)
        if len(logits) != batch.rows:
            raise EngineError(f"the engine returned {len(logits)} rows for {batch.rows}")
        return logits
    except EngineError as error:
        rows = sum(piece.rows for piece, _ in members)
        failed = ScoringError(f"the engine failed in a run of {rows} rows; see the server's log for the cause")
        failed.__cause__ = error  # kept out of the message, as it may quote a row
        return failed
    except BaseException as error:  # noqa: BLE001 - no error of a run may end a stream, not even SystemExit
        return error if isinstance(error, Exception) else ScoringError(f"the engine raised {type(error).__name__}")
