"""/metrics: many scrapes cost one collection, compressed or not."""

from __future__ import annotations

import asyncio
import gzip
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.web.pages import MetricsPage, families_of, site
from tests.server.web.exchange import exchange, fetch


class Counting(Collector):
    """Counts its collections, and holds them while it is told to."""

    def __init__(self):
        self.collections = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def collect(self):
        self.collections += 1
        self.go_on.wait(30)
        for number in range(20):
            yield GaugeMetricFamily(f"collections_{number}", "Made by a test", self.collections)


def pages(age_s_max):
    registry, collector = CollectorRegistry(), Counting()
    registry.register(collector)
    collector.collections = 0
    return collector, site({"/metrics": MetricsPage(families_of(registry), age_s_max).answer})


def test_fifty_scrapes_at_once_get_the_same_bytes_of_one_collection(open_port):
    collector, answer = pages(age_s_max=60)
    port = open_port(answer)
    with ThreadPoolExecutor(50) as scrapers:
        found = list(scrapers.map(lambda _: fetch(port, "/metrics"), range(50)))
    assert {status for status, _, _ in found} == {200}
    assert len({body for _, body, _ in found}) == 1
    assert collector.collections == 1


def test_scrapes_during_a_collection_wait_for_it_even_if_none_may_be_kept(open_port):
    collector, answer = pages(age_s_max=0)
    port = open_port(answer)
    assert fetch(port, "/metrics")[0] == 200
    assert fetch(port, "/metrics")[0] == 200
    assert collector.collections == 2


def test_the_text_says_when_it_was_collected_and_is_what_prometheus_reads(open_port):
    _, answer = pages(age_s_max=60)
    status, body, fields = fetch(open_port(answer), "/metrics")
    assert status == 200
    assert fields["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert body.startswith(b"# collected 20")
    names = [family.name for family in text_string_to_metric_families(body.decode())]
    assert names == [f"collections_{number}" for number in range(20)]


@pytest.mark.parametrize("labels", [0, 1, 63, 64, 65, 200])
def test_a_large_metric_reads_as_the_library_renders_it_at_once(open_port, labels):
    registry = CollectorRegistry()
    counter = Counter("calls", "Made by a test", ["label"], registry=registry)
    histogram = Histogram("seconds", "Made\nby \\ a test", ["label"], registry=registry)
    for number in range(labels):
        counter.labels(f"{number}").inc(number)
        histogram.labels(f'"{number}\n').observe(number)
    body = fetch(open_port(site({"/metrics": MetricsPage(families_of(registry), 60).answer})), "/metrics")[1].decode()
    whole = text_string_to_metric_families(generate_latest(registry).decode())
    assert list(text_string_to_metric_families(body)) == [one for one in whole if not one.name.endswith("_created")]
    assert body.count("# TYPE") == 2


def test_a_client_that_takes_gzip_gets_the_same_text_in_fewer_bytes(open_port):
    _, answer = pages(age_s_max=60)
    port = open_port(answer)
    plain, packed = fetch(port, "/metrics"), fetch(port, "/metrics", **{"Accept-Encoding": "gzip"})
    assert packed[2]["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed[1]) == plain[1]
    assert len(packed[1]) < len(plain[1])


def test_a_scraper_whose_time_is_over_does_not_end_the_collection_that_others_wait_for(open_port):
    collections, go_on = [], threading.Event()

    async def families():
        collections.append(1)
        await asyncio.to_thread(go_on.wait, 30)
        yield GaugeMetricFamily("collections", "Made by a test", len(collections))

    port = open_port(site({"/metrics": MetricsPage(families, 60).answer}), request_s_max=0.5)
    assert exchange(port, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
    with ThreadPoolExecutor(1) as scraper:
        other = scraper.submit(exchange, port, b"GET /metrics HTTP/1.1\r\n\r\n")
        go_on.set()
        assert other.result().endswith(b"collections 1.0\n")


def test_other_paths_are_not_found_and_told_which_there_are(open_port):
    _, answer = pages(age_s_max=60)
    assert fetch(open_port(answer), "/")[:2] == (404, b"not found; this server has /metrics\n")
