"""Reading everything one request needs: the user first, then the pins that the near caches do not hold."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from feature_client.codec import Rows, State, decode_rows, decode_sequence
from feature_client.groups import FeatureGroup, SequenceGroup
from feature_client.near_cache import NearCache
from feature_client.store import Store, StoreUnavailableError


@dataclass(frozen=True, slots=True)
class FeatureNeeds:
    """What a model reads: at most one sequence, any number of groups per entity."""

    user_groups: tuple[FeatureGroup, ...]
    pin_groups: tuple[FeatureGroup, ...]
    sequence: SequenceGroup | None
    #: How many of the newest actions the model reads.
    sequence_length: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """The features of one request.

    Attributes:
        user: one row per user group.
        pins: per pin group a row for each of the N candidates in the order they were asked for, then for each event's
            pin, then for the query pin.
        candidates: N.
        events: structured[K], the newest actions, newest first.
        has_query_pin: whether a pin is the query.
        sequence_state: what was found under the user's sequence.
        store_failure: why the store could not be read, if so; what it owed is missing.
    """

    user: Mapping[str, Rows]
    pins: Mapping[str, Rows]
    candidates: int
    events: np.ndarray
    has_query_pin: bool
    sequence_state: State
    store_failure: str | None = None

    def candidate_rows(self, group: str) -> np.ndarray:
        """Return structured[N]."""
        return self.pins[group].rows[: self.candidates]

    def event_rows(self, group: str) -> np.ndarray:
        """Return structured[K]."""
        return self.pins[group].rows[self.candidates : self.candidates + len(self.events)]

    def query_row(self, group: str) -> np.void | None:
        """Return the query pin's row; None without a query pin, or where it is not there."""
        if not self.has_query_pin or self.pins[group].states[-1] != State.PRESENT:
            return None
        row: np.void = self.pins[group].rows[-1]
        return row

    @property
    def store_unavailable(self) -> bool:
        return self.store_failure is not None

    def first(self, candidates: int) -> Fetched:
        """Keep only the first `candidates` candidates, as if no others had been asked for."""
        keep = np.r_[:candidates, self.candidates : self.candidates + len(self.events) + self.has_query_pin]
        pins = {name: Rows(rows.rows[keep], rows.states[keep]) for name, rows in self.pins.items()}
        return replace(self, pins=pins, candidates=candidates)

    def lacks(self) -> Lacks:
        """Count what is not there."""
        users = [int(rows.states[0]) for rows in self.user.values()]
        user_missing = any(state != State.PRESENT for state in users)
        foreign = users.count(State.FOREIGN) + (self.sequence_state == State.FOREIGN)
        states = [rows.states for rows in self.pins.values() if rows.states.any()]
        if not states:
            return Lacks(user_missing, 0, 0, query_pin=False, foreign=foreign)
        # A pin without a row in any group counts.
        lacking = np.logical_or.reduce([s != State.PRESENT for s in states])
        events_end = self.candidates + len(self.events)
        return Lacks(
            user_missing,
            int(np.count_nonzero(lacking[: self.candidates])),
            int(np.count_nonzero(lacking[self.candidates : events_end])),
            self.has_query_pin and bool(lacking[-1]),
            foreign + sum(int(np.count_nonzero(s == State.FOREIGN)) for s in states),
        )


@dataclass(frozen=True, slots=True)
class Lacks:
    """What of a request's features is not there.

    Attributes:
        user: a user group's row.
        candidates: how many candidates lack a row in some group.
        event_pins: how many actions' pins do.
        query_pin: the query pin does.
        foreign: stored values that were written for another group or embedding space, or that cannot be the group's.
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
) -> Fetched:
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
    values = await reads.multi_get(keys)
    users = {g.name: decode_rows(g, [value]) for g, value in zip(needs.user_groups, values, strict=False)}
    if needs.sequence is None:
        events, sequence_state = np.empty(0, SequenceGroup.dtype), State.PRESENT
    else:
        events, sequence_state = decode_sequence(needs.sequence, values[-1])
        events = events[max(0, len(events) - needs.sequence_length) :][::-1]

    wanted = [pin_ids, events["pin_id"]]
    if query_pin_id is not None:
        wanted.append(np.array([query_pin_id], np.uint64))
    pins = await _pins(reads, needs.pin_groups, np.concatenate(wanted), near or {})
    return Fetched(users, pins, len(pin_ids), events, query_pin_id is not None, sequence_state, reads.failure)


async def _pins(
    reads: _Reads, groups: tuple[FeatureGroup, ...], ids: np.ndarray, near: Mapping[bytes, NearCache]
) -> dict[str, Rows]:
    """Return each group's rows in the order of `ids`: from its near cache, the rest in one read, each id once."""
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
    if not absences:
        return found
    values = iter(await reads.multi_get([key for a in absences for key in a.group.keys(a.distinct)]))
    for a in absences:
        read = decode_rows(a.group, list(islice(values, len(a.distinct))))
        found[a.group.name].rows[a.absent] = read.rows[a.index]
        found[a.group.name].states[a.absent] = read.states[a.index]
        if a.cache is not None and reads.failure is None:  # what a lost store owes is not missing
            a.cache.put(a.distinct, read, now_s)
    return found


@dataclass(frozen=True, slots=True)
class _Absence:
    """Pins of one group that its near cache does not hold.

    Attributes:
        absent: bool[M], which of the wanted ids.
        distinct: uint64[U], these ids once each.
        index: int64 into `distinct`, one for each absent id.
    """

    group: FeatureGroup
    cache: NearCache | None
    absent: np.ndarray
    distinct: np.ndarray
    index: np.ndarray


class _Reads:
    """The reads of one request, within one budget; after the first failure nothing more is asked of the store."""

    def __init__(self, store: Store, budget_s: float | None) -> None:
        self._store = store
        self._timeout = None if budget_s is None else asyncio.get_running_loop().time() + budget_s
        self.failure: str | None = None

    async def multi_get(self, keys: list[bytes]) -> list[bytes | None]:
        if self.failure is None:
            try:
                if self._store.local:  # it answers at once; a timer costs more than the read
                    return await self._store.multi_get(keys)
                async with asyncio.timeout_at(self._timeout):
                    return await self._store.multi_get(keys)
            except StoreUnavailableError as error:
                self.failure = str(error)
            except TimeoutError:
                self.failure = "the store did not answer within the request's budget for reads"
        return [None] * len(keys)
