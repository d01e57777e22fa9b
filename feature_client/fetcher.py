"""Reading everything one request needs, in two round trips: the user first, then every distinct pin."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from feature_client.codec import Rows, State, decode_rows, decode_sequence
from feature_client.groups import FeatureGroup, SequenceGroup
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
    """The features of one request. Pin rows are distinct; the index arrays say who uses which.

    Attributes:
        user: one row per user group.
        pins: U distinct pins' rows per pin group.
        candidate_index: int64[N] into the U rows, in the order the candidates were asked for.
        events: structured[K], the newest actions, newest first.
        event_index: int64[K] into the U rows.
        query_index: position of the query pin in the U rows, or None.
        sequence_state: what was found under the user's sequence.
        store_failure: why the store could not be read, if so; what it owed is missing.
    """

    user: Mapping[str, Rows]
    pins: Mapping[str, Rows]
    candidate_index: np.ndarray
    events: np.ndarray
    event_index: np.ndarray
    query_index: int | None
    sequence_state: State
    store_failure: str | None = None

    @property
    def store_unavailable(self) -> bool:
        return self.store_failure is not None

    def user_missing(self) -> bool:
        return any(rows.states[0] != State.PRESENT for rows in self.user.values())

    def pins_missing(self) -> int:
        """Count candidates that lack a row in any group."""
        return int(np.count_nonzero(self._pin_lacks()[self.candidate_index]))

    def events_missing(self) -> int:
        return int(np.count_nonzero(self._pin_lacks()[self.event_index]))

    def query_missing(self) -> bool:
        return self.query_index is not None and bool(self._pin_lacks()[self.query_index])

    def foreign(self) -> int:
        """Count stored values that were written for another group or embedding space."""
        rows = [*self.user.values(), *self.pins.values()]
        return sum(r.count(State.FOREIGN) for r in rows) + (self.sequence_state == State.FOREIGN)

    def _pin_lacks(self) -> np.ndarray:
        lacks = [rows.states != State.PRESENT for rows in self.pins.values()]
        return np.logical_or.reduce(lacks) if lacks else np.zeros(len(self.candidate_index) + len(self.events), bool)


async def fetch(
    store: Store,
    needs: FeatureNeeds,
    user_id: int,
    pin_ids: np.ndarray,
    query_pin_id: int | None = None,
    budget_s: float | None = None,
) -> Fetched:
    """Read one request's features; whatever the store cannot give is marked missing, never raised.

    Args:
        store: a started store.
        needs: what the model reads.
        user_id: the user.
        pin_ids: uint64[N], distinct candidates.
        query_pin_id: the pin that is the query, if a pin is.
        budget_s: seconds the reads may take together before the store counts as unavailable; None waits.
    """
    reads = _Reads(store, budget_s)
    user_keys = [group.keys(np.array([user_id], np.uint64))[0] for group in needs.user_groups]
    if needs.sequence is not None:
        user_keys += needs.sequence.keys(np.array([user_id], np.uint64))
    user_values = await reads.multi_get(user_keys)
    user = {g.name: decode_rows(g, [value]) for g, value in zip(needs.user_groups, user_values, strict=False)}
    if needs.sequence is None:
        events, sequence_state = np.empty(0, SequenceGroup.dtype), State.PRESENT
    else:
        events, sequence_state = decode_sequence(needs.sequence, user_values[-1])
        events = events[max(0, len(events) - needs.sequence_length) :][::-1]

    wanted = [pin_ids, events["pin_id"]]
    if query_pin_id is not None:
        wanted.append(np.array([query_pin_id], np.uint64))
    distinct, index = np.unique(np.concatenate(wanted), return_inverse=True)
    keys = [key for group in needs.pin_groups for key in group.keys(distinct)]
    values = await reads.multi_get(keys)
    pins = {
        group.name: decode_rows(group, values[i * len(distinct) : (i + 1) * len(distinct)])
        for i, group in enumerate(needs.pin_groups)
    }
    candidates, actions = len(pin_ids), len(events)
    return Fetched(
        user=user,
        pins=pins,
        candidate_index=index[:candidates],
        events=events,
        event_index=index[candidates : candidates + actions],
        query_index=int(index[-1]) if query_pin_id is not None else None,
        sequence_state=sequence_state,
        store_failure=reads.failure,
    )


class _Reads:
    """The reads of one request, within one budget; after the first failure nothing more is asked of the store."""

    def __init__(self, store: Store, budget_s: float | None) -> None:
        self._store = store
        self._timeout = None if budget_s is None else asyncio.get_running_loop().time() + budget_s
        self.failure: str | None = None

    async def multi_get(self, keys: list[bytes]) -> list[bytes | None]:
        if self.failure is None:
            try:
                async with asyncio.timeout_at(self._timeout):
                    return await self._store.multi_get(keys)
            except StoreUnavailableError as error:
                self.failure = str(error)
            except TimeoutError:
                self.failure = "the store did not answer within the request's budget for reads"
        return [None] * len(keys)
