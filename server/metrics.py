"""Every metric the server exports, in one table: seconds and rows, Prometheus' base units."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: Fine around the 10 ms budget: 12 bounds between 1 and 25 ms.
_SECONDS = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.006, 0.0075, 0.01, 0.0125, 0.015,
    0.02, 0.025, 0.035, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0,
)  # fmt: skip
_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

STAGES = ("wire", "fetch", "assemble", "queue", "score", "utility", "select", "response")
#: The ways an answer is degraded: `pinrank.v1.Degradation`, field by field.
DEGRADATIONS = (
    "user_missing", "sequence_missing", "pins_missing", "sequence_pins_missing", "query_missing", "foreign_values",
    "store_unavailable", "non_finite_scores", "pins_trimmed", "fallback_order",
)  # fmt: skip


class Metrics:
    """The server's metrics, on a registry of their own so that tests can run many servers in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "pinrank_requests", "Rank calls by surface and gRPC status code", ["surface", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "pinrank_request_seconds",
            "Time of answered Rank calls from first byte parsed to response serialised",
            ["surface"],
            buckets=_SECONDS,
            registry=registry,
        )
        stage_seconds = Histogram(
            "pinrank_stage_seconds",
            "Time of answered Rank calls by stage",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_seconds = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self.candidates = Histogram(
            "pinrank_candidates", "Candidates per valid Rank call", buckets=_ROWS, registry=registry
        )
        degraded = Counter(
            "pinrank_degraded", "Answers degraded, by what was missing or left out", ["kind"], registry=registry
        )
        self.degraded = {kind: degraded.labels(kind) for kind in DEGRADATIONS}
        self.run_rows = Histogram("pinrank_run_rows", "Rows per engine run", buckets=_ROWS, registry=registry)
        self.run_requests = Histogram(
            "pinrank_run_requests", "Requests per engine run", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.expired_rows = Counter(
            "pinrank_expired_rows", "Rows that could no longer be scored in time; never scored", registry=registry
        )
        self.cancelled_rows = Counter(
            "pinrank_cancelled_rows", "Rows whose caller hung up in the queue; never scored", registry=registry
        )
        self.requests_in_flight = Gauge("pinrank_requests_in_flight", "Rank calls admitted", registry=registry)
        self.rows_in_flight = Gauge("pinrank_rows_in_flight", "Candidates of admitted Rank calls", registry=registry)
        self.model_info = Gauge(
            "pinrank_model_info",
            "1 for each served label",
            ["model", "version", "label", "digest"],
            registry=registry,
        )
