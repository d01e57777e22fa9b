"""Live actions into users' stored sequences: each one once, in order of time, however often and late it comes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import structlog

from feature_client.action_times import clock_ms, without_future
from feature_client.codec import decode_sequence, encode_sequence
from feature_client.groups import SequenceGroup
from feature_client.stores.store import Store

_log = structlog.get_logger(__name__)

#: Actions of one write to the store: folding so many into sequences of 100 keeps the event loop from ranking for 1 ms.
_BATCH_MAX = 64
#: Actions that may wait for a write.
_WAITING_MAX = 20_000


class QueueFullError(Exception):
    """More actions wait to be written than the writer holds."""


class ActionOutcome(IntEnum):
    """What became of an action."""

    ADDED = 0
    #: Its event id was there before.
    REPEATED = 1
    #: Older than everything in a sequence that is full.
    TOO_OLD = 2


def fold(
    group: SequenceGroup, users: np.ndarray, events: np.ndarray, before: Sequence[bytes | None], now_ms: int
) -> tuple[list[bytes | None], np.ndarray, np.ndarray]:
    """Put events into sequences, and drop what should never have been stored: events in the future.

    A sequence is the newest `length_max` of all events that were ever folded, by time and event id, each id once: so it
    does not matter in which order they come, nor whether they come again. A stored value that is not this group's is
    replaced.

    Args:
        group: whose sequences these are.
        users: int64[E], positions in `before`.
        events: structured[E] of `SequenceGroup.dtype`; of two with one id, other than 0, the first counts.
        before: stored values by user.
        now_ms: Unix time; `events` are not in the future of it (`time_problem`).

    Returns:
        The values to store, None where nothing changes; uint8[E], an `ActionOutcome` for each event; and int64[U], how
        many stored events were dropped, by user.
    """
    decoded = [decode_sequence(group, value)[0] for value in before]
    stored = [without_future(found, now_ms) for found in decoded]
    dropped = np.array([len(found) - len(left) for found, left in zip(decoded, stored, strict=True)], np.int64)
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
    outcome = np.where(repeated, ActionOutcome.REPEATED, ActionOutcome.TOO_OLD).astype(np.uint8)
    outcome[kept] = ActionOutcome.ADDED
    after: list[bytes | None] = [None] * len(before)
    changed = np.union1d(user[kept[kept >= first_new]], np.flatnonzero(dropped))
    for i in changed:
        after[i] = encode_sequence(group, event[order[starts[i] : ends[i]]])
    return after, outcome[first_new:], dropped


class ActivityWriter:
    """Writes actions to a store, many callers' together; a caller hears when its own are stored. One event loop's."""

    def __init__(self, store: Store, group: SequenceGroup, on_dropped: Callable[[int], None] = lambda _: None) -> None:
        """Remember; `on_dropped` hears how many stored actions in the future a write dropped."""
        self._store = store
        self._on_dropped = on_dropped
        self._group = group
        self._waiting: deque[_QueuedActions] = deque()
        self._waiting_actions = 0
        self._writing: asyncio.Task[None] | None = None

    async def record(self, user_ids: np.ndarray, events: np.ndarray) -> np.ndarray:
        """Store actions; once this returns, every reader of the store sees them.

        Args:
            user_ids: uint64[E], whose.
            events: structured[E] of `SequenceGroup.dtype`.

        Returns:
            uint8[E], an `ActionOutcome` each.

        Raises:
            QueueFullError: they were not taken.
            StoreError: they may not have been stored; sending them again does no harm.
        """
        if not len(events):
            return np.zeros(0, np.uint8)
        if self._waiting and self._waiting_actions + len(events) > _WAITING_MAX:
            raise QueueFullError(f"{self._waiting_actions} actions wait to be stored; send again in a second")
        self._waiting_actions += len(events)
        done: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append(_QueuedActions(user_ids, events, np.zeros(len(events), np.uint8), done))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        return await done

    async def _write(self) -> None:
        """Write what waits, as long as something does; what comes meanwhile goes into the next batch."""
        while self._waiting:
            batch = self._next_batch()
            if not batch:
                return
            try:
                written = await write_events(
                    self._store,
                    self._group,
                    np.concatenate([waiting.user_ids[part] for waiting, part in batch]),
                    np.concatenate([waiting.events[part] for waiting, part in batch]),
                    clock_ms(),
                )
            except Exception as error:  # noqa: BLE001 - whatever it is, the callers hear of it, and the next are served
                for waiting, _ in batch:
                    if not waiting.done.done():  # done: the caller hung up
                        waiting.done.set_exception(error)
            else:
                if written.dropped:
                    self._on_dropped(written.dropped)
                start = 0
                for waiting, part in batch:
                    length = part.stop - part.start
                    waiting.outcome[part] = written.outcomes[start : start + length]
                    start += length
                    if part.stop == len(waiting.events) and not waiting.done.done():
                        waiting.done.set_result(waiting.outcome)
            await asyncio.sleep(0)  # a store in memory has nothing to wait for

    def _next_batch(self) -> list[tuple[_QueuedActions, slice]]:
        """Take actions for one write from those who wait; who has more than fit goes to the end of the line."""
        batch: list[tuple[_QueuedActions, slice]] = []
        room = _BATCH_MAX
        while self._waiting and room:
            waiting = self._waiting.popleft()
            left = len(waiting.events) - waiting.taken
            if waiting.done.done():  # it hung up, or heard of a failure: nobody counts on the rest
                self._waiting_actions -= left
                continue
            size = min(room, left)
            batch.append((waiting, slice(waiting.taken, waiting.taken + size)))
            waiting.taken += size
            room -= size
            self._waiting_actions -= size
            if size < left:
                self._waiting.append(waiting)
        return batch


@dataclass(slots=True, eq=False)
class _QueuedActions:
    """A caller's actions, how many of them were taken for a write, and what became of those that were written."""

    user_ids: np.ndarray
    events: np.ndarray
    outcome: np.ndarray
    done: asyncio.Future[np.ndarray]
    taken: int = 0


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What a write did.

    Attributes:
        outcomes: uint8[E], an `ActionOutcome` for each event.
        dropped: stored actions in the future that it left out of what it wrote.
    """

    outcomes: np.ndarray
    dropped: int


async def write_events(
    store: Store, group: SequenceGroup, user_ids: np.ndarray, events: np.ndarray, now_ms: int
) -> WriteResult:
    """Fold events into their users' stored sequences; arguments and errors as of `ActivityWriter.record` and `fold`."""
    distinct, owner = np.unique(user_ids, return_inverse=True)
    outcomes, dropped = np.zeros(len(events), np.uint8), np.zeros(len(distinct), np.int64)

    def change(positions: Sequence[int], before: list[bytes | None]) -> list[bytes | None]:
        place = np.full(len(distinct), -1)
        place[positions] = np.arange(len(positions))
        own = np.flatnonzero(place[owner] >= 0)
        after, outcomes[own], dropped[positions] = fold(group, place[owner[own]], events[own], before, now_ms)
        return after

    await store.update(group.keys(distinct), change)
    if dropped.any():
        users, count = int(np.count_nonzero(dropped)), int(dropped.sum())
        _log.warning("stored_actions_in_the_future_dropped", group=group.ref, users=users, actions=count)
    return WriteResult(outcomes, int(dropped.sum()))
