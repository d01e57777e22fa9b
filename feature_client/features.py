"""The features of one request: what a model needs, what was found, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from feature_client.codec import Rows, RowState
from feature_client.groups import FeatureGroup, SequenceGroup


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
