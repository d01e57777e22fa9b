"""The writer of live actions: it stores each action once and in order of time, however often or late it is sent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import structlog

from feature_client.action_times import clock_ms, without_future
from feature_client.activity.limits import Grants, WriteLimits
from feature_client.codec import decode_sequence, encode_sequence
from feature_client.groups import SequenceGroup
from feature_client.stores.store import Store

_log = structlog.get_logger(__name__)

#: The maximum number of actions per write. Folding that many into sequences of 100 blocks the event loop for 1 ms.
_BATCH_MAX = 64
#: How many actions may wait for a write.
_WAITING_MAX = 20_000


class QueueFullError(Exception):
    """Too many actions are waiting to be written."""


class ActionOutcome(IntEnum):
    """The outcome of an action."""

    ADDED = 0
    #: An action with the same event id is already stored.
    REPEATED = 1
    #: It is older than every action of a full sequence.
    TOO_OLD = 2
    #: Its user has no sequence yet, and too many users got one lately, or the store has no room for more.
    REFUSED_NEW_USER = 3
    #: Its user had too many new actions in a short time.
    REFUSED_TOO_MANY = 4


def fold(
    group: SequenceGroup, users: np.ndarray, events: np.ndarray, before: Sequence[bytes | None], now_ms: int
) -> tuple[list[bytes | None], np.ndarray, np.ndarray]:
    """Merge events into stored sequences, and drop stored events in the future.

    A sequence consists of the newest `length_max` of all events that were ever folded, ordered by time and event id,
    with each event id once. The result therefore does not depend on the order of the events or on repetitions. A stored
    value that was not written for this group is replaced.

    Args:
        group: the group of the sequences.
        users: int64[E], the position in `before` of each event's user.
        events: structured[E] of `SequenceGroup.dtype`. If two have the same id, other than 0, the first counts.
        before: the stored value of each user.
        now_ms: the Unix time. The times of `events` were checked against it (`time_problem`).

    Returns:
        The value to store for each user, None if nothing changes; uint8[E], the `ActionOutcome` of each event; and
        int64[U], how many stored events of each user were dropped.
    """
    decoded = [decode_sequence(group, value)[0] for value in before]
    stored = [without_future(found, now_ms) for found in decoded]
    dropped = np.array([len(found) - len(left) for found, left in zip(decoded, stored, strict=True)], np.int64)
    lengths = [len(found) for found in stored]
    user = np.concatenate([np.repeat(np.arange(len(before)), lengths), users])
    event = np.concatenate([*stored, events])
    first_new = sum(lengths)
    # Stored events precede new ones, and lexsort keeps that order among equal ids.
    by_id = np.lexsort((event["event_id"], user))
    ids, owners = event["event_id"][by_id], user[by_id]
    repeated = np.zeros(len(event), bool)
    repeated[by_id[1:]] = (ids[1:] == ids[:-1]) & (owners[1:] == owners[:-1]) & (ids[1:] != 0)
    # By user, then oldest first. A repetition that is already stored keeps its place.
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


def fold_granted(
    group: SequenceGroup,
    users: np.ndarray,
    events: np.ndarray,
    before: Sequence[bytes | None],
    now_ms: int,
    grants: Grants,
    positions: np.ndarray,
) -> tuple[list[bytes | None], np.ndarray, np.ndarray]:
    """Merge events into stored sequences as `fold` does, as far as limits admit new users and new actions.

    Takes and returns what `fold` does, and `grants`, what the write was granted so far, with the int64[U] `positions`
    in it of each user. Refused events are in no value.
    """
    new = np.array([value is None for value in before], bool)
    admitted = ~new
    if new.any():
        admitted[new] = grants.new_users(positions[new])
    outcome = np.full(len(events), ActionOutcome.REFUSED_NEW_USER, np.uint8)
    fits = admitted[users]
    after, outcome[fits], dropped = fold(group, users[fits], events[fits], before, now_ms)
    added = np.flatnonzero(outcome == ActionOutcome.ADDED)
    wanted = np.bincount(users[added], minlength=len(before))
    granted = grants.actions(positions, wanted)
    if (granted == wanted).all():
        return after, outcome, dropped
    stored, refused = [], set()
    for i in added.tolist():
        user = int(users[i])
        if granted[user]:
            granted[user] -= 1
            stored.append(i)
        else:
            refused.add((user, int(events["event_id"][i])))
            outcome[i] = ActionOutcome.REFUSED_TOO_MANY
    for i in np.flatnonzero(outcome == ActionOutcome.REPEATED).tolist():
        if (int(users[i]), int(events["event_id"][i])) in refused:
            outcome[i] = ActionOutcome.REFUSED_TOO_MANY
    after, _, dropped = fold(group, users[stored], events[stored], before, now_ms)
    return after, outcome, dropped


class ActivityWriter:
    """Writes the actions of many callers to a store in shared batches. A writer belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        group: SequenceGroup,
        on_dropped: Callable[[int], None] = lambda _: None,
        *,
        lasts_s: float | None = None,
        limits: WriteLimits | None = None,
    ) -> None:
        """Prepare a writer.

        Args:
            store: a started store that holds the sequences.
            group: the group of the sequences.
            on_dropped: called with how many stored actions in the future a write dropped.
            lasts_s: how long after its last write a sequence lasts, in a store that expires values; None is for ever.
            limits: what is stored at most in a short time; None has no limit.
        """
        self._store = store
        self._on_dropped = on_dropped
        self._group = group
        self._lasts_s, self._limits = lasts_s, limits
        self._waiting: deque[_QueuedActions] = deque()
        self._waiting_actions = 0
        self._writing: asyncio.Task[None] | None = None

    async def record(self, user_ids: np.ndarray, events: np.ndarray) -> np.ndarray:
        """Store actions. When this returns, every reader of the store sees them.

        Args:
            user_ids: uint64[E], the user of each action.
            events: structured[E] of `SequenceGroup.dtype`.

        Returns:
            uint8[E], the `ActionOutcome` of each action.

        Raises:
            QueueFullError: too many actions are waiting, so these were not accepted.
            StoreError: some actions may not have been stored. Sending them again does no harm.
        """
        if not len(events):
            return np.zeros(0, np.uint8)
        if self._waiting and self._waiting_actions + len(events) > _WAITING_MAX:
            raise QueueFullError(
                f"{self._waiting_actions} actions are waiting to be stored; send these again in a second"
            )
        self._waiting_actions += len(events)
        done: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append(_QueuedActions(user_ids, events, np.zeros(len(events), np.uint8), done))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        return await done

    async def _write(self) -> None:
        """Write batches until no action waits. Actions that arrive during a write join the next batch."""
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
                    lasts_s=self._lasts_s,
                    limits=self._limits,
                )
            except Exception as error:  # noqa: BLE001 - any error goes to the callers, and the next batch is written
                for waiting, _ in batch:
                    if not waiting.done.done():  # done means that the caller was cancelled
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
            await asyncio.sleep(0)  # a store in memory never yields to the event loop

    def _next_batch(self) -> list[tuple[_QueuedActions, slice]]:
        """Take the actions for one write. A caller whose actions do not all fit rejoins the queue at the end."""
        batch: list[tuple[_QueuedActions, slice]] = []
        room = _BATCH_MAX
        while self._waiting and room:
            waiting = self._waiting.popleft()
            left = len(waiting.events) - waiting.taken
            if waiting.done.done():  # cancelled, or told of a failure: nobody waits for the rest
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
    """The actions of one caller, how many of them were taken for writes, and the outcomes so far."""

    user_ids: np.ndarray
    events: np.ndarray
    outcome: np.ndarray
    done: asyncio.Future[np.ndarray]
    taken: int = 0


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The result of a write.

    Attributes:
        outcomes: uint8[E], the `ActionOutcome` of each event.
        dropped: how many stored actions in the future the write removed.
    """

    outcomes: np.ndarray
    dropped: int


async def write_events(
    store: Store,
    group: SequenceGroup,
    user_ids: np.ndarray,
    events: np.ndarray,
    now_ms: int,
    *,
    lasts_s: float | None = None,
    limits: WriteLimits | None = None,
) -> WriteResult:
    """Fold events into stored sequences. See `ActivityWriter` and `fold` for the arguments and errors."""
    distinct, owner = np.unique(user_ids, return_inverse=True)
    outcomes, dropped = np.zeros(len(events), np.uint8), np.zeros(len(distinct), np.int64)
    grants = None if limits is None else limits.begin(distinct, now_ms / 1e3)

    def change(positions: Sequence[int], before: Sequence[bytes | None]) -> list[bytes | None]:
        asked = np.asarray(positions)
        place = np.full(len(distinct), -1)
        place[asked] = np.arange(len(asked))
        own = np.flatnonzero(place[owner] >= 0)
        users = place[owner[own]]
        if grants is None:
            after, outcomes[own], dropped[asked] = fold(group, users, events[own], before, now_ms)
        else:
            after, outcomes[own], dropped[asked] = fold_granted(
                group, users, events[own], before, now_ms, grants, asked
            )
        return after

    await store.update(group.keys(distinct), change, lasts_s)
    if dropped.any():
        users, count = int(np.count_nonzero(dropped)), int(dropped.sum())
        _log.warning("stored_actions_in_the_future_dropped", group=group.ref, users=users, actions=count)
    return WriteResult(outcomes, int(dropped.sum()))
