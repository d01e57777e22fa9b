"""Tracks the activity sequences that users' actions are written into: those that loaded models read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from feature_client.activity.writer import ActivityWriter
from feature_client.groups import SequenceGroup
from feature_client.stores.store import Store


class RecordedSequence:
    """A sequence group, its writer, and the position of each name in its action and surface vocabularies."""

    def __init__(self, group: SequenceGroup, writer: ActivityWriter) -> None:
        self.group = group
        self.writer = writer
        self.actions = {name: i for i, name in enumerate(group.actions)}
        self.surfaces = {name: i for i, name in enumerate(group.surfaces)}


class Recording:
    """Keeps one writer for each sequence. Belongs to one event loop.

    Attributes:
        sequences: the sequences to write into, without duplicates; empty if the server does not record actions.
    """

    def __init__(self, store: Store, future_dropped: Callable[[int], None]) -> None:
        """Create without sequences.

        Args:
            store: the feature store with the sequences.
            future_dropped: called with the number of stored actions that were dropped because their time is in the
                future.
        """
        self._store = store
        self._future_dropped = future_dropped
        self.sequences: tuple[RecordedSequence, ...] = ()

    def write_into(self, groups: Iterable[SequenceGroup]) -> None:
        """Record into these sequences from now on; sequences that were already recorded keep their writers."""
        before = {sequence.group.fingerprint: sequence for sequence in self.sequences}
        distinct = {group.fingerprint: group for group in groups}
        self.sequences = tuple(
            before.get(fingerprint) or RecordedSequence(group, ActivityWriter(self._store, group, self._future_dropped))
            for fingerprint, group in distinct.items()
        )
