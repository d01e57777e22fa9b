"""Exports metrics about model versions: phases, warm-ups, drift, lagging labels, parties, and the shadow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.rollout.status import ServerStatus


class ModelCollector(Collector):
    def __init__(self, status: ServerStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield self._phases()
        yield self._products()
        yield from self._warm_ups()
        yield self._behind()
        yield self._drifts()
        yield from self._parties()
        yield from self._shadow()

    def _phases(self) -> Metric:
        phase = GaugeMetricFamily(
            "pinrank_model_phase", "1 for the current phase of each known version", labels=["version", "phase"]
        )
        for version, record in self._status.versions.items():
            phase.add_metric([str(version), str(record.phase)], 1)
        return phase

    def _products(self) -> Metric:
        products = GaugeMetricFamily(
            "pinrank_model_products",
            "1 for what the products of each served version's encoder multiply, and what the settings ask for",
            labels=["version", "numbers", "asked"],
        )
        for version, served in self._status.by_version.items():
            chosen = served.model.products
            products.add_metric([str(version), chosen.numbers, chosen.asked], 1)
        return products

    def _warm_ups(self) -> Iterator[Metric]:
        runs = GaugeMetricFamily(
            "pinrank_model_warm_up_runs",
            "Runs of each known version's warm-up: done, and left while it continues or after it was cut off or failed",
            labels=["version", "state"],
        )
        seconds = GaugeMetricFamily(
            "pinrank_model_warm_up_seconds", "Duration of each known version's warm-up", labels=["version"]
        )
        for version, warm_up in self._status.warm_ups().items():
            done, of = warm_up.runs, warm_up.of
            runs.add_metric([str(version), "done"], done)
            runs.add_metric([str(version), "left"], of - done)
            seconds.add_metric([str(version)], warm_up.seconds)
        yield runs
        yield seconds

    def _behind(self) -> Metric:
        behind = GaugeMetricFamily(
            "pinrank_label_behind", "1 while a label answers with another version than the model store names",
            labels=["label"],
        )  # fmt: skip
        for label in self._status.behind():
            behind.add_metric([label], 1)
        return behind

    def _drifts(self) -> Metric:
        drift = GaugeMetricFamily(
            "pinrank_model_drift_psi",
            "Distance (population stability index) between recent inputs or head predictions of a version and those of "
            "its training; above 0.25 the distribution has shifted",
            labels=["version", "kind", "name"],
        )
        for version, served in list(self._status.by_version.items()):
            for (kind, name), psi in served.drifts().items():
                drift.add_metric([str(version), kind, name], psi)
        return drift

    def _parties(self) -> Iterator[Metric]:
        utility = CounterMetricFamily(
            "pinrank_party_utility",
            "What answers were worth to each party: per answer, the sum of its utility over the returned pins, each "
            "discounted by 1 / log2(position + 2) with positions from 0. Worths above 0 are gained; the amounts of "
            "those below 0 are lost",
            labels=["party", "surface", "label", "kind"],
        )
        squares = CounterMetricFamily(
            "pinrank_party_utility_squares",
            "The squares of what answers were worth to each party",
            labels=["party", "surface", "label"],
        )
        answers = CounterMetricFamily(
            "pinrank_party_answers", "Answers that pinrank_party_utility sums", labels=["party", "surface", "label"]
        )
        for key, found in self._party_sums().items():
            utility.add_metric([*key, "gained"], found[0])
            utility.add_metric([*key, "lost"], found[1])
            squares.add_metric(key, found[2])
            answers.add_metric(key, found[3])
        yield from (utility, squares, answers)
        theta = GaugeMetricFamily(
            "pinrank_party_theta",
            "The least that answers must be worth to a party on average, as the served utility table states (at_least)",
            labels=["party", "surface", "label"],
        )
        for key, least in self._status.thetas.items():
            theta.add_metric(key, least)
        yield theta

    def _party_sums(self) -> Mapping[tuple[str, str, str], np.ndarray]:
        """Return what was gained and lost, the squares, and the answers, by party, surface and label."""
        sums: defaultdict[tuple[str, str, str], np.ndarray] = defaultdict(lambda: np.zeros(4))
        for (label, surface, parties), totals in self._status.party_totals.items():
            for place, party in enumerate(parties):
                of_party = totals.gained[place], totals.lost[place], totals.squares[place], totals.requests
                sums[party, surface, label] += of_party
        return sums

    def _shadow(self) -> Iterator[Metric]:
        found = self._status.shadow
        requests = CounterMetricFamily(
            "pinrank_shadow_requests",
            "Requests that were also offered to the shadow label, by outcome",
            labels=["outcome"],
        )
        requests.add_metric(["compared"], found.requests)
        requests.add_metric(["skipped"], found.skipped)
        requests.add_metric(["failed"], found.failed)
        yield requests
        yield GaugeMetricFamily(
            "pinrank_shadow_top_10_overlap",
            "Mean share of the top ten candidates that the shadow label and the given answer have in common",
            found.top_10_overlap,
        )
        heads = GaugeMetricFamily(
            "pinrank_shadow_psi",
            "Distance (population stability index) between the shadow's probabilities and those of the given answers",
            labels=["head"],
        )
        for head in found.heads:
            heads.add_metric([head.head], head.psi)
        yield heads
