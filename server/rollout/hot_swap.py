"""The shell around `server.rollout.lifecycle`: polls the store, asks what to do, and does it while traffic flows.

Everything that decides or changes what is served happens on the event loop, between two requests; what takes long
happens elsewhere (`server/proving/admit_version.py`).
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
from server.proving.admit_version import Intake
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

#: Between looks at whether the last request has let go of a draining version.
_DRAIN_LOOK_S = 0.02
#: For what operators asked of the store to end when the server does.
_CLOSE_S = 1.0


class HotSwap:
    """Keeps what is served as the labels say. Belongs to one event loop.

    Attributes:
        versions: all that are known.
        newest: what the model store says.
        guard: of the labels.
    """

    def __init__(
        self,
        store: ModelStore,
        config: ServerConfig,
        models: ServedModels,
        intake: Intake,
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
        #: What operators ask of the store takes longer than a poll, which must not wait for it.
        self._calling = Worker("model-calls", supervisor)
        self.versions = Versions(config.model, clock)
        self.newest = NewestEntry(store, config.model, config.swap, supervisor, metrics.store_failures.inc, clock)
        self.guard = LabelGuard(config, models, clock)
        self._loading = VersionLoading(
            intake, installed, self.versions, refusals, config.swap.retry_s, metrics, supervisor, self._tasks
        )
        self._first = FirstVersion(
            Candidates(store, refusals, config.model), self.newest, self.versions, self._loading, config.swap
        )

    # What the server calls.

    async def start(self) -> None:
        """Load the default label's version, then whatever else can be; watch from then on.

        Raises:
            ModelStoreError, BundleError, UtilityError, SigningError, ProvingError: no version that the default label
                names or named can be served; of them, what the first one failed with.
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
        """Stop watching, give up what is being loaded, and free every version. No request may be in flight."""
        ended = self._tasks.cancel()
        await self._loading.close()
        await asyncio.gather(ended, self.newest.close(), self._calling.close(_CLOSE_S), return_exceptions=True)
        for record in self.versions.clear():
            if record.served is not None:
                record.served.model.engine.close()

    async def load(self, version: int) -> VersionRecord:
        """Hold a version without a label; return it once it serves or failed. Raises ModelStoreError."""
        await self._calling.ask(self._config.swap.store_timeout_s, self._store.release, self._config.model, version)
        self.versions.pinned.add(version)
        self.step()
        while True:
            record = self.versions.get(version)
            if record is None:
                raise ModelStoreError(f"version {version} was let go of meanwhile")
            if record.phase in {Phase.SERVING, Phase.FAILED}:
                return record
            self._settled.clear()
            await self._settled.wait()

    def unload(self, version: int) -> None:
        """Let go of a version held by `load`."""
        self.versions.pinned.discard(version)
        self.step()

    async def set_label(self, label: str, version: int, by: str, why: str, expected: int | None) -> HistoryEntry | None:
        """Move a label in the store, and follow at once. Raises ModelStoreError, BundleError."""

        def move() -> HistoryEntry | None:
            return self._store.set_label(self._config.model, label, version, by=by, why=why, expected=expected)

        # It reads the whole bundle.
        entry = await self._calling.ask(self._config.swap.proof_timeout_s, move)
        self.newest.poll_now()
        return entry

    @property
    def labels(self) -> Mapping[str, int]:
        """The labels to serve and the versions that the store, or a guard, says; the default label first."""
        named, default, found = self.newest.labels, self._models.default_label, {}
        for label in self._config.labels:
            if label in named:
                found[label] = named[label]
            elif label == default and label in self._models.by_label:  # it was removed: its last version goes on
                found[label] = self._models.by_label[label].version
        return {label: found[default] if self.guard.blocks(label, at) else at for label, at in found.items()}

    # Looking, deciding, doing.

    async def _watch(self) -> None:
        while True:
            if await self.newest.poll():
                self.guard.follow(self.newest.labels)
                self._models.share_traffic(self.newest.traffic)
            self.step()
            await self.newest.wait(_DRAIN_LOOK_S if self.versions.any_in(Phase.DRAINING) else self._config.swap.poll_s)

    async def _watch_labels(self) -> None:
        """Take back what breaches its label's guard: apart from the other loop, so that neither ends with the other."""
        while True:
            for label, version, reason in await self.guard.breaches():
                await self._roll_back(label, version, reason)
            await asyncio.sleep(EVERY_S)

    def step(self) -> None:
        """Do all that is to be done now; asked again, nothing."""
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
        """Let a model answer for a label from now on, or nobody."""
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
        """Return what answers now for the labels that a version is for; in the shadow nobody is answered."""
        labels = [label for label, wanted in self.labels.items() if wanted == version]
        return {
            label: self._models.by_label.get(label, self._models.default).model.manifest
            for label in labels
            if label != self._config.shadow.label
        }

    async def _roll_back(self, label: str, version: int, reason: str) -> None:
        """Give a label the default label's version, here at once and in the store for everybody."""
        why = f"rolled back from {version}: {reason}"
        self.guard.block(label, version)
        self.versions.note(f"{label}: {why}")
        self._metrics.rollbacks.labels(label).inc()
        _log.error("model_rolled_back", model=f"{self._config.model}@{version}", label=label, reason=reason)
        self.step()
        default = self.labels[self._models.default_label]
        try:
            await self.set_label(label, default, f"guard of {whoami()}", why, version)
        except (ModelStoreError, BundleError) as error:  # another server was faster, or the store is away
            _log.warning("rollback_not_recorded", label=label, reason=str(error))


def _names(label: str, served: ServedModel) -> tuple[str, str, str, str]:
    """Return the values of `pinrank_model_info`'s labels."""
    return served.model.manifest.name, str(served.version), label, served.model.digest
