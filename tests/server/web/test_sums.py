"""The page of several processes: what is summed, what is labelled, and that sums never fall."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.web.sums import Sums


class Shown:
    """What one process shows."""

    def __init__(self, requests, in_flight, seconds, surface="home"):
        self.registry = CollectorRegistry()
        Counter("requests", "Calls", ["surface"], registry=self.registry).labels(surface).inc(requests)
        Gauge("in_flight", "Calls now", registry=self.registry).set(in_flight)
        histogram = Histogram("seconds", "Time", buckets=(1, 2), registry=self.registry)
        for value in seconds:
            histogram.observe(value)

    @property
    def families(self):
        return list(text_string_to_metric_families(generate_latest(self.registry).decode()))


def values(page):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in page
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_counters_and_histograms_are_summed_and_gauges_keep_their_process():
    one, two = Shown(3, 1, [0.5, 1.5]), Shown(4, 2, [9.0])
    page = Sums().page({(0, 0): one.families, (1, 0): two.families}, [(0, 0), (1, 0)])
    assert values(page) == {
        ("requests_total", "home"): 7,
        ("seconds_bucket", "1.0"): 1, ("seconds_bucket", "2.0"): 2, ("seconds_bucket", "+Inf"): 3,
        ("seconds_count",): 3, ("seconds_sum",): 11,
        ("in_flight", "0"): 1, ("in_flight", "1"): 2,
    }  # fmt: skip


def test_labels_that_only_one_process_has_stay_apart():
    page = Sums().page(
        {(0, 0): Shown(1, 0, []).families, (1, 0): Shown(2, 0, [], "related").families}, [(0, 0), (1, 0)]
    )
    found = values(page)
    assert (found["requests_total", "home"], found["requests_total", "related"]) == (1, 2)


def test_sums_never_fall_when_a_process_is_silent_or_dies_and_starts_again():
    sums = Sums()
    old, other = Shown(5, 1, [0.5]), Shown(10, 2, [0.5])
    assert (
        values(sums.page({(0, 0): old.families, (1, 0): other.families}, [(0, 0), (1, 0)]))["requests_total", "home"]
        == 15
    )
    silent = values(sums.page({(1, 0): other.families}, [(0, 0), (1, 0)]))
    assert silent["requests_total", "home"] == 15
    assert ("in_flight", "0") not in silent
    # Number 0 has died and starts again; its successor has not shown anything yet.
    assert values(sums.page({(1, 0): other.families}, [(0, 1), (1, 0)]))["requests_total", "home"] == 15
    young = Shown(1, 7, [])
    both = {(0, 1): young.families, (1, 0): other.families}
    for _ in range(2):  # the ended one counts once
        found = values(sums.page(both, [(0, 1), (1, 0)]))
        assert (found["requests_total", "home"], found["seconds_count",], found["in_flight", "0"]) == (16, 2, 7)


def test_what_a_process_showed_in_its_last_moment_counts_without_its_gauges():
    sums = Sums()
    found = values(sums.page({(0, 0): Shown(5, 1, []).families}, [(0, 1)]))
    assert found["requests_total", "home"] == 5
    assert ("in_flight", "0") not in found
    assert values(sums.page({}, [(0, 1)]))["requests_total", "home"] == 5


def test_the_page_reads_back_as_it_was_summed():
    class Page:
        def collect(self):
            return Sums().page({(0, 0): Shown(3, 1, [0.5]).families}, [(0, 0)])

    read = text_string_to_metric_families(generate_latest(Page()).decode())
    assert values(read) == values(Page().collect())
