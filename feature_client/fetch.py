"""The fetch of a request's features: first the user's, then those of the pins that the near caches do not hold."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from feature_client.action_times import clock_ms, without_future
from feature_client.codec import Rows, RowState, decode_rows, decode_sequence
from feature_client.features import FeatureNeeds, FetchedFeatures
from feature_client.groups import FeatureGroup, SequenceGroup
from feature_client.near_cache import Flight, NearCache
from feature_client.stores.store import Store, StoreUnavailableError


async def fetch(
    store: Store,
    needs: FeatureNeeds,
    user_id: int,
    pin_ids: np.ndarray,
    query_pin_id: int | None = None,
    budget_s: float | None = None,
    near: Mapping[bytes, NearCache] | None = None,
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
    """
    reads = _StoreReads(store, budget_s)
    keys = [group.key(user_id) for group in needs.user_groups]
    if needs.sequence is not None:
        keys.append(needs.sequence.key(user_id))
    values, _ = await reads.multi_get(keys)
    users = {g.name: decode_rows(g, [value]) for g, value in zip(needs.user_groups, values, strict=False)}
    future = 0
    if needs.sequence is None:
        events, sequence_state = np.empty(0, SequenceGroup.dtype), RowState.PRESENT
    else:
        stored, sequence_state = decode_sequence(needs.sequence, values[-1])
        events = without_future(stored, clock_ms())
        future = len(stored) - len(events)
        events = events[max(0, len(events) - needs.sequence_length) :][::-1]

    wanted = [pin_ids, events["pin_id"]]
    if query_pin_id is not None:
        wanted.append(np.array([query_pin_id], np.uint64))
    pins, stale = await _pins(reads, needs.pin_groups, np.concatenate(wanted), near or {})
    has_query_pin = query_pin_id is not None
    return FetchedFeatures(
        users, pins, len(pin_ids), events, has_query_pin, sequence_state, reads.failure, stale, future
    )


async def _pins(
    reads: _StoreReads, groups: tuple[FeatureGroup, ...], ids: np.ndarray, near: Mapping[bytes, NearCache]
) -> tuple[dict[str, Rows], int]:
    """Get the rows of each group from its near cache, and read those of all groups that it lacks from the store.

    Returns:
        Rows by group, in the order of `ids`; and how many of them are stale and were used because the store could not
        be read.
    """
    now_s = asyncio.get_running_loop().time()
    found: dict[str, Rows] = {}
    absent_pins: list[_AbsentPins] = []
    for group in groups:
        cache = near.get(group.fingerprint)
        absent: np.ndarray | None = np.ones(len(ids), bool)
        if cache is None:
            rows = Rows(np.empty(len(ids), group.dtype), np.empty(len(ids), np.uint8))
        else:
            rows, absent = cache.get(ids, now_s)
        found[group.name] = rows
        if absent is not None and len(ids):
            absent_pins.append(_AbsentPins(group, cache, rows, absent, ids))
    if not absent_pins:
        return found, 0
    await _read_absent(reads, absent_pins, now_s)
    return found, sum(pins.fill_in(now_s) for pins in absent_pins)


async def _read_absent(reads: _StoreReads, absent_pins: Sequence[_AbsentPins], now_s: float) -> None:
    """Read the pins of all groups, but wait for those that another request is already reading."""
    joined = [] if reads.local else [(pins, *join) for pins in absent_pins for join in pins.join_flights()]
    await _read_owed(reads, absent_pins, now_s)
    for pins, flight, theirs in joined:
        pins.land(flight, theirs, await reads.landed(flight))
    if any(pins.owed.any() for pins, *_ in joined):
        await _read_owed(reads, absent_pins, now_s)


async def _read_owed(reads: _StoreReads, absent_pins: Sequence[_AbsentPins], now_s: float) -> None:
    """Read the owed pins of all groups from the store in one call."""
    try:
        keys = [pins.begin_read(shared=not reads.local) for pins in absent_pins]
        values, lost = await reads.multi_get(list(chain.from_iterable(keys)))
        start = 0
        for pins, own in zip(absent_pins, keys, strict=True):
            stop = start + len(own)
            pins.take(values[start:stop], lost[start:stop], now_s)
            start = stop
    finally:
        for pins in absent_pins:
            pins.end_read()


class _AbsentPins:
    """The pins of one request that the near cache of one group does not hold, and the rows that are read for them.

    Attributes:
        owed: bool[U], the distinct pins that this request has yet to read from the store itself.
    """

    def __init__(
        self, group: FeatureGroup, cache: NearCache | None, found: Rows, absent: np.ndarray, ids: np.ndarray
    ) -> None:
        """Prepare the reads.

        Args:
            group: the group of the rows.
            cache: its near cache, if it has one.
            found: the rows of the request, in the order of `ids`; `fill_in` completes them.
            absent: bool[M], which rows `found` lacks.
            ids: uint64[M], every pin that the request reads, with repetitions.
        """
        self._group, self._cache = group, cache
        self._found, self._absent = found, absent
        #: The absent pins once each, uint64[U] in ascending order, and the position of each absent row among them.
        self._distinct, self._index = np.unique(ids[absent], return_inverse=True)
        count = len(self._distinct)
        self._rows = Rows(np.empty(count, group.dtype), np.zeros(count, np.uint8))
        self.owed = np.ones(count, bool)
        self._lost = np.zeros(count, bool)
        self._flight: Flight | None = None
        self._landed: Rows | None = None

    def join_flights(self) -> Iterator[tuple[Flight, np.ndarray]]:
        """Yield each read in flight that covers owed pins, with bool[U], which ones. They are not owed any more."""
        for flight in self._cache.flights if self._cache is not None else ():
            theirs = self.owed & np.isin(self._distinct, flight.ids, assume_unique=True)
            if theirs.any():
                self.owed &= ~theirs
                yield flight, theirs

    def land(self, flight: Flight, theirs: np.ndarray, rows: Rows | None) -> None:
        """Take the rows that another request's read returned; if it failed, these pins are owed again."""
        if rows is None:
            self.owed |= theirs
        else:
            self._rows.put(theirs, rows.take(np.searchsorted(flight.ids, self._distinct[theirs])))

    def begin_read(self, *, shared: bool) -> list[bytes]:
        """Return the keys of the owed pins. If `shared`, other requests can wait for this read from now on."""
        ids = self._distinct[self.owed]
        if shared and self._cache is not None and len(ids):
            self._flight, self._landed = Flight(ids, asyncio.get_running_loop().create_future()), None
            self._cache.flights.append(self._flight)
        return self._group.keys(ids)

    def take(self, values: Sequence[bytes | None], lost: np.ndarray, now_s: float) -> None:
        """Decode the values of the owed pins and put them into the cache.

        Args:
            values: the values of the owed pins, in order.
            lost: bool of the same length, which values could not be read. The store may hold them, so the cache does
                not record them as missing.
            now_s: the time at which the values count as read.
        """
        if not values:
            return
        rows = decode_rows(self._group, values)
        self._rows.put(self.owed, rows)
        ids = self._distinct[self.owed]
        if lost.any():
            self._lost[self.owed] = lost
            ids, rows = ids[~lost], rows.take(~lost)
        else:
            self._landed = rows
        if self._cache is not None:
            self._cache.put(ids, rows, now_s)
        self.owed[:] = False

    def end_read(self) -> None:
        """Give the rows to the requests that wait for them, or None if the read was incomplete or cancelled."""
        flight, self._flight = self._flight, None
        if flight is None or self._cache is None:
            return
        self._cache.flights.remove(flight)
        if not flight.landed.done():
            flight.landed.set_result(self._landed)

    def fill_in(self, now_s: float) -> int:
        """Complete `found`, with aged rows from the cache in place of lost ones; return how many rows are aged."""
        aged = 0
        if self._cache is not None and self._lost.any():
            rows, known = self._cache.aged(self._distinct, now_s)
            usable = self._lost & known
            self._rows.put(usable, rows.take(usable))
            aged = int(np.count_nonzero(usable[self._index]))
        self._found.put(self._absent, self._rows.take(self._index))
        return aged


class _StoreReads:
    """The store reads of one request within one time budget. After a read that fails entirely, no more are sent."""

    def __init__(self, store: Store, budget_s: float | None) -> None:
        self._store = store
        self.local = store.local
        self._ends_s = None if budget_s is None else asyncio.get_running_loop().time() + budget_s
        self._gone = False
        self.failure: str | None = None

    async def multi_get(self, keys: list[bytes]) -> tuple[list[bytes | None], np.ndarray]:
        """Return the values and, as bool[N], which of them could not be read."""
        if keys and not self._gone:
            try:
                # A local store answers immediately; reading the clock would cost more than the read.
                left_s = None if self.local else self._left_s()
                return await self._store.multi_get(keys, left_s), np.zeros(len(keys), bool)
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
