"""Tracks the activity sequences that users' actions are written into: those that loaded models read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from feature_client.activity.limits import WriteLimits
from feature_client.activity.retention import Sweeper
from feature_client.activity.writer import ActivityWriter
from feature_client.groups import SequenceGroup
from feature_client.stores.store import Store, SweptStore

_log = structlog.get_logger(__name__)

#: How often the values of the store are counted, if their number is limited.
_COUNT_S = 5.0


@dataclass(frozen=True, slots=True)
class RecordingRules:
    """What callers may write, and for how long.

    Attributes:
        lasts_s: how long a sequence is kept after its last action, and the greatest age of an action; None for ever.
        new_users_per_s: how many users without a stored sequence get one; 0 has no limit.
        user_actions_per_s: how many new actions of each user are stored; 0 has no limit.
        values_max: the number of values in the store from which no further user gets a sequence; 0 has no limit.
    """

    lasts_s: float | None = None
    new_users_per_s: float = 0.0
    user_actions_per_s: float = 0.0
    values_max: int = 0


class RecordedSequence:
    """A sequence group, its writer and limits, and the position of each name in its action and surface vocabularies."""

    def __init__(self, group: SequenceGroup, writer: ActivityWriter, limits: WriteLimits) -> None:
        self.group = group
        self.writer = writer
        self.limits = limits
        self.actions = {name: i for i, name in enumerate(group.actions)}
        self.surfaces = {name: i for i, name in enumerate(group.surfaces)}


class Recording:
    """Keeps one writer for each sequence. Belongs to one event loop.

    Attributes:
        rules: what callers may write, and for how long.
        sequences: the sequences to write into, without duplicates; empty if the server does not record actions.
        sweeper: deletes sequences that are over; None if the store does that, or they are kept for ever.
    """

    def __init__(
        self, store: Store, future_dropped: Callable[[int], None], rules: RecordingRules | None = None
    ) -> None:
        """Create without sequences.

        Args:
            store: the feature store with the sequences.
            future_dropped: called with the number of stored actions that were dropped because their time is in the
                future.
            rules: what callers may write; by default everything, for ever.
        """
        self._store = store
        self._future_dropped = future_dropped
        self.rules = rules or RecordingRules()
        self.sequences: tuple[RecordedSequence, ...] = ()
        self._is_full = False
        self.sweeper: Sweeper | None = None
        if self.rules.lasts_s is not None and isinstance(store, SweptStore):
            self.sweeper = Sweeper(store, lambda: [one.group for one in self.sequences], self.rules.lasts_s)

    def write_into(self, groups: Iterable[SequenceGroup]) -> None:
        """Record into these sequences from now on; sequences that were already recorded keep their writers."""
        before = {sequence.group.fingerprint: sequence for sequence in self.sequences}
        distinct = {group.fingerprint: group for group in groups}
        self.sequences = tuple(
            before.get(fingerprint) or self._recorded(group) for fingerprint, group in distinct.items()
        )

    def _recorded(self, group: SequenceGroup) -> RecordedSequence:
        limits = WriteLimits(self.rules.new_users_per_s, self.rules.user_actions_per_s)
        limits.full = self._is_full
        writer = ActivityWriter(self._store, group, self._future_dropped, lasts_s=self.rules.lasts_s, limits=limits)
        return RecordedSequence(group, writer, limits)

    async def watch_size(self) -> None:
        """Count the store's values again and again, and admit new users only while there are few enough.

        Raises:
            StoreUnavailableError: they cannot be counted.
        """
        while True:
            await self.check_size()
            await asyncio.sleep(_COUNT_S)

    async def check_size(self) -> None:
        """Count the store's values, and admit new users only if there are few enough.

        Raises:
            StoreUnavailableError: they cannot be counted.
        """
        values = await self._store.count()
        is_full = values >= self.rules.values_max
        if is_full != self._is_full:
            _log.warning("new_users_refused" if is_full else "new_users_admitted", values=values)
        self._is_full = is_full
        for sequence in self.sequences:
            sequence.limits.full = is_full
