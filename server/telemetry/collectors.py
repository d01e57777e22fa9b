"""Collectors of the metrics of log lines and background work; other packages define collectors of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.runtime.supervisor import Supervisor
from server.telemetry.logs import withheld_lines


class CallCounter(Collector):
    """A counter of calls that one thread counts. An addition costs 0.1 us; prometheus_client's counter takes a lock.

    Attributes:
        counts: by the values of the labels.
    """

    def __init__(self, name: str, documentation: str, labels: tuple[str, ...], registry: CollectorRegistry) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self.counts = Counter[tuple[str, ...]]()
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, count in sorted(dict(self.counts).items()):
            family.add_metric(values, count)
        yield family


class LogLineCollector(Collector):
    def collect(self) -> Iterator[Metric]:
        withheld = CounterMetricFamily(
            "pinrank_log_lines_withheld", "Log lines withheld because their event was too frequent", labels=["event"]
        )
        for event, lines in sorted(withheld_lines().items()):
            withheld.add_metric([event], lines)
        yield withheld


class BackgroundCollector(Collector):
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        failures = CounterMetricFamily(
            "pinrank_background_failures", "Unexpected failures of background work; should stay 0", labels=["name"]
        )
        waiting = GaugeMetricFamily(
            "pinrank_background_waiting", "1 while a failed background loop waits for its restart",
            labels=["name"],
        )  # fmt: skip
        for one in self._supervisor.background:
            failures.add_metric([one.name], one.failures)
            waiting.add_metric([one.name], one.state == "waiting")
        yield failures
        yield waiting


class SafeCollector(Collector):
    """Wraps a collector; if it fails, its metrics are missing, but all other metrics are still exported."""

    def __init__(self, collector: Collector, supervisor: Supervisor) -> None:
        self._collector = collector
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        try:
            yield from list(self._collector.collect())
        except Exception as error:  # noqa: BLE001 - a bug in one collector must not hide all other metrics
            self._supervisor.note("metrics", error)
