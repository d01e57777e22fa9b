"""Reading everything one request needs: the user first, then the pins that the near caches do not hold."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from feature_client.activity.writer import clock_ms, without_future
from feature_client.codec import Rows, RowState, decode_rows, decode_sequence
from feature_client.groups import FeatureGroup, SequenceGroup
from feature_client.near_cache import Flight, NearCache
from feature_client.stores.store import Store, StoreUnavailableError


@dataclass(frozen=True, slots=True)
class FeatureNeeds:
    """What a model reads: at most one sequence, any number of groups per entity."""

    user_groups: tuple[FeatureGroup, ...]
    pin_groups: tuple[FeatureGroup, ...]
    sequence: SequenceGroup | None
    #: How many of the newest actions the model reads.
    sequence_length: int


@dataclass(frozen=True, slots=True)
class FetchedFeatures:
    """The features of one request.

    Attributes:
        user: one row per user group.
        pins: per pin group a row for each of the N candidates in the order they were asked for, then for each event's
            pin, then for the query pin.
        candidates: N.
        events: structured[K], the newest actions, newest first.
        has_query_pin: whether a pin is the query.
        sequence_state: what was found under the user's sequence.
        store_failure: why the store could not be read, if so; what it owed and no cache held is missing.
        stale_rows: pin rows that are older than the near caches allow while the store can be read.
        future_events: stored actions that were left out, as no clock shows their time yet.
    """

    user: Mapping[str, Rows]
    pins: Mapping[str, Rows]
    candidates: int
    events: np.ndarray
    has_query_pin: bool
    sequence_state: RowState
    store_failure: str | None = None
    stale_rows: int = 0
    future_events: int = 0

    def candidate_rows(self, group: str) -> np.ndarray:
        """Return structured[N]."""
        return self.pins[group].rows[: self.candidates]

    def event_rows(self, group: str) -> np.ndarray:
        """Return structured[K]."""
        return self.pins[group].rows[self.candidates : self.candidates + len(self.events)]

    def query_row(self, group: str) -> np.void | None:
        """Return the query pin's row; None without a query pin, or where it is not there."""
        if not self.has_query_pin or self.pins[group].states[-1] != RowState.PRESENT:
            return None
        row: np.void = self.pins[group].rows[-1]
        return row

    @property
    def store_unavailable(self) -> bool:
        return self.store_failure is not None

    def missing(self) -> MissingFeatures:
        """Count what is not there."""
        users = [int(rows.states[0]) for rows in self.user.values()]
        user_missing = any(state != RowState.PRESENT for state in users)
        foreign = users.count(RowState.FOREIGN) + (self.sequence_state == RowState.FOREIGN or self.future_events > 0)
        states = [rows.states for rows in self.pins.values() if rows.states.any()]
        if not states:
            return MissingFeatures(user_missing, 0, 0, query_pin=False, foreign=foreign)
        # A pin without a row in any group counts.
        lacking = np.logical_or.reduce([s != RowState.PRESENT for s in states])
        events_end = self.candidates + len(self.events)
        return MissingFeatures(
            user_missing,
            int(np.count_nonzero(lacking[: self.candidates])),
            int(np.count_nonzero(lacking[self.candidates : events_end])),
            self.has_query_pin and bool(lacking[-1]),
            foreign + sum(int(np.count_nonzero(s == RowState.FOREIGN)) for s in states),
        )


@dataclass(frozen=True, slots=True)
class MissingFeatures:
    """What of a request's features is not there.

    Attributes:
        user: a user group's row.
        candidates: how many candidates lack a row in some group.
        event_pins: how many actions' pins do.
        query_pin: the query pin does.
        foreign: stored values that were written for another group or embedding space, or that cannot be the group's;
            a sequence with actions in the future, which were left out, is one.
    """

    user: bool
    candidates: int
    event_pins: int
    query_pin: bool
    foreign: int


async def fetch(
    store: Store,
    needs: FeatureNeeds,
    user_id: int,
    pin_ids: np.ndarray,
    query_pin_id: int | None = None,
    budget_s: float | None = None,
    near: Mapping[bytes, NearCache] | None = None,
) -> FetchedFeatures:
    """Read one request's features; whatever the store cannot give is marked missing, never raised.

    Args:
        store: a started store.
        needs: what the model reads.
        user_id: the user.
        pin_ids: uint64[N], distinct candidates.
        query_pin_id: the pin that is the query, if a pin is.
        budget_s: seconds the reads may take together before the store counts as unavailable; None waits.
        near: caches by their group's fingerprint; groups without one are read from the store.
    """
    reads = _Reads(store, budget_s)
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
    reads: _Reads, groups: tuple[FeatureGroup, ...], ids: np.ndarray, near: Mapping[bytes, NearCache]
) -> tuple[dict[str, Rows], int]:
    """Read each group's rows, each id once: from its near cache, the rest in one read.

    Returns:
        Rows by group in the order of `ids`; and how many of them are older than the caches allow, used because the
        store could not be read.
    """
    now_s = asyncio.get_running_loop().time()
    found: dict[str, Rows] = {}
    absences: list[_Absence] = []
    for group in groups:
        cache = near.get(group.fingerprint)
        absent: np.ndarray | None = np.ones(len(ids), bool)
        if cache is None:
            rows = Rows(np.empty(len(ids), group.dtype), np.empty(len(ids), np.uint8))
        else:
            rows, absent = cache.get(ids, now_s)
        found[group.name] = rows
        if absent is not None and len(ids):
            distinct, index = np.unique(ids[absent], return_inverse=True)
            absences.append(_Absence(group, cache, absent, distinct, index))
    stale = 0
    if absences:
        for a, (read, aged) in zip(absences, await _read_absent(reads, absences, now_s), strict=True):
            found[a.group.name].put(a.absent, read.take(a.index))
            stale += int(np.count_nonzero(aged[a.index]))
    return found, stale


@dataclass(frozen=True, slots=True)
class _Absence:
    """Pins of one group that its near cache does not hold.

    Attributes:
        absent: bool[M], which of the wanted ids.
        distinct: uint64[U], these ids once each, ascending.
        index: int64 into `distinct`, one for each absent id.
    """

    group: FeatureGroup
    cache: NearCache | None
    absent: np.ndarray
    distinct: np.ndarray
    index: np.ndarray


async def _read_absent(reads: _Reads, absences: list[_Absence], now_s: float) -> list[tuple[Rows, np.ndarray]]:
    """Return for each absence the rows of its distinct ids, and bool[U], which of them are aged ones of the cache.

    What another request is reading already is waited for rather than read again.
    """
    read = [Rows(np.empty(len(a.distinct), a.group.dtype), np.zeros(len(a.distinct), np.uint8)) for a in absences]
    left = [np.ones(len(a.distinct), bool) for a in absences]
    joined = [
        (i, flight)
        for i, a in enumerate(absences)
        if a.cache is not None and not reads.local
        for flight in a.cache.flights
    ]
    shared: list[tuple[int, np.ndarray, Flight]] = []
    for i, flight in joined:
        both = left[i] & np.isin(absences[i].distinct, flight.ids, assume_unique=True)
        if both.any():
            left[i] &= ~both
            shared.append((i, both, flight))
    lost = await _read_own(reads, absences, left, read, now_s)
    again = [np.zeros(len(a.distinct), bool) for a in absences]
    for i, both, flight in shared:
        rows = await reads.landed(flight)
        if rows is None:
            again[i] |= both
            continue
        place = np.searchsorted(flight.ids, absences[i].distinct[both])
        read[i].put(both, rows.take(place))
    if any(mask.any() for mask in again):
        lost_again = await _read_own(reads, absences, again, read, now_s)
        lost = [one | other for one, other in zip(lost, lost_again, strict=True)]
    aged = []
    for a, rows, missing in zip(absences, read, lost, strict=True):
        usable = np.zeros(len(missing), bool)
        if a.cache is not None and missing.any():
            old, known = a.cache.aged(a.distinct, now_s)
            usable = missing & known
            rows.put(usable, old.take(usable))
        aged.append(usable)
    return list(zip(read, aged, strict=True))


async def _read_own(
    reads: _Reads, absences: list[_Absence], wanted: list[np.ndarray], into: list[Rows], now_s: float
) -> list[np.ndarray]:
    """Read wanted ids from the store, all groups in one call, into rows and caches; return bool[U] each, what was lost.

    Args:
        reads: of this request.
        absences: whose ids.
        wanted: bool[U] by absence.
        into: by absence; what is lost becomes the group's default row, MISSING.
        now_s: when these reads count as made.
    """
    ids = [a.distinct[mask] for a, mask in zip(absences, wanted, strict=True)]
    flights: list[tuple[NearCache, Flight]] = []
    for a, own in zip(absences, ids, strict=True):
        if a.cache is not None and len(own) and not reads.local:
            flight = Flight(own, asyncio.get_running_loop().create_future())
            a.cache.flights.append(flight)
            flights.append((a.cache, flight))
    landed: dict[int, Rows] = {}
    try:
        keys = [key for a, own in zip(absences, ids, strict=True) for key in a.group.keys(own)]
        values, gone = await reads.multi_get(keys)
        lost, start = [], 0
        for a, own, mask, rows in zip(absences, ids, wanted, into, strict=True):
            stop = start + len(own)
            decoded, own_gone = decode_rows(a.group, values[start:stop]), gone[start:stop]
            rows.put(mask, decoded)
            if a.cache is not None and not own_gone.any():
                a.cache.put(own, decoded, now_s)
                landed[id(own)] = decoded
            elif a.cache is not None:  # what a lost store owes is not missing
                there = ~own_gone
                a.cache.put(own[there], decoded.take(there), now_s)
            missing = np.zeros(len(mask), bool)
            missing[mask] = own_gone
            lost.append(missing)
            start = stop
    finally:
        for cache, flight in flights:
            cache.flights.remove(flight)
            if not flight.landed.done():
                flight.landed.set_result(landed.get(id(flight.ids)))
    return lost


class _Reads:
    """The reads of one request, within one budget; after a read that gave nothing the store is not asked again."""

    def __init__(self, store: Store, budget_s: float | None) -> None:
        self._store = store
        self.local = store.local
        self._ends_s = None if budget_s is None else asyncio.get_running_loop().time() + budget_s
        self._gone = False
        self.failure: str | None = None

    async def multi_get(self, keys: list[bytes]) -> tuple[list[bytes | None], np.ndarray]:
        """Return the values, and bool[N], which of them could not be read."""
        if keys and not self._gone:
            try:
                # A local store answers at once; looking at the clock costs more than the read.
                left_s = None if self.local else self._left_s()
                return await self._store.multi_get(keys, left_s), np.zeros(len(keys), bool)
            except StoreUnavailableError as error:
                self.failure = str(error)
                if error.values is not None:
                    gone = np.zeros(len(keys), bool)
                    gone[error.lost] = True
                    return error.values, gone
                self._gone = True
        return [None] * len(keys), np.ones(len(keys), bool)

    async def landed(self, flight: Flight) -> Rows | None:
        """Wait for another request's read within the budget; None when it brought nothing."""
        done, _ = await asyncio.wait([flight.landed], timeout=self._left_s())
        return flight.landed.result() if done else None

    def _left_s(self) -> float | None:
        return None if self._ends_s is None else max(0.0, self._ends_s - asyncio.get_running_loop().time())
