"""The features of one request: what was found, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from feature_client.codec import Rows, RowState
from feature_client.packed_fetch import Packed


@dataclass(slots=True)
class FetchedFeatures:
    """The features of one request.

    Attributes:
        user: by user group, one row.
        pins: by pin group, one row for each of the N candidates in the order of the request, then one for each event's
            pin, then one for the query pin.
        candidates: N.
        events: structured[K], the newest actions, newest first.
        has_query_pin: whether the query is a pin.
        sequence_state: what was found under the key of the user's sequence.
        read_ms: Unix time of the read.
        store_failure: why the store could not be read, if it could not. Rows that it owed count as missing unless a
            near cache held them.
        stale_rows: the number of pin rows that are older than a near cache allows while the store can be read.
        future_events: the number of stored actions that were ignored because their time is in the future.
        packed: where all of it lies in one allocation, if one native call found it all in the near caches. A copy with
            other rows must not keep it.
    """

    user: Mapping[str, Rows]
    pins: Mapping[str, Rows]
    candidates: int
    events: np.ndarray
    has_query_pin: bool
    sequence_state: RowState
    read_ms: int
    store_failure: str | None = None
    stale_rows: int = 0
    future_events: int = 0
    packed: Packed | None = None

    def candidate_rows(self, group: str) -> np.ndarray:
        """Return the candidates' rows, structured[N]."""
        return self.pins[group].rows[: self.candidates]

    def event_rows(self, group: str) -> np.ndarray:
        """Return the rows of the events' pins, structured[K]."""
        return self.pins[group].rows[self.candidates : self.candidates + len(self.events)]

    def query_row(self, group: str) -> np.void | None:
        """Return the query pin's row, or None if there is no query pin or its row is missing."""
        if not self.has_query_pin or self.pins[group].states[-1] != RowState.PRESENT:
            return None
        row: np.void = self.pins[group].rows[-1]
        return row

    def part(self, places: np.ndarray, events: int) -> FetchedFeatures:
        """Return the features with some of the candidates, int64[M], and the newest `events` actions only."""
        kept = self.events[:events]
        others = self.candidates + np.arange(len(kept))
        query = [self.candidates + len(self.events)] if self.has_query_pin else []
        wanted = np.concatenate([places, others, query]).astype(np.int64)
        return replace(
            self,
            pins={name: Rows(found.rows[wanted], found.states[wanted]) for name, found in self.pins.items()},
            candidates=len(places),
            events=kept,
            packed=None,
        )

    @property
    def store_unavailable(self) -> bool:
        return self.store_failure is not None

    @property
    def complete(self) -> bool:
        """Whether all rows and the sequence are present. Cost: 1 us."""
        if self.packed is not None:
            return self.packed.flawless
        if self.sequence_state or self.future_events:
            return False
        for groups in (self.user, self.pins):
            for rows in groups.values():
                if np.count_nonzero(rows.states):
                    return False
        return True

    def missing(self) -> MissingFeatures:
        """Count what is missing. Cost: a dozen NumPy calls; ask `complete` first."""
        users = [int(rows.states[0]) for rows in self.user.values()]
        user_missing = any(users)  # a row that is present has state 0
        foreign = users.count(RowState.FOREIGN) + (self.sequence_state == RowState.FOREIGN or self.future_events > 0)
        states = [rows.states for rows in self.pins.values() if np.count_nonzero(rows.states)]
        if not states:
            return MissingFeatures(user_missing, 0, 0, query_pin=False, foreign=foreign)
        # A pin counts if it lacks a row in any group.
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
    """The features of a request that are missing.

    Attributes:
        user: whether the row of a user group is missing.
        candidates: how many candidates lack a row in at least one group.
        event_pins: how many of the actions' pins do.
        query_pin: whether the query pin does.
        foreign: how many stored values were written for another group or embedding space, or cannot be valid for the
            group. A sequence with actions in the future, which are ignored, counts as one.
    """

    user: bool
    candidates: int
    event_pins: int
    query_pin: bool
    foreign: int
