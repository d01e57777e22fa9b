"""The fetch of a request's features: its user's, and those of the pins that the near caches do not hold.

The candidates are known from the start, so they are read with the user, in one round trip. The pins of the user's
actions are only known then; those that neither the near caches nor the first read hold need a second one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np

from feature_client.action_times import clock_ms
from feature_client.codec import NewestEvents, Rows, RowState, decode_row, newest_events
from feature_client.features import FetchedFeatures
from feature_client.groups import FeatureGroup, FeatureNeeds, SequenceGroup
from feature_client.near_cache import Flight, NearCache
from feature_client.packed_fetch import Packed, PackedFetch, PackedRows
from feature_client.pin_rows import Join, PinRows
from feature_client.stores.store import Store, StoreUnavailableError
from feature_client.values.keys import Keys

_NO_EVENTS = NewestEvents(np.empty(0, SequenceGroup.dtype), RowState.PRESENT, 0)


async def fetch(
    store: Store,
    needs: FeatureNeeds,
    user_id: int,
    pin_ids: np.ndarray,
    query_pin_id: int | None = None,
    budget_s: float | None = None,
    near: Mapping[bytes, NearCache] | None = None,
    packed: PackedFetch | None = None,
) -> FetchedFeatures:
    """Read the features of one request. A store that fails raises no error here: what it owes counts as missing.

    Args:
        store: a started store.
        needs: the groups that the model reads.
        user_id: the user.
        pin_ids: uint64[N], the candidates, all different.
        query_pin_id: the pin that is the query, if there is one.
        budget_s: how many seconds all reads together may take before the store counts as unavailable; None sets no
            limit.
        near: near caches by the fingerprint of their group. A group without one is read from the store.
        packed: how to read these groups and caches in one call, if the store is local and it is known.
    """
    now_s = asyncio.get_running_loop().time()
    reads = _StoreReads(store, None if budget_s is None else now_s + budget_s)
    if packed is not None and reads.local:
        return await _fetch_packed(packed, reads, user_id, pin_ids, query_pin_id, near or {}, now_s)
    pins = _Pins(reads, needs.pin_groups, near or {}, now_s)
    query = () if query_pin_id is None else (np.array([query_pin_id], np.uint64),)
    if not reads.local:
        pins.look_up(np.concatenate((pin_ids, *query)) if query else pin_ids)
    keys = [group.key(user_id) for group in needs.user_groups]
    if needs.sequence is not None:
        keys.append(needs.sequence.key(user_id))
    values = (await reads.multi_get(keys))[0] if reads.local else await pins.read(keys)
    users = {group.name: decode_row(group, values[i]) for i, group in enumerate(needs.user_groups)}
    newest, read_ms = _NO_EVENTS, clock_ms()
    if needs.sequence is not None:
        newest = newest_events(needs.sequence, values[len(keys) - 1], needs.sequence_length, read_ms)
    event_pins = newest.events["pin_id"]
    if reads.local:
        # A second read costs less than a second look into the near caches.
        pins.look_up(np.concatenate((pin_ids, event_pins, *query)))
    else:
        pins.look_up(np.ascontiguousarray(event_pins))
    if not pins.complete:
        await pins.read_rest()
    rows, stale = pins.finish(len(pin_ids))
    return FetchedFeatures(
        users, rows, len(pin_ids), newest.events, query_pin_id is not None, newest.state, read_ms, reads.failure,
        stale, newest.future,
    )  # fmt: skip


async def _fetch_packed(
    fetch: PackedFetch,
    reads: _StoreReads,
    user_id: int,
    pin_ids: np.ndarray,
    query_pin_id: int | None,
    near: Mapping[bytes, NearCache],
    now_s: float,
) -> FetchedFeatures:
    """Do the same from a local store: in one native call, unless a near cache lacks a row."""
    values, _ = await reads.multi_get(fetch.keys(user_id))
    packed = fetch.read(values, pin_ids, query_pin_id, now_s, clock_ms())
    if not any(packed.absent):
        return _features(packed, reads.failure)
    pins = _Pins(reads, fetch.needs.pin_groups, near, now_s)
    pins.look_up(packed.ids(), packed.lookups())
    await pins.read_rest()
    rows, stale = pins.finish(packed.candidates)
    return _features(packed, reads.failure, rows, stale)


def _features(
    packed: Packed, failure: str | None, completed: Mapping[str, Rows] | None = None, stale: int = 0
) -> FetchedFeatures:
    """Return what was read; `completed` are the pins' rows, if the near caches lacked some."""
    fetch, (events, state, future) = packed.fetch, packed.newest
    return FetchedFeatures(
        PackedRows(fetch.user_names, packed.user_rows),
        PackedRows(fetch.pin_names, packed.pin_rows) if completed is None else completed,
        packed.candidates,
        events,
        packed.pins > packed.candidates + len(events),
        state,
        packed.read_ms,
        failure,
        stale,
        future,
        packed if completed is None else None,
    )


class _Pins:
    """The pins of one request, in one or two lookups: the second one is of the pins of the user's actions.

    Attributes:
        complete: whether the near caches hold all of them.
    """

    def __init__(
        self, reads: _StoreReads, groups: tuple[FeatureGroup, ...], near: Mapping[bytes, NearCache], now_s: float
    ) -> None:
        self._reads, self._groups, self._near, self._now_s = reads, groups, near, now_s
        self.complete = True
        self._lookups: list[list[PinRows]] = []
        #: Reads of other requests that this one waits for.
        self._joined: list[tuple[PinRows, Join]] = []

    def look_up(self, ids: np.ndarray, asked: Sequence[tuple[Rows, np.ndarray | None]] | None = None) -> None:
        """Look pins up in the near caches, and join the reads in flight that cover absent ones.

        Args:
            ids: uint64[M], with or without repetitions.
            asked: what the near caches returned, if they were asked already.
        """
        nothing = [None] * len(self._groups)
        earlier: list[PinRows] | list[None] = self._lookups[-1] if self._lookups else nothing
        found = [
            PinRows(group, self._near.get(group.fingerprint), ids, self._now_s, before, found)
            for group, before, found in zip(self._groups, earlier, asked or nothing, strict=True)
        ]
        self._lookups.append(found)
        for rows in found:
            if rows.owed:
                self.complete = False
                if not self._reads.local:
                    self._joined += [(rows, join) for join in rows.join_flights()]

    async def read(self, keys: Sequence[bytes] = ()) -> Sequence[bytes | None]:
        """Read these keys and all owed pins from the store in one call. The first values are those of the keys."""
        owing = [rows for lookup in self._lookups for rows in lookup if rows.owed]
        if not keys and not owing:
            return []
        try:
            runs = [rows.begin_read(shared=not self._reads.local) for rows in owing]
            values, lost = await self._reads.multi_get(Keys(keys, runs) if runs else keys)
            start = len(keys)
            for rows, run in zip(owing, runs, strict=True):
                stop = start + len(run.ids)
                rows.take(run.ids, values[start:stop], None if lost is None else lost[start:stop])
                start = stop
        finally:
            for rows in owing:
                rows.end_read()
        return values

    async def read_rest(self) -> None:
        """Read the owed pins, and wait for those that other requests are already reading."""
        await self.read()
        for rows, join in self._joined:
            rows.land(join, await self._reads.landed(join.flight))
        if self._joined:
            await self.read()

    def finish(self, candidates: int) -> tuple[dict[str, Rows], int]:
        """Return the rows by group, in the order of `FetchedFeatures`; and how many are stale."""
        made, stale = dict[str, Rows](), 0
        for group, *lookups in zip(self._groups, *self._lookups, strict=True):
            rows, aged = lookups[0].finish()
            stale += aged
            if len(lookups) > 1:
                events, aged = lookups[1].finish()
                stale += aged
                rows = rows.with_inserted(candidates, events)
            made[group.name] = rows
        return made, stale


class _StoreReads:
    """The store reads of one request within one time budget. After a read that fails entirely, no more are sent."""

    def __init__(self, store: Store, ends_s: float | None) -> None:
        self._store = store
        self.local = store.local
        self._ends_s = ends_s
        self._gone = False
        self.failure: str | None = None

    async def multi_get(self, keys: Sequence[bytes]) -> tuple[Sequence[bytes | None], np.ndarray | None]:
        """Return the values and, as bool[N], which of them could not be read; None if all could."""
        if not self._gone:
            try:
                # A local store answers immediately; reading the clock would cost more than the read.
                left_s = None if self.local else self._left_s()
                return await self._store.multi_get(keys, left_s), None
            except StoreUnavailableError as error:
                self.failure = str(error)
                if error.values is not None:
                    lost = np.zeros(len(keys), bool)
                    lost[error.lost] = True
                    return error.values, lost
                self._gone = True
        return [None] * len(keys), np.ones(len(keys), bool)

    async def landed(self, flight: Flight) -> Rows | None:
        """Wait for another request's read within the budget. Return None if it failed or took too long."""
        done, _ = await asyncio.wait([flight.landed], timeout=self._left_s())
        return flight.landed.result() if done else None

    def _left_s(self) -> float | None:
        return None if self._ends_s is None else max(0.0, self._ends_s - asyncio.get_running_loop().time())
