"""The retention of recorded sequences in stores that do not expire values: a sweep, in small steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import structlog

from feature_client.action_times import clock_ms
from feature_client.groups import FINGERPRINT_BYTES, SequenceGroup
from feature_client.stores.store import SweptStore

_log = structlog.get_logger(__name__)

#: How many sequences a step looks at, the pause after each, and that after all. A million sequences take 20 minutes, in
#: steps of less than a millisecond.
_STEP, _PAUSE_S, _REST_S = 200, 0.25, 3_600.0
#: After how many steps the store notes how far the sweep has come.
_NOTE_STEPS = 100
_NOTED = b"pinrank:swept:"

_ITEM_BYTES = SequenceGroup.dtype.itemsize
assert SequenceGroup.dtype.fields is not None, "events have fields"  # noqa: S101
_TIME_FROM_END = _ITEM_BYTES - SequenceGroup.dtype.fields["time_ms"][1]


def is_over(group: SequenceGroup, value: bytes | memoryview, oldest_ms: int) -> bool:
    """Return whether a stored sequence has recorded actions, and its newest action is older than `oldest_ms`.

    Sequences that were only loaded in bulk have no end; the ids of their actions are 0, which no recorded action has.
    Nor have values of another description, which may be another server's.
    """
    if len(value) <= FINGERPRINT_BYTES or (len(value) - FINGERPRINT_BYTES) % _ITEM_BYTES:
        return False
    newest = value[-_TIME_FROM_END : 8 - _TIME_FROM_END]
    if int.from_bytes(newest, "little", signed=True) >= oldest_ms or value[:FINGERPRINT_BYTES] != group.fingerprint:
        return False
    return bool(np.frombuffer(value, SequenceGroup.dtype, offset=FINGERPRINT_BYTES)["event_id"].any())


class Sweeper:
    """Deletes recorded sequences whose newest action is too old. Belongs to one event loop.

    The sweep continues where an earlier one, also of another process, has ended.

    Attributes:
        read: how many sequences it has looked at.
        deleted: how many of them it has deleted.
    """

    def __init__(
        self,
        store: SweptStore,
        groups: Callable[[], Iterable[SequenceGroup]],
        lasts_s: float,
        *,
        step: int = _STEP,
        pause_s: float = _PAUSE_S,
        rest_s: float = _REST_S,
    ) -> None:
        """Prepare a sweep.

        Args:
            store: a started store.
            groups: returns the groups of the sequences.
            lasts_s: the age of its newest action from which a sequence is deleted.
            step: how many sequences to look at in one transaction.
            pause_s: the pause after each step.
            rest_s: the pause after all sequences.
        """
        self._store, self._groups, self._lasts_ms = store, groups, round(lasts_s * 1e3)
        self._step, self._pause_s, self._rest_s = step, pause_s, rest_s
        self.read = self.deleted = 0

    async def run(self) -> None:
        """Sweep again and again.

        Raises:
            StoreUnavailableError: the store failed; the next call goes on near the same place.
        """
        while True:
            for group in list(self._groups()):
                await self.sweep(group)
            await asyncio.sleep(self._rest_s)

    async def sweep(self, group: SequenceGroup) -> None:
        """Look at all sequences of a group from the noted place on, unless another process does.

        Raises:
            StoreUnavailableError: the store failed.
        """
        key = _NOTED + group.ref.encode()
        (found,) = await self._store.multi_get([key])
        start: bytes | None = found or group.key_prefix
        noted = start
        steps = deleted = 0
        while start is not None:
            over = partial(is_over, group, oldest_ms=clock_ms() - self._lasts_ms)
            swept = await self._store.sweep(group.key_prefix, start, self._step, over)
            if swept is None:
                return
            self.read += swept.read
            self.deleted += swept.deleted
            start, steps, deleted = swept.next, steps + 1, deleted + swept.deleted
            place = start or group.key_prefix
            if place != noted and (start is None or not steps % _NOTE_STEPS):
                await self._store.multi_put([(key, place)])
                noted = place
            await asyncio.sleep(self._pause_s)
        if deleted:
            _log.info("recorded_sequences_swept", group=group.ref, deleted=deleted)
