"""Live actions into users' stored sequences: each one once, in order of time, however often and late it comes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from feature_client.codec import decode_sequence, encode_sequence
from feature_client.groups import SequenceGroup
from feature_client.store import Store

#: Actions of one write to the store: folding more at once would keep the event loop from ranking for milliseconds.
_BATCH_MAX = 256
#: Actions that may wait for a write.
_WAITING_MAX = 20_000


class QueueFullError(Exception):
    """More actions wait to be written than the writer holds."""


class Outcome(IntEnum):
    """What became of an action."""

    ADDED = 0
    #: Its event id was there before.
    REPEATED = 1
    #: Older than everything in a sequence that is full.
    TOO_OLD = 2


def fold(
    group: SequenceGroup, users: np.ndarray, events: np.ndarray, before: Sequence[bytes | None]
) -> tuple[list[bytes | None], np.ndarray]:
    """Put events into sequences.

    A sequence is the newest `length_max` of all events that were ever folded, by time and event id, each id once: so it
    does not matter in which order they come, nor whether they come again. A stored value that is not this group's is
    replaced.

    Args:
        group: whose sequences these are.
        users: int64[E], positions in `before`.
        events: structured[E] of `SequenceGroup.dtype`; of two with one id, other than 0, the first counts.
        before: stored values by user.

    Returns:
        The values to store, None where nothing changes, and uint8[E], an `Outcome` for each event.
    """
    stored = [decode_sequence(group, value)[0] for value in before]
    lengths = [len(found) for found in stored]
    user = np.concatenate([np.repeat(np.arange(len(before)), lengths), users])
    event = np.concatenate([*stored, events])
    first_new = sum(lengths)
    # What is stored stands before what is new: lexsort keeps that order among equal ids.
    by_id = np.lexsort((event["event_id"], user))
    ids, owners = event["event_id"][by_id], user[by_id]
    repeated = np.zeros(len(event), bool)
    repeated[by_id[1:]] = (ids[1:] == ids[:-1]) & (owners[1:] == owners[:-1]) & (ids[1:] != 0)
    # Newest first within each user; what was stored as a repetition stays, as it has its place already.
    order = np.lexsort((event["event_id"], event["time_ms"], user))
    order = order[~repeated[order] | (order < first_new)]
    starts, ends = (np.searchsorted(user[order], np.arange(len(before)), side=side) for side in ("left", "right"))
    from_end = ends[user[order]] - np.arange(len(order))
    kept = order[from_end <= group.length_max]
    outcome = np.where(repeated, Outcome.REPEATED, Outcome.TOO_OLD).astype(np.uint8)
    outcome[kept] = Outcome.ADDED
    after: list[bytes | None] = [None] * len(before)
    for i in np.unique(user[kept[kept >= first_new]]):
        after[i] = encode_sequence(group, event[order[starts[i] : ends[i]]])
    return after, outcome[first_new:]


class ActivityWriter:
    """Writes actions to a store, many callers' together; a caller hears when its own are stored. One event loop's."""

    def __init__(self, store: Store, group: SequenceGroup) -> None:
        self._store = store
        self._group = group
        self._waiting: deque[_Waiting] = deque()
        self._waiting_actions = 0
        self._writing: asyncio.Task[None] | None = None

    async def record(self, user_ids: np.ndarray, events: np.ndarray) -> np.ndarray:
        """Store actions; once this returns, every reader of the store sees them.

        Args:
            user_ids: uint64[E], whose.
            events: structured[E] of `SequenceGroup.dtype`.

        Returns:
            uint8[E], an `Outcome` each.

        Raises:
            QueueFullError: they were not taken.
            StoreError: they may not have been stored; sending them again does no harm.
        """
        if self._waiting and self._waiting_actions + len(events) > _WAITING_MAX:
            raise QueueFullError(f"{self._waiting_actions} actions wait to be stored; send again in a second")
        self._waiting_actions += len(events)
        waiting = _Waiting(user_ids, events, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        return await waiting.outcome

    async def _write(self) -> None:
        """Write what waits, as long as something does; what comes meanwhile goes into the next batch."""
        while self._waiting:
            batch = [self._waiting.popleft()]
            size = len(batch[0].events)
            while self._waiting and size + len(self._waiting[0].events) <= _BATCH_MAX:
                batch.append(self._waiting.popleft())
                size += len(batch[-1].events)
            self._waiting_actions -= size
            try:
                outcome = await write_events(
                    self._store,
                    self._group,
                    np.concatenate([waiting.user_ids for waiting in batch]),
                    np.concatenate([waiting.events for waiting in batch]),
                )
            except Exception as error:  # noqa: BLE001 - whatever it is, its callers wait for it and the next batch goes on
                for waiting in batch:
                    if not waiting.outcome.done():  # done: the caller hung up
                        waiting.outcome.set_exception(error)
                continue
            splits = np.cumsum([len(waiting.events) for waiting in batch])[:-1]
            for waiting, own in zip(batch, np.split(outcome, splits), strict=True):
                if not waiting.outcome.done():
                    waiting.outcome.set_result(own)


@dataclass(frozen=True, slots=True)
class _Waiting:
    user_ids: np.ndarray
    events: np.ndarray
    outcome: asyncio.Future[np.ndarray]


async def write_events(store: Store, group: SequenceGroup, user_ids: np.ndarray, events: np.ndarray) -> np.ndarray:
    """Fold events into their users' stored sequences; arguments, result and errors as of `ActivityWriter.record`."""
    distinct, owner = np.unique(user_ids, return_inverse=True)
    outcome = np.zeros(len(events), np.uint8)

    def change(positions: Sequence[int], before: list[bytes | None]) -> list[bytes | None]:
        place = np.full(len(distinct), -1)
        place[positions] = np.arange(len(positions))
        own = np.flatnonzero(place[owner] >= 0)
        after, outcome[own] = fold(group, place[owner[own]], events[own], before)
        return after

    await store.update(group.keys(distinct), change)
    return outcome
