"""Every metric the server exports, in one table: seconds and rows, Prometheus' base units."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from feature_client.activity.writer import ActionOutcome
from feature_client.near_cache import NearCache
from feature_client.stores.lmdb_store import EmbeddedStore
from feature_client.stores.redis.store import RedisStore
from feature_client.stores.store import Store
from server.proving.warm_up import WarmUp
from server.request.routing import ServedModels, drifts
from server.runtime.supervisor import Supervisor
from server.scheduling.admission import Admission
from server.telemetry.logs import withheld_lines

if TYPE_CHECKING:
    from server.rollout.shadow import Shadow

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
    "store_unavailable", "stale_rows", "non_finite_scores", "pins_trimmed", "cheaper_model", "fallback_order",
)  # fmt: skip
_FOLD_AT = 4_096


class Histograms(Collector):
    """Histograms of one name, one for each value of a label, whose observations are folded many at a time.

    An observation costs an append; prometheus_client's own takes a lock and 3 us, a dozen times a request.
    """

    def __init__(
        self, name: str, documentation: str, label: str | None, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._label = label
        self._buckets = np.array(buckets, np.float64)
        self._counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(buckets) + 1, np.int64))
        self._sums: dict[str, float] = defaultdict(float)
        self._pending: dict[str, list[float]] = defaultdict(list)
        #: Engine streams fold, and so does the thread that tells metrics.
        self._folding = threading.Lock()
        registry.register(self)

    def observe(self, value: float, label: str = "") -> None:
        """Note one value. May be called from any thread."""
        pending = self._pending[label]
        pending.append(value)
        if len(pending) >= _FOLD_AT:
            self._fold(label)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=[self._label] if self._label else [])
        for label in sorted(self._pending):
            self._fold(label)
            cumulative = np.cumsum(self._counts[label]).tolist()
            bounds = [*(f"{bound:.12g}" for bound in self._buckets), "+Inf"]
            buckets = list(zip(bounds, cumulative, strict=True))
            family.add_metric([label] if self._label else [], buckets, self._sums[label])
        yield family

    def _fold(self, label: str) -> None:
        pending = self._pending[label]
        with self._folding:
            # What is appended meanwhile stands behind these and stays.
            values = np.array(pending[:], np.float64)
            del pending[: len(values)]
            # A bucket holds what is at most its bound.
            self._counts[label] += np.bincount(np.searchsorted(self._buckets, values), minlength=len(self._buckets) + 1)
            self._sums[label] += float(values.sum())


class _NearCacheCounts(Collector):
    def __init__(self, caches: Mapping[bytes, NearCache]) -> None:
        self._caches = caches

    def collect(self) -> Iterator[Metric]:
        looked_up = CounterMetricFamily(
            "pinrank_near_cache_pins", "Pins looked up in the near caches", labels=["group", "found"]
        )
        evicted = CounterMetricFamily(
            "pinrank_near_cache_evictions", "Rows that made place for others in the near caches", labels=["group"]
        )
        held = GaugeMetricFamily("pinrank_near_cache_rows", "Rows held in the near caches", labels=["group"])
        age = GaugeMetricFamily(
            "pinrank_near_cache_age_seconds", "Mean time since the rows held were read", labels=["group"]
        )
        for cache in list(self._caches.values()):  # models come and go meanwhile
            rows, age_s = cache.held(time.monotonic())  # the event loop's clock
            held.add_metric([cache.group.ref], rows)
            age.add_metric([cache.group.ref], age_s)
            looked_up.add_metric([cache.group.ref, "yes"], cache.counts.hits)
            looked_up.add_metric([cache.group.ref, "no"], cache.counts.misses)
            evicted.add_metric([cache.group.ref], cache.counts.evictions)
        yield looked_up
        yield evicted
        yield held
        yield age


class _RedisCounts(Collector):
    def __init__(self, store: RedisStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        calls = CounterMetricFamily(
            "pinrank_redis_calls",
            "Round trips by Redis server and kind: all, those sent twice as the server was slow, those that failed, "
            "those of them that failed as the answer made no sense, those not made as the circuit was open; and "
            "connections that were replaced as they were old",
            labels=["node", "kind"],
        )
        circuit = GaugeMetricFamily("pinrank_redis_circuit_open", "1 while a server is left alone", labels=["node"])
        for name, node in sorted(self._store.nodes.items()):
            for kind, count in asdict(node.counts).items():
                calls.add_metric([name, kind], count)
            circuit.add_metric([name], node.breaker.open)
        yield calls
        yield circuit


class _LogCounts(Collector):
    def collect(self) -> Iterator[Metric]:
        withheld = CounterMetricFamily(
            "pinrank_log_lines_withheld", "Log lines left out as their event came too often", labels=["event"]
        )
        for event, lines in sorted(withheld_lines().items()):
            withheld.add_metric([event], lines)
        yield withheld


class _SafeCollector(Collector):
    """Tells nothing when a collector fails: the others' metrics are still told."""

    def __init__(self, collector: Collector, supervisor: Supervisor) -> None:
        self._collector = collector
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        try:
            yield from list(self._collector.collect())
        except Exception as error:  # noqa: BLE001 - a bug in one must not hide all the others
            self._supervisor.note("metrics", error)


class _BackgroundWork(Collector):
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        failures = CounterMetricFamily(
            "pinrank_background_failures", "Times that background work failed unexpectedly", labels=["name"]
        )
        waiting = GaugeMetricFamily(
            "pinrank_background_waiting", "1 while a background loop that failed waits to be started again",
            labels=["name"],
        )  # fmt: skip
        for one in self._supervisor.background:
            failures.add_metric([one.name], one.failures)
            waiting.add_metric([one.name], one.state == "waiting")
        yield failures
        yield waiting


class _ModelStates(Collector):
    def __init__(
        self,
        models: ServedModels,
        phases: Callable[[], Mapping[int, str]],
        shadow: Shadow,
        behind: Callable[[], Mapping[str, tuple[int, int]]],
        warm_ups: Callable[[], Mapping[int, WarmUp]],
    ) -> None:
        self._models = models
        self._phases = phases
        self._shadow = shadow
        self._behind = behind
        self._warm_ups = warm_ups

    def collect(self) -> Iterator[Metric]:
        phase = GaugeMetricFamily(
            "pinrank_model_phase", "1 for the phase that each known version is in", labels=["version", "phase"]
        )
        for version, name in self._phases().items():
            phase.add_metric([str(version), name], 1)
        yield phase
        runs = GaugeMetricFamily(
            "pinrank_model_warm_up_runs",
            "Runs of each known version's warm-up: done, and left by one that goes on, was cut off or failed",
            labels=["version", "state"],
        )
        seconds = GaugeMetricFamily(
            "pinrank_model_warm_up_seconds", "Time of each known version's warm-up", labels=["version"]
        )
        for version, warm_up in self._warm_ups().items():
            done, of = warm_up.runs, warm_up.of
            runs.add_metric([str(version), "done"], done)
            runs.add_metric([str(version), "left"], of - done)
            seconds.add_metric([str(version)], warm_up.seconds)
        yield runs
        yield seconds
        behind = GaugeMetricFamily(
            "pinrank_label_behind", "1 while a label answers with another version than the model store names",
            labels=["label"],
        )  # fmt: skip
        for label in self._behind():
            behind.add_metric([label], 1)
        yield behind
        drift = GaugeMetricFamily(
            "pinrank_model_drift_psi",
            "Distance (population stability index) of what a version is given (input) and predicts (head) lately from "
            "its training; above 0.25 something moved",
            labels=["version", "kind", "name"],
        )
        for version, served in list(self._models.by_version.items()):
            for (kind, name), psi in drifts(served).items():
                drift.add_metric([str(version), kind, name], psi)
        yield drift
        status = self._shadow.status()
        requests = CounterMetricFamily(
            "pinrank_shadow_requests", "Requests ranked by the shadow label too, by outcome", labels=["outcome"]
        )
        for outcome in ("requests", "skipped", "failed"):
            requests.add_metric(["compared" if outcome == "requests" else outcome], getattr(status, outcome))
        yield requests
        yield GaugeMetricFamily(
            "pinrank_shadow_top_10_overlap", "Mean share of the ten best that both have", status.top_10_overlap
        )
        heads = GaugeMetricFamily(
            "pinrank_shadow_psi", "Distance of the shadow's probabilities from those given", labels=["head"]
        )
        for head in status.heads:
            heads.add_metric([head.head], head.psi)
        yield heads


class Metrics:
    """The server's metrics, on a registry of their own so that tests can run many servers in one process."""

    def __init__(self, supervisor: Supervisor | None = None) -> None:
        """Make all metrics, those of what a supervisor runs too."""
        self.registry = registry = CollectorRegistry()
        self._supervisor = supervisor or Supervisor()
        registry.register(_BackgroundWork(self._supervisor))
        registry.register(_LogCounts())
        self._requests = Counter(
            "pinrank_requests", "Rank calls by surface and gRPC status code", ["surface", "code"], registry=registry
        )
        self._by_outcome: dict[tuple[str, str], Counter] = {}
        self.request_seconds = Histograms(
            "pinrank_request_seconds",
            "Time of answered Rank calls from first byte parsed to response serialised",
            "surface",
            _SECONDS,
            registry,
        )
        self.stage_seconds = Histograms(
            "pinrank_stage_seconds", "Time of answered Rank calls by stage", "stage", _SECONDS, registry
        )
        self.refusal_seconds = Histograms(
            "pinrank_refusal_seconds", "Time from first byte parsed to refusal", "surface", _SECONDS, registry
        )
        self.candidates = Histograms("pinrank_candidates", "Candidates per valid Rank call", None, _ROWS, registry)
        degraded = Counter(
            "pinrank_degraded", "Answers degraded, by what was missing or left out", ["kind"], registry=registry
        )
        self.degraded = {kind: degraded.labels(kind) for kind in DEGRADATIONS}
        actions = Counter("pinrank_actions", "Actions recorded, by what became of them", ["outcome"], registry=registry)
        self.future_actions = Counter(
            "pinrank_future_actions_dropped",
            "Stored actions that no clock shows yet, dropped when their user's sequence was written",
            registry=registry,
        )
        self.actions = {outcome.name.lower(): actions.labels(outcome.name.lower()) for outcome in ActionOutcome}
        self.run_rows = Histograms("pinrank_run_rows", "Rows per engine run", None, _ROWS, registry)
        self.run_requests = Histograms(
            "pinrank_run_requests", "Requests per engine run", None, (1, 2, 4, 8, 16, 32), registry
        )
        self.run_seconds = Histograms("pinrank_run_seconds", "Time of engine runs", None, _SECONDS, registry)
        self.run_cpu_seconds = Counter(
            "pinrank_run_cpu_seconds",
            "Processor time of engine runs, where the engine is the processor",
            registry=registry,
        )
        self.expired_rows = Counter(
            "pinrank_expired_rows", "Rows that could no longer be scored in time; never scored", registry=registry
        )
        self.cancelled_rows = Counter(
            "pinrank_cancelled_rows", "Rows whose caller hung up in the queue; never scored", registry=registry
        )
        self.late_run_rows = Counter(
            "pinrank_late_run_rows",
            "Rows whose run began after their deadline or after their caller hung up; should stay 0",
            registry=registry,
        )
        self._requests_in_flight = Gauge("pinrank_requests_in_flight", "Rank calls admitted", registry=registry)
        self._rows_in_flight = Gauge("pinrank_rows_in_flight", "Candidates of admitted Rank calls", registry=registry)
        self._bytes_in_flight = Gauge(
            "pinrank_bytes_in_flight", "Estimated memory of admitted Rank calls", registry=registry
        )
        self.model_info = Gauge(
            "pinrank_model_info",
            "1 for each served label",
            ["model", "version", "label", "digest"],
            registry=registry,
        )

        self.swaps = Counter(
            "pinrank_model_swaps",
            "Versions that began to answer for a label (done), or failed, by what was at fault: the bundle, its "
            "surroundings (features, memory, the store; tried again), or something unexpected",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("done", "failed_bundle", "failed_surroundings", "failed_unexpected"):
            self.swaps.labels(outcome)
        self.rollbacks = Counter(
            "pinrank_model_rollbacks", "Versions that a guard took off a label", ["label"], registry=registry
        )
        self.warm_ups_cut_off = Counter(
            "pinrank_model_warm_ups_cut_off",
            "Versions whose warm-up took longer than it may, so that first requests of some shapes take longer",
            registry=registry,
        )
        self.model_store_failures = Counter(
            "pinrank_model_store_failures", "Looks at the model store that failed", registry=registry
        )

    def watch_models(
        self,
        models: ServedModels,
        phases: Callable[[], Mapping[int, str]],
        shadow: Shadow,
        behind: Callable[[], Mapping[str, tuple[int, int]]],
        warm_ups: Callable[[], Mapping[int, WarmUp]],
    ) -> None:
        """Read versions' phases, warm-ups and drift, and what the shadow says, whenever metrics are collected."""
        self._register(_ModelStates(models, phases, shadow, behind, warm_ups))

    def watch(self, admission: Admission, caches: Mapping[bytes, NearCache], store: Store) -> None:
        """Read what is in flight, and the near caches' and the store's counts, whenever metrics are collected."""
        self._requests_in_flight.set_function(lambda: admission.requests)
        self._rows_in_flight.set_function(lambda: admission.rows)
        self._bytes_in_flight.set_function(lambda: admission.bytes)
        self._register(_NearCacheCounts(caches))
        if isinstance(store, RedisStore):
            self._register(_RedisCounts(store))
        if isinstance(store, EmbeddedStore):
            reopened = Gauge(
                "pinrank_feature_store_reopened",
                "How often another LMDB file lay in the store's place and was opened instead",
                registry=self.registry,
            )
            reopened.set_function(lambda: store.reopened)

    def _register(self, collector: Collector) -> None:
        self.registry.register(_SafeCollector(collector, self._supervisor))

    def count_request(self, surface: str, code: str) -> None:
        """Count one Rank call."""
        counter = self._by_outcome.get((surface, code))
        if counter is None:
            counter = self._by_outcome[surface, code] = self._requests.labels(surface, code)
        counter.inc()
