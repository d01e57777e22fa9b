"""Records of the model versions that a server knows; the only place that changes a version's phase."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from server.proving.admit_version import Report
from server.proving.warm_up import WarmUp
from server.request.routing import ServedModel
from server.rollout.lifecycle import Phase, VersionState, followed

_log = structlog.get_logger(__name__)

_EVENTS_KEPT = 100
#: Phases that are kept as events. The others are only logged, or have an event of their own.
_EVENTS = frozenset({Phase.READY, Phase.DRAINING, Phase.GONE})


@dataclass(slots=True)
class VersionRecord:
    """A version that the server knows of.

    Attributes:
        since_s: when it entered its phase, on the clock of `Versions`.
        phase: its current phase.
        reason: why it failed last; empty once it serves.
        retry_at_s: when a failed version is retried; infinity for never.
        report: the results of its checks.
        served: its model, while that is in memory.
    """

    since_s: float
    phase: Phase = Phase.SEEN
    reason: str = ""
    retry_at_s: float = float("inf")
    report: Report = field(default_factory=Report)
    served: ServedModel | None = None


class Versions:
    """The record of every known version by number, and recent events. Belongs to one event loop.

    Attributes:
        pinned: versions to keep without a label.
        events: recent events, each with its time on the clock.
    """

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Store the model's name and the clock (seconds, monotonic)."""
        self._model = model
        self._clock = clock
        self._records: dict[int, VersionRecord] = {}
        self.pinned: set[int] = set()
        self.events: deque[tuple[float, str]] = deque(maxlen=_EVENTS_KEPT)

    def __getitem__(self, version: int) -> VersionRecord:
        return self._records[version]

    def __contains__(self, version: int) -> bool:
        return version in self._records

    def get(self, version: int) -> VersionRecord | None:
        return self._records.get(version)

    @property
    def records(self) -> Mapping[int, VersionRecord]:
        """A copy of the records, by version. From any thread."""
        return self._records.copy()

    def see(self, version: int) -> None:
        """Add a version to the known ones."""
        self._records[version] = VersionRecord(self._clock())

    def become(self, version: int, phase: Phase) -> VersionRecord:
        """Move a version to its next phase. Raises PhaseError if the table does not allow that."""
        record = self._records[version]
        record.phase, record.since_s = followed(record.phase, phase), self._clock()
        if phase in _EVENTS:
            self.note(f"{version} {phase}")
        if phase not in {Phase.SEEN, Phase.FAILED}:
            _log.info("model_phase", model=f"{self._model}@{version}", phase=str(phase))
        return record

    def retry(self, version: int) -> None:
        """Put a failed version back to `seen`; its reason stays until it serves."""
        record = self.become(version, Phase.SEEN)
        record.retry_at_s, record.report = float("inf"), Report()

    def fail(self, version: int, fault: str, reason: str, retry_s: float | None) -> None:
        """Record and log that a version failed.

        Args:
            version: its number.
            fault: what was at fault, as the metric of failures names it.
            reason: a sentence for operators.
            retry_s: seconds until it is retried; None for never.
        """
        record = self.become(version, Phase.FAILED)
        known, record.reason = record.reason == reason, reason
        if retry_s is not None:
            record.retry_at_s = self._clock() + retry_s
        if not known:  # do not report a retry that fails in the same way
            self.note(f"{version} failed: {reason}")
            _log.error("model_failed", model=f"{self._model}@{version}", kind=fault, reason=reason, retry_s=retry_s)

    def serve(self, version: int) -> ServedModel:
        """Make a version in memory serve, unless it already does; return its model."""
        record = self._records[version]
        if record.phase is not Phase.SERVING:
            self.become(version, Phase.SERVING)
        assert record.served is not None, "a version that is ready has a model"  # noqa: S101
        record.reason = ""
        return record.served

    def remove(self, version: int) -> ServedModel | None:
        """Drop a version; return its model, if it has one, for the caller to free."""
        record = self.become(version, Phase.GONE)
        del self._records[version]
        served, record.served = record.served, None
        return served

    def clear(self) -> list[VersionRecord]:
        """Drop all versions when the server stops; return their records."""
        records = list(self._records.values())
        self._records.clear()
        return records

    def note(self, text: str) -> None:
        """Add an event for operators."""
        self.events.append((self._clock(), text))

    def states(self, in_flight: Callable[[ServedModel], int]) -> dict[int, VersionState]:
        """Return the state of every version, as `lifecycle.decide` takes it."""
        return {
            version: VersionState(one.phase, in_flight(one.served) if one.served else 0, one.retry_at_s)
            for version, one in self._records.items()
        }

    def any_in(self, *phases: Phase) -> bool:
        return any(one.phase in phases for one in self._records.values())

    def warm_ups(self) -> dict[int, WarmUp]:
        """Return the warm-up of every version that started one. From any thread."""
        return {number: one.report.warm_up for number, one in self.records.items() if one.report.warm_up is not None}
