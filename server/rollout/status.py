"""What a server holds and how it does: read by ModelService, `/healthz`, metrics and tests; nothing is changed here."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType

from feature_client.near_cache import NearCache
from model_store.registry.history import HistoryEntry
from pinrank.v1 import models_pb2
from server.proving.warm_up import WarmUp
from server.request.features import FeatureReader
from server.request.recording import RecordedSequence, Recording
from server.request.routing import ServedModel, ServedModels
from server.request.windows import WindowSummary
from server.rollout.guard import Verdict
from server.rollout.hot_swap import HotSwap
from server.rollout.installed_models import InstalledModels
from server.rollout.lifecycle import Phase
from server.rollout.shadow import Shadow
from server.rollout.versions import VersionRecord
from server.runtime.supervisor import Supervisor
from server.scheduling.cost import CostModel
from server.scheduling.engine_streams import Runner


class ServerStatus:
    """A server to look at. What says so may be read from any thread, the rest on the event loop."""

    def __init__(
        self,
        labels: Sequence[str],
        models: ServedModels,
        swap: HotSwap,
        shadow: Shadow,
        installed: InstalledModels,
        features: FeatureReader,
        recording: Recording,
        runner: Runner,
        costs: Mapping[Hashable, CostModel],
        supervisor: Supervisor,
    ) -> None:
        """Remember the parts to look at, and the labels that may be served."""
        self._labels = labels
        self._models = models
        self._swap = swap
        self._shadow = shadow
        self._installed = installed
        self._features = features
        self._recording = recording
        self._runner = runner
        self._costs = costs
        self._supervisor = supervisor

    # What answers.

    @property
    def default(self) -> ServedModel:
        """The model of the default label."""
        return self._models.default

    @property
    def by_label(self) -> Mapping[str, ServedModel]:
        return MappingProxyType(self._models.by_label)

    @property
    def by_version(self) -> Mapping[int, ServedModel]:
        return MappingProxyType(self._models.by_version)

    @property
    def traffic(self) -> Mapping[str, Mapping[str, float]]:
        """By surface, the shares of calls that name no label."""
        return self._models.traffic

    def window(self, label: str, now_s: float) -> WindowSummary | None:
        """Return what became of a label's requests lately; None for one that answers nothing."""
        window = self._models.windows.get(label)
        return window.seen(now_s) if window else None

    # Versions, and what the model store says of them.

    @property
    def versions(self) -> Mapping[int, VersionRecord]:
        """Every known version, a copy. From any thread."""
        return self._swap.versions.records

    @property
    def events(self) -> Sequence[tuple[float, str]]:
        """What happened to versions lately, with its time on the monotonic clock."""
        return tuple(self._swap.versions.events)

    @property
    def entry(self) -> HistoryEntry | None:
        """The model store's newest entry."""
        return self._swap.newest.entry

    @property
    def entry_read_s(self) -> float:
        """When it was read, on the monotonic clock."""
        return self._swap.newest.read_s

    @property
    def store_failure(self) -> str:
        """Why the model store could not be read; empty when it could."""
        return self._swap.newest.failure

    @property
    def wanted(self) -> Mapping[str, int]:
        """The labels to serve and their versions, by the model store or a guard."""
        return self._swap.labels

    @property
    def verdicts(self) -> Mapping[str, Verdict]:
        """By label, what its guard found last."""
        return MappingProxyType(self._swap.guard.verdicts)

    def warm_ups(self) -> dict[int, WarmUp]:
        """Return the warm-up of every version that began one. From any thread."""
        return self._swap.versions.warm_ups()

    def behind(self) -> dict[str, tuple[int, int]]:
        """Return the labels that answer with another version than the store names: both versions. From any thread."""
        named = self._swap.newest.labels
        return {
            label: (served.version, named[label])
            for label, served in self._models.by_label.copy().items()
            if named.get(label, served.version) != served.version
        }

    def lines(self) -> list[str]:
        """Say for `/healthz` what is not as it should be, and how background work does. From any thread."""
        behind = [
            f"{label}: answers with version {answers}, the model store names {named}"
            for label, (answers, named) in self.behind().items()
        ]
        return [*self._coming(), *behind, *self._supervisor.lines()]

    def _coming(self) -> list[str]:
        """Say what is being taken in and how far it is, a line each."""
        named = self._swap.newest.labels
        found = []
        for version, record in self.versions.items():
            labels = ", ".join(label for label in self._labels if named.get(label) == version) or "no label"
            warm_up = record.report.warm_up
            if record.phase is Phase.VERIFYING:
                found.append(f"{labels}: proving version {version}")
            elif record.phase is Phase.WARMING and warm_up is not None:
                what = f"warming up version {version}, {warm_up}" if warm_up.of else f"compiling version {version}"
                found.append(f"{labels}: {what}")
        return found

    # What the rest of the server holds for them.

    @property
    def installed(self) -> int:
        """How many models are in memory."""
        return len(self._installed)

    @property
    def near_caches(self) -> Sequence[NearCache]:
        return tuple(self._features.caches.values())

    @property
    def recorded(self) -> Sequence[RecordedSequence]:
        """The sequences that actions are recorded into."""
        return self._recording.sequences

    @property
    def costs(self) -> Mapping[Hashable, CostModel]:
        """What runs cost, by the digests of the models in memory."""
        return MappingProxyType(self._costs)

    @property
    def idle_streams(self) -> int:
        """How many engine streams have nothing to do."""
        return self._runner.idle_streams

    @property
    def shadow(self) -> models_pb2.ShadowStatus:
        """How the shadow label's answers compare with those given. From any thread."""
        return self._shadow.status()

    @property
    def comparing(self) -> int:
        """How many requests the shadow label ranks now."""
        return self._shadow.comparing
