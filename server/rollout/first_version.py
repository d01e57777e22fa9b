"""Which version a server begins with: the one that its default label names, or else the newest good one before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import structlog

from model_store.registry.objects import ModelStoreError
from model_store.registry.store import ModelStore
from server.config import SwapConfig
from server.proving.refusals import Refusals
from server.rollout.lifecycle import Phase
from server.rollout.loading import VersionLoading
from server.rollout.newest_entry import NewestEntry
from server.rollout.versions import Versions

_log = structlog.get_logger(__name__)

#: Versions that the label named, from the newest on: more are not looked at.
_LABELLED_MAX = 5


@dataclass(frozen=True, slots=True)
class Instead:
    """Another version than the wanted one is ready to answer, and why."""

    version: int
    wanted: int
    reason: str


class Candidates:
    """Finds what a label may begin with in the store. Reads it: not for an event loop's thread."""

    def __init__(self, store: ModelStore, refusals: Refusals, model: str) -> None:
        self._store = store
        self._refusals = refusals
        self._model = model

    def wanted(self, label: str) -> int:
        """Return what a label names. Raises ModelStoreError."""
        return self._store.resolve(self._model, label)

    def refused(self, version: int) -> str | None:
        """Return why this server refused a version before a restart, if it did. Raises ModelStoreError."""
        return self._refusals.reason(self._store.release(self._model, version).digest)

    def of(self, label: str) -> Iterator[int]:
        """Name what a label names, then what it named, newest first; what was refused before a restart comes last.

        The history is read only when the first version is not enough. Raises ModelStoreError.
        """
        now = self.wanted(label)
        if self.refused(now) is None:
            yield now
        labelled = list(islice(self._store.named(self._model, label), _LABELLED_MAX))
        refused = [version for version in labelled if self.refused(version) is not None]
        yield from (version for version in labelled if version != now and version not in refused)
        yield from refused


class FirstVersion:
    """Loads the version that a server begins with. Belongs to one event loop."""

    def __init__(
        self,
        candidates: Candidates,
        newest: NewestEntry,
        versions: Versions,
        loading: VersionLoading,
        swap: SwapConfig,
    ) -> None:
        self._candidates = candidates
        self._newest = newest
        self._versions = versions
        self._loading = loading
        self._swap = swap

    async def load(self, label: str) -> Instead | None:
        """Load the newest version of a label that can be proven now, the one that it names before others.

        Returns:
            None when the version that the label names is ready.

        Raises:
            ModelStoreError, BundleError, UtilityError, SigningError, ProvingError: no version can be served; of them,
                what the first one failed with.
        """
        ask, limit_s = self._newest.ask, self._swap.proof_timeout_s
        wanted = await ask(self._swap.store_timeout_s, self._candidates.wanted, label)
        before = await ask(limit_s, self._candidates.refused, wanted)
        candidates = self._candidates.of(label)
        failure: Exception | None = None
        while True:
            try:
                version = await ask(limit_s, next, candidates, None)
            except ModelStoreError as error:  # such as an older entry that is damaged
                raise failure or error from error
            if version is None:
                raise failure or ModelStoreError(f"{label} names no version")
            self._versions.see(version)
            self._versions.become(version, Phase.VERIFYING)
            why_not = await self._loading.load(version, {}, starting=True)
            if why_not is None:
                break
            failure = failure or why_not
        if version != wanted:
            return Instead(version, wanted, str(failure) if before is None else f"{before} (before a restart)")
        if before is not None:
            _log.error("refused_version_served", label=label, version=version, reason=before, why="no other is good")
        return None

    def explain(self, label: str, instead: Instead) -> None:
        """Say openly that another version answers; what is wanted is tried again."""
        if instead.wanted not in self._versions:  # refused before: not tried until there are requests to try it on
            self._versions.see(instead.wanted)
            self._loading.put_off(instead.wanted, instead.reason)
        self._versions.note(f"{label}: {instead.version} instead of {instead.wanted}")
        _log.error(
            "older_version_served", label=label, version=instead.version, wanted=instead.wanted, reason=instead.reason
        )
