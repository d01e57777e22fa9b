"""Which versions a server that starts may begin with, and in which order it tries them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from model_store.registry.store import ModelStore
from server.rollout.refusals import Refusals

#: Versions that the label named, from the newest on: more are not looked at.
_LABELLED_MAX = 5


class FirstVersion:
    """Finds candidates in the store. Reads it: not for an event loop's thread."""

    def __init__(self, store: ModelStore, refusals: Refusals, model: str) -> None:
        self._store = store
        self._refusals = refusals
        self._model = model

    def refused(self, version: int) -> str | None:
        """Return why this server refused a version before a restart, if it did. Raises ModelStoreError."""
        return self._refusals.reason(self._store.release(self._model, version).digest)

    def candidates(self, label: str) -> Iterator[int]:
        """Name what a label names, then what it named, newest first; what was refused before a restart comes last.

        The history is read only when the first version is not enough. Raises ModelStoreError.
        """
        now = self._store.resolve(self._model, label)
        if self.refused(now) is None:
            yield now
        labelled = list(islice(self._store.named(self._model, label), _LABELLED_MAX))
        refused = [version for version in labelled if self.refused(version) is not None]
        yield from (version for version in labelled if version != now and version not in refused)
        yield from refused
