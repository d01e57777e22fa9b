"""The metrics that the server updates as it works; collectors provide those that are computed during a scrape.

Each class holds the metrics of one part of the server. Units are Prometheus' base units: seconds, rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
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


class CallerMetrics:
    """Metrics of callers. Their names come from a file, so there are few."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = CallCounter(
            "pinrank_caller_calls",
            "Calls by caller (anonymous has no identity, unknown a wrong one) and what the server decided on arrival: "
            "admitted, unauthenticated, denied because it may not do this, or over one of its quotas",
            ("caller", "outcome"),
            registry,
        )
        reloads = Counter(
            "pinrank_callers_reloads",
            "Changes of the file of callers that the server took over (done) or refused because it is invalid (failed)",
            ["outcome"],
            registry=registry,
        )
        self.reloads_done, self.reloads_failed = reloads.labels("done"), reloads.labels("failed")

    def count(self, caller: str, outcome: str) -> None:
        """Count one call."""
        self._calls.counts[caller, outcome] += 1


class ConnectionMetrics(Collector):
    """Metrics of the gRPC port's connections; of its own server, since grpcio tells nothing of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.open = 0
        self._closed = CallCounter(
            "pinrank_connections_closed",
            "Connections that the server closed, by reason: broken (no HTTP/2), crowded (more than connections_max; "
            "the one that did least), idle, resets (calls begun only to be ended), silent (no HTTP/2 within 20 s), "
            "unread (takes no answers for 20 s)",
            ("reason",),
            registry,
        )
        registry.register(self)

    def closed(self, reason: str) -> None:
        """Count a connection."""
        self._closed.counts[reason,] += 1

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("pinrank_connections", "Open connections of the gRPC port", self.open)


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
        self.prover_confined = Gauge(
            "pinrank_prover_confined",
            "1 if the process that proved the newest version was kept from the network, from programs and from files, "
            "0 if this system cannot do that (the log says why)",
            registry=registry,
        )
        self.store_failures = Counter(
            "pinrank_model_store_failures", "Failed polls of the model store", registry=registry
        )


class TlsMetrics:
    """Metrics of the certificate, and of clients that connect with TLS."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._expiry_seconds = Gauge(
            "pinrank_tls_certificate_expiry_seconds",
            "Unix time at which the certificate expires that new connections are served with, by serial number",
            ["serial"],
            registry=registry,
        )
        reloads = Counter(
            "pinrank_tls_reloads",
            "Changes of the certificate files by outcome: done, or refused because the new files cannot be served",
            ["outcome"],
            registry=registry,
        )
        self.renewed, self.refused = reloads.labels("done"), reloads.labels("refused")
        handshakes = Counter(
            "pinrank_tls_handshakes",
            "TLS handshakes on the gRPC port, by event: begun, done, failed (the log says why), or no_h2: done, but "
            "the client does not offer HTTP/2. Those begun and neither done nor failed timed out, were given up or "
            "are in progress. The edge grpcio counts none",
            ["event"],
            registry=registry,
        )
        self.begun, self.done = handshakes.labels("begun"), handshakes.labels("done")
        self.failed, self.no_h2 = handshakes.labels("failed"), handshakes.labels("no_h2")

    def serve(self, serial: str, expires_at_s: float) -> None:
        """Note which certificate new connections are served with, and when it expires, in Unix time."""
        self._expiry_seconds.clear()
        self._expiry_seconds.labels(serial).set(expires_at_s)


class Metrics:
    """All metrics of a server, on a separate registry, so that tests can run many servers in one process."""

    def __init__(self, supervisor: Supervisor | None = None) -> None:
        """Create the metrics and their registry, including those of a supervisor's background work."""
        self.registry = CollectorRegistry()
        self._supervisor = supervisor or Supervisor()
        self.requests = RequestMetrics(self.registry)
        self.callers = CallerMetrics(self.registry)
        self.connections = ConnectionMetrics(self.registry)
        self.engine = EngineMetrics(self.registry)
        self.exploration = ExplorationMetrics(self.registry)
        self.actions = ActionMetrics(self.registry)
        self.models = ModelMetrics(self.registry)
        self.tls = TlsMetrics(self.registry)
        self.register(BackgroundCollector(self._supervisor), LogLineCollector())

    def register(self, *collectors: Collector) -> None:
        """Add collectors to the export; one that fails does not affect the others."""
        for collector in collectors:
            self.registry.register(SafeCollector(collector, self._supervisor))

    def value(self, name: str, /, **labels: str) -> float | None:
        """Return a sample's current value, or None if there is no such sample."""
        return self.registry.get_sample_value(name, labels)
