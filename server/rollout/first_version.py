"""Chooses the model version that a server starts with: its default label's, or else the newest good one before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import structlog

from model_store.registry.objects import ModelStoreError
from model_store.registry.store import ModelStore
from server.config_sections import SwapConfig
from server.proving.refusals import Refusals
from server.rollout.lifecycle import Phase
from server.rollout.loading import VersionLoading
from server.rollout.newest_entry import NewestEntry
from server.rollout.versions import Versions

_log = structlog.get_logger(__name__)

#: At a start, at most this many versions of the label's history are tried, newest first.
_LABELLED_MAX = 5


@dataclass(frozen=True, slots=True)
class Instead:
    """The server starts with `version` instead of the wanted one, for this reason."""

    version: int
    wanted: int
    reason: str


class Candidates:
    """Lists the versions that a label can start with. Reads the store, so call it off the event loop."""

    def __init__(self, store: ModelStore, refusals: Refusals, model: str) -> None:
        self._store = store
        self._refusals = refusals
        self._model = model

    def wanted(self, label: str) -> int:
        """Return the version that a label names. Raises ModelStoreError."""
        return self._store.resolve(self._model, label)

    def refused(self, version: int) -> str | None:
        """Return why this server refused a version before a restart; None if it did not. Raises ModelStoreError."""
        return self._refusals.reason(self._store.release(self._model, version).digest)

    def of(self, label: str) -> Iterator[int]:
        """Yield the version that a label names, then its earlier versions, newest first.

        Versions that this server refused before a restart come last. The label's history is read only when the first
        version cannot be served. Raises ModelStoreError.
        """
        now = self.wanted(label)
        if self.refused(now) is None:
            yield now
        labelled = list(islice(self._store.named(self._model, label), _LABELLED_MAX))
        refused = [version for version in labelled if self.refused(version) is not None]
        yield from (version for version in labelled if version != now and version not in refused)
        yield from refused


class FirstVersion:
    """Loads the version that a server starts with. Belongs to one event loop."""

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
        """Load the version that a label names, or else the newest earlier one that passes its checks.

        Returns:
            None when the version that the label names is ready.

        Raises:
            ModelStoreError, BundleError, UtilityError, SigningError, ProvingError: no version can be served. The error
                is that of the first version that was tried.
        """
        ask, limit_s = self._newest.ask, self._swap.proof_timeout_s
        wanted = await ask(self._swap.store_timeout_s, self._candidates.wanted, label)
        before = await ask(limit_s, self._candidates.refused, wanted)
        candidates = self._candidates.of(label)
        failure: Exception | None = None
        while True:
            try:
                version = await ask(limit_s, next, candidates, None)
            except ModelStoreError as error:  # for example, an older entry is damaged
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
            return Instead(version, wanted, str(failure) if before is None else f"{before} (refused before a restart)")
        if before is not None:
            _log.error(
                "refused_version_served",
                label=label,
                version=version,
                reason=before,
                why="no other version can be served",
            )
        return None

    def explain(self, label: str, instead: Instead) -> None:
        """Log that another version answers, and schedule a retry of the wanted one."""
        if instead.wanted not in self._versions:  # refused earlier: wait for requests to test it on
            self._versions.see(instead.wanted)
            self._loading.fail_and_retry(instead.wanted, instead.reason)
        self._versions.note(f"{label}: {instead.version} instead of {instead.wanted}")
        _log.error(
            "older_version_served", label=label, version=instead.version, wanted=instead.wanted, reason=instead.reason
        )
