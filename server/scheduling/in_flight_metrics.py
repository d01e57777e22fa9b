"""Metrics of what admission holds."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.scheduling.admission import Admission


class InFlightCollector(Collector):
    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        held = self._admission
        yield GaugeMetricFamily("pinrank_requests_in_flight", "Admitted Rank calls", held.requests)
        yield GaugeMetricFamily("pinrank_rows_in_flight", "Candidates of the admitted Rank calls", held.rows)
        yield GaugeMetricFamily("pinrank_bytes_in_flight", "Estimated memory of the admitted Rank calls", held.bytes)
