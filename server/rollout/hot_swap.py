"""Replaces model versions while requests are answered: polls the model store and carries out the lifecycle's decisions.

`server.rollout.lifecycle` decides. Every change of what is served happens on the event loop, between two requests; slow
work runs on other threads and processes (`server/proving/admit_version.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import structlog

from model_store.bundle.files import BundleError
from model_store.bundle.manifest import Manifest
from model_store.registry.entries import whoami
from model_store.registry.history import HistoryEntry
from model_store.registry.objects import ModelStoreError
from model_store.registry.store import ModelStore
from server.config import ServerConfig
from server.proving.admit_version import VersionAdmitter
from server.proving.refusals import Refusals
from server.request.routing import ServedModel, ServedModels
from server.request.windows import Window
from server.rollout.first_version import Candidates, FirstVersion
from server.rollout.installed_models import InstalledModels
from server.rollout.label_guard import EVERY_S, LabelGuard
from server.rollout.lifecycle import (
    Decision,
    Drain,
    Forget,
    Load,
    Phase,
    Retry,
    Route,
    See,
    Serve,
    Snapshot,
    Unload,
    Unroute,
    decide,
)
from server.rollout.loading import TASK, VersionLoading
from server.rollout.newest_entry import NewestEntry
from server.rollout.versions import VersionRecord, Versions
from server.runtime.supervisor import Supervisor
from server.runtime.tasks import BackgroundTasks
from server.runtime.worker import Worker
from server.telemetry.metrics import ModelMetrics

_log = structlog.get_logger(__name__)

#: Interval between checks whether a draining version still has requests.
_DRAIN_LOOK_S = 0.02
#: When the server stops, how long operators' calls to the store have to finish.
_CLOSE_S = 1.0


class HotSwap:
    """Serves the versions that the model store's labels name. Belongs to one event loop.

    Attributes:
        versions: every version that the server knows.
        newest: the newest entry of the model store.
        guard: compares labels, and blocks versions that were rolled back.
    """

    def __init__(
        self,
        store: ModelStore,
        config: ServerConfig,
        models: ServedModels,
        admitter: VersionAdmitter,
        installed: InstalledModels,
        metrics: ModelMetrics,
        supervisor: Supervisor,
        refusals: Refusals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._config = config
        self._models = models
        self._installed = installed
        self._metrics = metrics
        self._supervisor = supervisor
        self._clock = clock
        self._tasks = BackgroundTasks()
        self._settled = asyncio.Event()
        #: Operators' calls to the store are slower than a poll, so they run on a thread of their own.
        self._calling = Worker("model-calls", supervisor)
        self.versions = Versions(config.model, clock)
        self.newest = NewestEntry(store, config.model, config.swap, supervisor, metrics.store_failures.inc, clock)
        self.guard = LabelGuard(config, models, clock)
        self._loading = VersionLoading(
            admitter, installed, self.versions, refusals, config.swap.retry_s, metrics, supervisor, self._tasks
        )
        self._first = FirstVersion(
            Candidates(store, refusals, config.model), self.newest, self.versions, self._loading, config.swap
        )

    # Called by the server.

    async def start(self) -> None:
        """Load the default label's version and then the other labels', and start to follow the model store.

        Raises:
            ModelStoreError, BundleError, UtilityError, SigningError, ProvingError: no present or earlier version of the
                default label can be served. The error is that of the first version that was tried.
        """
        default = self._models.default_label
        await self.newest.read()
        self._models.share_traffic(self.newest.traffic)
        instead = await self._first.load(default)
        if instead is not None:
            self._act(Route(default, instead.version))
            self._first.explain(default, instead)
        self.step()
        await self._settled.wait()
        self._tasks.start(self._supervisor.loop("model-watch", self._watch))
        if self._config.guard.enabled:
            self._tasks.start(self._supervisor.loop("label-guard", self._watch_labels))

    async def close(self) -> None:
        """Stop following the store, cancel loads, and free every version. No request may be in flight."""
        ended = self._tasks.cancel()
        await self._loading.close()
        await asyncio.gather(ended, self.newest.close(), self._calling.close(_CLOSE_S), return_exceptions=True)
        for record in self.versions.clear():
            if record.served is not None:
                record.served.model.engine.close()

    async def load(self, version: int) -> VersionRecord:
        """Load a version and keep it without a label; return it once it serves or failed. Raises ModelStoreError."""
        await self._calling.ask(self._config.swap.store_timeout_s, self._store.release, self._config.model, version)
        self.versions.pinned.add(version)
        self.step()
        while True:
            record = self.versions.get(version)
            if record is None:
                raise ModelStoreError(f"version {version} was unloaded while it was loading")
            if record.phase in {Phase.SERVING, Phase.FAILED}:
                return record
            self._settled.clear()
            await self._settled.wait()

    def unload(self, version: int) -> None:
        """Stop keeping a version that `load` loaded."""
        self.versions.pinned.discard(version)
        self.step()

    async def set_label(self, label: str, version: int, by: str, why: str, expected: int | None) -> HistoryEntry | None:
        """Move a label in the store, and poll the store at once. Raises ModelStoreError, BundleError."""

        def move() -> HistoryEntry | None:
            return self._store.set_label(self._config.model, label, version, by=by, why=why, expected=expected)

        # The store reads the whole bundle, so this may take as long as a proof.
        entry = await self._calling.ask(self._config.swap.proof_timeout_s, move)
        self.newest.poll_now()
        return entry

    @property
    def labels(self) -> Mapping[str, int]:
        """The labels to serve and the version of each, by the store or the label guard; the default label first."""
        named, default, found = self.newest.labels, self._models.default_label, {}
        for label in self._config.labels:
            if label in named:
                found[label] = named[label]
            elif label == default and label in self._models.by_label:  # removed from the store: keep its last version
                found[label] = self._models.by_label[label].version
        return {label: found[default] if self.guard.blocks(label, at) else at for label, at in found.items()}

    # Polls, decides and acts.

    async def _watch(self) -> None:
        while True:
            if await self.newest.poll():
                self.guard.follow(self.newest.labels)
                self._models.share_traffic(self.newest.traffic)
            self.step()
            await self.newest.wait(_DRAIN_LOOK_S if self.versions.any_in(Phase.DRAINING) else self._config.swap.poll_s)

    async def _watch_labels(self) -> None:
        """Roll back versions that breach a limit. A loop of its own, so that neither loop's failure stops the other."""
        while True:
            for label, version, reason in await self.guard.breaches():
                await self._roll_back(label, version, reason)
            await asyncio.sleep(EVERY_S)

    def step(self) -> None:
        """Carry out decisions until none is left."""
        while decisions := decide(self._snapshot()):
            for decision in decisions:
                self._act(decision)
        if not self.versions.any_in(Phase.SEEN, Phase.VERIFYING, Phase.WARMING):
            self._settled.set()

    def _snapshot(self) -> Snapshot:
        versions = self.versions
        routes = {label: served.version for label, served in self._models.by_label.items()}
        known = versions.states(self._installed.in_flight)
        return Snapshot(self._clock(), self.labels, frozenset(versions.pinned), known, routes)

    def _act(self, decision: Decision) -> None:
        models, versions = self._models, self.versions
        match decision:
            case See(version):
                versions.see(version)
                versions.note(f"{version} seen")
            case Load(version):
                versions.become(version, Phase.VERIFYING)
                self._tasks.start(self._supervisor.task(TASK, self._load(version)))
            case Route(label, version):
                previous = models.by_label.get(label)
                self._route(label, self._serve(version))
                versions.note(f"{label}: {previous.version if previous else 'none'} -> {version}")
                self._metrics.done.inc()
            case Unroute(label):
                self._route(label, None)
                versions.note(f"{label} removed")
            case Serve(version):
                self._serve(version)
            case Drain(version):
                versions.become(version, Phase.DRAINING)
                models.by_version.pop(version, None)
            case Unload(version) | Forget(version):
                self._loading.unload(version)
            case Retry(version):
                versions.retry(version)

    def _serve(self, version: int) -> ServedModel:
        served = self._models.by_version[version] = self.versions.serve(version)
        return served

    def _route(self, label: str, served: ServedModel | None) -> None:
        """Let a model answer for a label from now on; None removes the label."""
        models, before = self._models, self._models.by_label.get(label)
        if before is not None:
            self._metrics.info.remove(*_names(label, before))
        if served is None:
            del models.by_label[label]
            models.windows.pop(label, None)
        else:
            models.by_label[label] = served
            models.windows[label] = Window(self._config.guard.window_s)
            self._metrics.info.labels(*_names(label, served)).set(1)
        self.guard.verdicts.pop(label, None)

    async def _load(self, version: int) -> None:
        await self._loading.load(version, self._replaced_by(version))
        self.step()

    def _replaced_by(self, version: int) -> dict[str, Manifest]:
        """Return the manifest that answers now for each label of a version; leave out the shadow label (no callers)."""
        labels = [label for label, wanted in self.labels.items() if wanted == version]
        return {
            label: self._models.by_label.get(label, self._models.default).model.manifest
            for label in labels
            if label != self._config.shadow.label
        }

    async def _roll_back(self, label: str, version: int, reason: str) -> None:
        """Give a label the default label's version: at once in this server, and in the store for all servers."""
        why = f"rolled back from {version}: {reason}"
        self.guard.block(label, version)
        self.versions.note(f"{label}: {why}")
        self._metrics.rollbacks.labels(label).inc()
        _log.error("model_rolled_back", model=f"{self._config.model}@{version}", label=label, reason=reason)
        self.step()
        default = self.labels[self._models.default_label]
        try:
            await self.set_label(label, default, f"guard of {whoami()}", why, version)
        except (ModelStoreError, BundleError) as error:  # another server was faster, or the store is unavailable
            _log.warning("rollback_not_recorded", label=label, reason=str(error))


def _names(label: str, served: ServedModel) -> tuple[str, str, str, str]:
    """Return the label values of the `pinrank_model_info` metric."""
    return served.model.manifest.name, str(served.version), label, served.model.digest
