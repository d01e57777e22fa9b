"""The shell around `server.rollout.lifecycle`: looks at the store, asks what to do, and does it while traffic flows.

Everything that decides or changes what is served happens on the event loop, between two requests; what takes long
happens elsewhere (`server/proving/admit_version.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from feature_client.features import FeatureNeeds
from model_store.bundle.files import BundleError
from model_store.bundle.manifest import Manifest
from model_store.model.utility import UtilityError
from model_store.registry.entries import whoami
from model_store.registry.history import HistoryEntry, ModelState
from model_store.registry.objects import ModelStoreError
from model_store.registry.signing import SigningError
from model_store.registry.store import ModelStore
from server.config import ServerConfig
from server.proving.admit_version import Intake, Report
from server.proving.prover import ProvingError
from server.proving.replay import NotReadyError
from server.proving.warm_up import WarmUp
from server.request.routing import ServedModel, ServedModels
from server.rollout.first_version import FirstVersion
from server.rollout.guard import Window
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
    VersionState,
    decide,
    followed,
)
from server.rollout.refusals import Refusals
from server.runtime.supervisor import Supervisor
from server.runtime.worker import Worker
from server.telemetry.metrics import Metrics

_log = structlog.get_logger(__name__)

#: Between looks at whether the last request has let go of a draining version.
_DRAIN_LOOK_S = 0.02
_EVENTS_KEPT = 100
#: For a look at the store to end when the server does.
_CLOSE_S = 1.0


class Host(Protocol):
    """What the rest of the server does about versions; called on the event loop."""

    def drop_caches(self, needed: Collection[FeatureNeeds]) -> None:
        """Drop the near caches of groups that none of these read."""

    def install(self, served: ServedModel) -> None:
        """Get ready for a version's first request."""

    def dismiss(self, served: ServedModel) -> None:
        """Let go of a version that nothing holds any more."""

    def runs(self, served: ServedModel) -> int:
        """Return how many engine runs of a version are under way."""


@dataclass(slots=True)
class VersionRecord:
    """A version that the server knows of."""

    phase: Phase
    since_s: float
    reason: str = ""
    retry_at_s: float = float("inf")
    report: Report = field(default_factory=Report)
    served: ServedModel | None = None


class HotSwap:
    """Keeps what is served as the labels say. Belongs to one event loop."""

    def __init__(
        self,
        store: ModelStore,
        config: ServerConfig,
        models: ServedModels,
        intake: Intake,
        host: Host,
        metrics: Metrics,
        supervisor: Supervisor,
        refusals: Refusals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._config = config
        self._models = models
        self._intake = intake
        self._host = host
        self._metrics = metrics
        self._supervisor = supervisor
        self._refusals = refusals
        self._clock = clock
        self.versions: dict[int, VersionRecord] = {}
        self.pinned: set[int] = set()
        self.entry: HistoryEntry | None = None
        self.looked_s = float("-inf")
        self.store_failure = ""
        self.events: deque[tuple[float, str]] = deque(maxlen=_EVENTS_KEPT)
        self.guard = LabelGuard(config, models, clock)
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Looks at the store; and what operators ask of it, which takes longer.
        self._looking = Worker("model-store", supervisor)
        self._calling = Worker("model-calls", supervisor)

    # What the server calls.

    async def start(self) -> None:
        """Load the default label's version, then whatever else can be; watch from then on.

        Raises:
            ModelStoreError, BundleError, UtilityError, SigningError, ProvingError: no version that the default label
                names or named can be served; of them, what the first one failed with.
        """
        default = self._models.default_label
        self.entry = await self._head()
        self.looked_s = self._clock()
        if self.entry is not None:
            self._models.share_traffic(self.entry.state.traffic)
        version = await self._looking.ask(
            self._config.swap.store_timeout_s, self._store.resolve, self._config.model, default
        )
        await self._begin_with(default, version)
        self._step()
        await self._settled.wait()
        self._run(self._supervisor.loop("model-watch", self._watch))
        if self._config.guard.enabled:
            self._run(self._supervisor.loop("label-guard", self._watch_labels))

    async def _begin_with(self, default: str, wanted: int) -> None:
        """Take in the newest version of the default label that can be proven now, the one it names before others."""
        ask, first = self._looking.ask, FirstVersion(self._store, self._refusals, self._config.model)
        limit_s = self._config.swap.proof_timeout_s
        before = await ask(limit_s, first.refused, wanted)
        failure: Exception | None = None
        candidates = first.candidates(default)
        while True:
            try:
                version = await ask(limit_s, next, candidates, None)
            except ModelStoreError as error:  # such as an older entry that is damaged
                raise failure or error from error
            if version is None:
                raise failure or ModelStoreError(f"{default} names no version")
            self.versions[version] = VersionRecord(Phase.SEEN, self._clock())
            why_not = await self._take_in(version, starting=True)
            if why_not is None:
                break
            failure = failure or why_not
        if version == wanted:
            if before is not None:
                _log.error(
                    "refused_version_served", label=default, version=version, reason=before, why="no other is good"
                )
            return
        self._act(Route(default, version))
        reason = str(failure) if before is None else f"{before} (before a restart)"
        if wanted not in self.versions:  # refused before: not tried until there are requests to try it on
            self.versions[wanted] = VersionRecord(Phase.VERIFYING, self._clock())
            self._fail(wanted, "surroundings", reason, self._config.swap.retry_s)
        self._note(f"{default}: {version} instead of {wanted}")
        _log.error("older_version_served", label=default, version=version, wanted=wanted, reason=reason)

    def behind(self) -> dict[str, tuple[int, int]]:
        """Return the labels that answer with another version than the store names: both versions. From any thread."""
        named = self.entry.state.labels if self.entry else {}
        return {
            label: (served.version, named[label])
            for label, served in self._models.by_label.copy().items()
            if named.get(label, served.version) != served.version
        }

    def coming(self) -> list[str]:
        """Say what is being taken in and how far it is, a line each. From any thread."""
        named = self.entry.state.labels if self.entry else {}
        found = []
        for version, held in self.versions.copy().items():
            labels = ", ".join(label for label in self._config.labels if named.get(label) == version) or "no label"
            warm_up = held.report.warm_up
            if held.phase is Phase.VERIFYING:
                found.append(f"{labels}: proving version {version}")
            elif held.phase is Phase.WARMING and warm_up is not None:
                what = f"warming up version {version}, {warm_up}" if warm_up.of else f"compiling version {version}"
                found.append(f"{labels}: {what}")
        return found

    def warm_ups(self) -> dict[int, WarmUp]:
        """Return the warm-ups of the versions in memory. From any thread."""
        versions = self.versions.copy().items()
        return {version: held.report.warm_up for version, held in versions if held.report.warm_up is not None}

    async def close(self) -> None:
        """Stop watching, give up what is being loaded, and free every version. No request may be in flight."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await self._intake.close()
        await asyncio.gather(
            *tasks, self._looking.close(_CLOSE_S), self._calling.close(_CLOSE_S), return_exceptions=True
        )
        for held in self.versions.values():
            if held.served is not None:
                held.served.model.engine.close()
        self.versions.clear()

    def look(self) -> None:
        """Look at the store now rather than in a while."""
        self._wake.set()

    async def load(self, version: int) -> VersionRecord:
        """Hold a version without a label; return it once it serves or failed. Raises ModelStoreError."""
        await self._calling.ask(self._config.swap.store_timeout_s, self._store.release, self._config.model, version)
        self.pinned.add(version)
        self._step()
        while True:
            held = self.versions.get(version)
            if held is None:
                raise ModelStoreError(f"version {version} was let go of meanwhile")
            if held.phase in {Phase.SERVING, Phase.FAILED}:
                return held
            self._settled.clear()
            await self._settled.wait()

    def unload(self, version: int) -> None:
        """Let go of a version held by `load`."""
        self.pinned.discard(version)
        self._step()

    async def set_label(self, label: str, version: int, by: str, why: str, expected: int | None) -> HistoryEntry | None:
        """Move a label in the store, and follow at once. Raises ModelStoreError, BundleError."""

        def move() -> HistoryEntry | None:
            return self._store.set_label(self._config.model, label, version, by=by, why=why, expected=expected)

        # It reads the whole bundle.
        entry = await self._calling.ask(self._config.swap.proof_timeout_s, move)
        self.look()
        return entry

    @property
    def labels(self) -> Mapping[str, int]:
        """The labels to serve and the versions that the store, or a guard, says; the default label first."""
        state = self.entry.state if self.entry else ModelState()
        default, found = self._models.default_label, {}
        for label in self._config.labels:
            if label in state.labels:
                found[label] = state.labels[label]
            elif label == default and label in self._models.by_label:  # it was removed: its last version goes on
                found[label] = self._models.by_label[label].version
        return {label: found[default] if self.guard.blocks(label, at) else at for label, at in found.items()}

    # Looking, deciding, doing.

    async def _watch(self) -> None:
        while True:
            await self._look()
            self._step()
            drains = any(held.phase is Phase.DRAINING for held in self.versions.values())
            try:
                async with asyncio.timeout(_DRAIN_LOOK_S if drains else self._config.swap.poll_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _watch_labels(self) -> None:
        """Take back what breaches its label's guard: apart from the other loop, so that neither ends with the other."""
        while True:
            for label, version, reason in await self.guard.breaches():
                await self._roll_back(label, version, reason)
            await asyncio.sleep(EVERY_S)

    async def _look(self) -> None:
        """Read the store's newest entry, if it is time; what cannot be read changes nothing."""
        if not self._wake.is_set() and self._clock() - self.looked_s < self._config.swap.poll_s:
            return
        self._wake.clear()
        try:
            entry = await self._head()
        except ModelStoreError as error:
            if not self.store_failure:
                _log.warning("model_store_failed", reason=str(error))
            self.store_failure = str(error)
            self._metrics.model_store_failures.inc()
            return
        if self.store_failure:
            _log.info("model_store_back")
        self.store_failure, self.looked_s = "", self._clock()
        if entry is not None and entry != self.entry:
            self.entry = entry
            self.guard.follow(entry.state.labels)
            self._models.share_traffic(entry.state.traffic)

    async def _head(self) -> HistoryEntry | None:
        return await self._looking.ask(self._config.swap.store_timeout_s, self._store.head, self._config.model)

    def _snapshot(self) -> Snapshot:
        known = {}
        for version, held in self.versions.items():
            in_flight = held.served.in_flight + self._host.runs(held.served) if held.served else 0
            known[version] = VersionState(held.phase, in_flight, held.retry_at_s)
        routes = {label: served.version for label, served in self._models.by_label.items()}
        return Snapshot(self._clock(), self.labels, frozenset(self.pinned), known, routes)

    def _step(self) -> None:
        """Do all that is to be done now."""
        while decisions := decide(self._snapshot()):
            for decision in decisions:
                self._act(decision)
        if not any(held.phase in {Phase.SEEN, Phase.VERIFYING, Phase.WARMING} for held in self.versions.values()):
            self._settled.set()

    def _act(self, decision: Decision) -> None:
        models, versions = self._models, self.versions
        match decision:
            case See(version):
                versions[version] = VersionRecord(Phase.SEEN, self._clock())
                self._note(f"{version} seen")
            case Load(version):
                self._become(version, Phase.VERIFYING)
                self._run(self._supervisor.task("model-intake", self._load(version)))
            case Route(label, version):
                self._serve(version)
                previous = models.by_label.get(label)
                self._label(label, versions[version].served)
                self._note(f"{label}: {previous.version if previous else 'none'} -> {version}")
                self._metrics.swaps.labels("done").inc()
            case Unroute(label):
                self._label(label, None)
                self._note(f"{label} removed")
            case Serve(version):
                self._serve(version)
            case Drain(version):
                self._become(version, Phase.DRAINING)
                models.by_version.pop(version, None)
            case Unload(version):
                self._become(version, Phase.GONE)
                self._free(versions.pop(version))
            case Retry(version):
                before = versions[version]
                versions[version] = VersionRecord(followed(before.phase, Phase.SEEN), self._clock(), before.reason)
            case Forget(version):
                self._become(version, Phase.GONE)
                del versions[version]

    def _serve(self, version: int) -> None:
        held = self.versions[version]
        if held.phase is not Phase.SERVING:
            self._become(version, Phase.SERVING)
        assert held.served is not None, "what is ready is there"  # noqa: S101
        held.reason = ""
        self._models.by_version[version] = held.served

    def _label(self, label: str, served: ServedModel | None) -> None:
        before = self._models.by_label.get(label)
        if served is None:
            del self._models.by_label[label]
            self._models.windows.pop(label, None)
        else:
            # The default label stays the first.
            self._models.by_label[label] = served
            self._models.windows[label] = Window(self._config.guard.window_s)
        self.guard.verdicts.pop(label, None)
        for one, value in ((before, None), (served, 1)):
            if one is not None:
                names = (one.model.manifest.name, str(one.version), label, one.model.digest)
                if value is None:
                    self._metrics.model_info.remove(*names)
                else:
                    self._metrics.model_info.labels(*names).set(value)

    def _free(self, held: VersionRecord) -> None:
        """Free what a version took, off the loop."""
        served, held.served = held.served, None
        if served is None:
            return
        self._host.dismiss(served)
        self._drop_caches()
        self._run(self._supervisor.task("model-intake", self._intake.free(served.model)))

    def _drop_caches(self) -> None:
        loaded = (held.served for held in self.versions.values() if held.served is not None)
        self._host.drop_caches([served.model.needs for served in loaded])

    def _become(self, version: int, phase: Phase) -> None:
        held = self.versions[version]
        held.phase, held.since_s = followed(held.phase, phase), self._clock()
        if phase in {Phase.READY, Phase.DRAINING, Phase.GONE}:
            self._note(f"{version} {phase}")
        _log.info("model_phase", model=f"{self._config.model}@{version}", phase=str(phase))

    def _note(self, text: str) -> None:
        self.events.append((self._clock(), text))

    def _run(self, supervised: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(supervised)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Taking a version in.

    async def _load(self, version: int) -> None:
        await self._take_in(version)
        self._step()

    async def _take_in(self, version: int, *, starting: bool = False) -> Exception | None:
        """Make a version ready, or let it fail and return why."""
        if starting:
            self._become(version, Phase.VERIFYING)
        held, replaced = self.versions[version], {} if starting else self._replaced_by(version)
        try:
            served = await self._intake.take_in(
                version, replaced, held.report, lambda: self._become(version, Phase.WARMING), starting=starting
            )
            self._host.install(served)
        except (BundleError, SigningError, UtilityError) as error:
            self._fail(version, "bundle", str(error), None)
            if not starting:  # the next start proves anew, but has nothing to compare with
                self._refusals.note(held.report.digest, str(error))
            return error
        except (ModelStoreError, NotReadyError, ProvingError) as error:
            self._fail(version, "surroundings", str(error), self._config.swap.retry_s)
            return error
        except Exception as error:  # noqa: BLE001 - the boundary: whatever a bundle can raise leaves what is serving alone
            _log.error("model_load_failed", exc_info=error)
            # Its text may quote a row of the recent requests that the version was tried on.
            self._fail(version, "unexpected", f"{type(error).__name__}; the log's model_load_failed says where", None)
            return error
        held.served = served
        if held.report.warm_up is not None and held.report.warm_up.cut_off:
            self._metrics.warm_ups_cut_off.inc()
        self._become(version, Phase.READY)
        self._refusals.forget(held.report.digest)
        return None

    def _replaced_by(self, version: int) -> dict[str, Manifest]:
        """Return what answers now for the labels that a version is for; in the shadow nobody is answered."""
        labels = [label for label, wanted in self.labels.items() if wanted == version]
        return {
            label: self._models.by_label.get(label, self._models.default).model.manifest
            for label in labels
            if label != self._config.shadow.label
        }

    def _fail(self, version: int, kind: str, reason: str, retry_s: float | None) -> None:
        self._drop_caches()
        self._run(self._supervisor.task("model-intake", self._intake.give_back()))
        held = self.versions[version]
        known = held.reason == reason
        held.phase, held.since_s, held.reason = followed(held.phase, Phase.FAILED), self._clock(), reason
        if retry_s is not None:
            held.retry_at_s = self._clock() + retry_s
        if not known:  # a try again that fails as the one before is no news
            self._note(f"{version} failed: {reason}")
            _log.error(
                "model_failed", model=f"{self._config.model}@{version}", kind=kind, reason=reason, retry_s=retry_s
            )
        self._metrics.swaps.labels(f"failed_{kind}").inc()

    async def _roll_back(self, label: str, version: int, reason: str) -> None:
        """Give a label the default label's version, here at once and in the store for everybody."""
        why = f"rolled back from {version}: {reason}"
        self.guard.block(label, version)
        self._note(f"{label}: {why}")
        self._metrics.rollbacks.labels(label).inc()
        _log.error("model_rolled_back", model=f"{self._config.model}@{version}", label=label, reason=reason)
        self._step()
        default = self.labels[self._models.default_label]
        try:
            await self.set_label(label, default, f"guard of {whoami()}", why, version)
        except (ModelStoreError, BundleError) as error:  # another server was faster, or the store is away
            _log.warning("rollback_not_recorded", label=label, reason=str(error))
