"""Read-only status of a server, for ModelService, `/healthz`, metrics and tests."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType

from feature_client.near_cache import NearCache
from model_store.registry.history import HistoryEntry
from pinrank.v1 import models_pb2
from server.proving.warm_up import WarmUp
from server.request.features import FeatureReader
from server.request.parties import PartyTotals
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
    """Read-only view of a server. Read it on the event loop, except where a docstring says "from any thread"."""

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
        """Store the parts to read, and the labels that the server may serve."""
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

    # Models that serve.

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
        """For each surface, each label's share of the calls that name no label."""
        return self._models.traffic

    def window(self, label: str, now_s: float) -> WindowSummary | None:
        """Return a summary of a label's recent requests; None if no version answers for it."""
        window = self._models.windows.get(label)
        return window.seen(now_s) if window else None

    @property
    def party_totals(self) -> Mapping[tuple[str, str, tuple[str, ...]], PartyTotals]:
        """What answers were worth to parties since the start, by label, surface and its parties. From any thread."""
        return self._models.party_totals.copy()

    @property
    def thetas(self) -> dict[tuple[str, str, str], float]:
        """The least mean utility that the served tables state, by party, surface and label. From any thread."""
        return {
            (party, surface, label): theta
            for label, served in self._models.by_label.copy().items()
            for surface, table in served.utility.surfaces.items()
            for party, theta in table.at_least.items()
        }

    # Versions and the model store.

    @property
    def versions(self) -> Mapping[int, VersionRecord]:
        """A copy of the records of every known version. From any thread."""
        return self._swap.versions.records

    @property
    def events(self) -> Sequence[tuple[float, str]]:
        """Recent events of versions, each with its time on the monotonic clock in seconds."""
        return tuple(self._swap.versions.events)

    @property
    def entry(self) -> HistoryEntry | None:
        """The newest entry of the model store; None before the first."""
        return self._swap.newest.entry

    @property
    def entry_read_s(self) -> float:
        """When the model store was last read, in seconds on the monotonic clock."""
        return self._swap.newest.read_s

    @property
    def store_failure(self) -> str:
        """Why the last read of the model store failed; empty if it succeeded."""
        return self._swap.newest.failure

    @property
    def wanted(self) -> Mapping[str, int]:
        """The labels to serve and the version of each, by the model store or the label guard."""
        return self._swap.labels

    @property
    def verdicts(self) -> Mapping[str, Verdict]:
        """The latest verdict of the label guard, by label."""
        return MappingProxyType(self._swap.guard.verdicts)

    def warm_ups(self) -> dict[int, WarmUp]:
        """Return the warm-up of every version that started one. From any thread."""
        return self._swap.versions.warm_ups()

    def behind(self) -> dict[str, tuple[int, int]]:
        """Return each lagging label with the version that answers and the one that the store names. From any thread."""
        named = self._swap.newest.labels
        return {
            label: (served.version, named[label])
            for label, served in self._models.by_label.copy().items()
            if named.get(label, served.version) != served.version
        }

    def lines(self) -> list[str]:
        """Return the lines of `/healthz`: versions being loaded, lagging labels, background tasks. From any thread."""
        behind = [
            f"{label}: answers with version {answers}, the model store names {named}"
            for label, (answers, named) in self.behind().items()
        ]
        return [*self.loading_lines(), *behind, *self._supervisor.lines()]

    def loading_lines(self) -> list[str]:
        """Return a line with the progress of each version that is being loaded. From any thread."""
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

    # What the server keeps for the models.

    @property
    def installed(self) -> int:
        """Number of models in memory."""
        return len(self._installed)

    @property
    def near_caches(self) -> Sequence[NearCache]:
        return tuple(self._features.caches.values())

    @property
    def recorded(self) -> Sequence[RecordedSequence]:
        """The sequences that the server records actions into."""
        return self._recording.sequences

    @property
    def costs(self) -> Mapping[Hashable, CostModel]:
        """The learned run costs of the models in memory, by model digest."""
        return MappingProxyType(self._costs)

    @property
    def idle_streams(self) -> int:
        """Number of engine streams with nothing to run."""
        return self._runner.idle_streams

    @property
    def shadow(self) -> models_pb2.ShadowStatus:
        """How the shadow label's rankings compare with those that callers received. From any thread."""
        return self._shadow.status()

    @property
    def comparing(self) -> int:
        """Number of requests that the shadow label is ranking now."""
        return self._shadow.comparing
