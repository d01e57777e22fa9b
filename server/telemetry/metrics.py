"""The metrics that the server updates as it works; collectors provide those that are computed during a scrape.

Each class holds the metrics of one part of the server. Units are Prometheus' base units: seconds, rows.
"""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.registry import Collector

from feature_client.activity.writer import ActionOutcome
from model_store.exploration.explorer import Explored, Withheld
from pinrank.answers import DEGRADATIONS
from server.runtime.supervisor import Supervisor
from server.telemetry.collectors import BackgroundCollector, CallCounter, LogLineCollector, SafeCollector
from server.telemetry.histograms import Histograms

#: Bucket bounds, dense around the 10 ms budget: 12 of them between 1 and 25 ms.
_SECONDS = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.006, 0.0075, 0.01, 0.0125, 0.015,
    0.02, 0.025, 0.035, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0,
)  # fmt: skip
#: The cause of a version's failure.
Fault = Literal["bundle", "surroundings", "unexpected"]
_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class RequestMetrics:
    """Metrics of Rank calls."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = CallCounter(
            "pinrank_requests",
            "Rank calls by surface (unknown if invalid or refused unread) and gRPC status code",
            ("surface", "code"),
            registry,
        )
        self.request_seconds = Histograms(
            "pinrank_request_seconds",
            "Time of answered Rank calls from the first byte parsed to the response serialised",
            "surface",
            _SECONDS,
            registry,
        )
        self.stage_seconds = Histograms(
            "pinrank_stage_seconds", "Time of answered Rank calls, by stage", "stage", _SECONDS, registry
        )
        self.refusal_seconds = Histograms(
            "pinrank_refusal_seconds",
            "Time of refused Rank calls from the first byte parsed to the refusal",
            "surface",
            _SECONDS,
            registry,
        )
        self.candidates = Histograms("pinrank_candidates", "Candidates per valid Rank call", None, _ROWS, registry)
        degraded = Counter(
            "pinrank_degraded", "Degraded answers, by field of pinrank.v1.Degradation", ["kind"], registry=registry
        )
        self.degraded = {kind: degraded.labels(kind) for kind in DEGRADATIONS}

    def count(self, surface: str, code: str) -> None:
        """Count one Rank call."""
        self._calls.counts[surface, code] += 1


class EngineMetrics:
    """Metrics of engine runs, and of rows that were never scored."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.run_rows = Histograms("pinrank_run_rows", "Rows per engine run", None, _ROWS, registry)
        self.run_requests = Histograms(
            "pinrank_run_requests", "Requests per engine run", None, (1, 2, 4, 8, 16, 32), registry
        )
        self.run_seconds = Histograms("pinrank_run_seconds", "Duration of engine runs", None, _SECONDS, registry)
        self.run_cpu_seconds = Counter(
            "pinrank_run_cpu_seconds",
            "Processor time of engine runs, if the engine runs on the CPU",
            registry=registry,
        )
        self.loop_rest_seconds = Counter(
            "pinrank_loop_rest_seconds",
            "Time for which the event loop let requests gather while all engine streams had work ahead",
            registry=registry,
        )
        self.expired_rows = Counter(
            "pinrank_expired_rows", "Rows that could no longer be scored in time; never scored", registry=registry
        )
        self.cancelled_rows = Counter(
            "pinrank_cancelled_rows",
            "Rows whose caller hung up while they were queued; never scored",
            registry=registry,
        )
        self.late_run_rows = Counter(
            "pinrank_late_run_rows",
            "Rows whose run began after their deadline or after their caller hung up; should stay 0",
            registry=registry,
        )


class ExplorationMetrics:
    """Metrics of requests that explored."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "pinrank_explored_requests",
            "Requests that explored, by surface, arm and outcome: answered in the arm's order, or withheld because "
            "that order is beyond regret_max",
            ["surface", "arm", "outcome"],
            registry=registry,
        )
        self._regret = Counter(
            "pinrank_explored_regret",
            "Predicted utility that explored answers gave up, as discounted sums over their pins, by surface",
            ["surface"],
            registry=registry,
        )

    def count(self, surface: str, decision: Explored | Withheld) -> None:
        """Count a request that explored."""
        outcome = "answered" if isinstance(decision, Explored) else "withheld"
        self._requests.labels(surface, decision.arm, outcome).inc()
        if isinstance(decision, Explored):
            self._regret.labels(surface).inc(max(0.0, decision.regret))  # rounding may give less than 0


class ActionMetrics:
    """Metrics of recorded actions."""

    def __init__(self, registry: CollectorRegistry) -> None:
        actions = Counter(
            "pinrank_actions",
            "Recorded actions, by outcome: added, repeated, too old, or refused because of a limit on new users or on "
            "a user's actions",
            ["outcome"],
            registry=registry,
        )
        self.outcomes = {outcome: actions.labels(outcome.name.lower()) for outcome in ActionOutcome}
        self.future_actions = Counter(
            "pinrank_future_actions_dropped",
            "Stored actions too far in the future, dropped when their user's sequence was written",
            registry=registry,
        )


class ModelMetrics:
    """Metrics of model versions and their swaps."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.info = Gauge(
            "pinrank_model_info", "1 for each served label", ["model", "version", "label", "digest"], registry=registry
        )
        swaps = Counter(
            "pinrank_model_swaps",
            "Versions that began to answer for a label (done), or failed because of their bundle, because of "
            "their surroundings (features, memory, the store; retried), or unexpectedly",
            ["outcome"],
            registry=registry,
        )
        self.done = swaps.labels("done")
        self.failed = {fault: swaps.labels(f"failed_{fault}") for fault in get_args(Fault)}
        self.rollbacks = Counter(
            "pinrank_model_rollbacks", "Versions that a guard rolled back from a label", ["label"], registry=registry
        )
        self.warm_ups_cut_off = Counter(
            "pinrank_model_warm_ups_cut_off",
            "Warm-ups that exceeded their time limit, so that the first requests of some shapes are slower",
            registry=registry,
        )
        self.store_failures = Counter(
            "pinrank_model_store_failures", "Failed polls of the model store", registry=registry
        )


class Metrics:
    """All metrics of a server, on a separate registry, so that tests can run many servers in one process."""

    def __init__(self, supervisor: Supervisor | None = None) -> None:
        """Create the metrics and their registry, including those of a supervisor's background work."""
        self.registry = CollectorRegistry()
        self._supervisor = supervisor or Supervisor()
        self.requests = RequestMetrics(self.registry)
        self.engine = EngineMetrics(self.registry)
        self.exploration = ExplorationMetrics(self.registry)
        self.actions = ActionMetrics(self.registry)
        self.models = ModelMetrics(self.registry)
        self.register(BackgroundCollector(self._supervisor), LogLineCollector())

    def register(self, *collectors: Collector) -> None:
        """Add collectors to the export; one that fails does not affect the others."""
        for collector in collectors:
            self.registry.register(SafeCollector(collector, self._supervisor))

    def value(self, name: str, /, **labels: str) -> float | None:
        """Return a sample's current value, or None if there is no such sample."""
        return self.registry.get_sample_value(name, labels)
