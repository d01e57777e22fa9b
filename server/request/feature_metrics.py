"""Metrics of the near caches and of the feature store behind them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import singledispatch

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from feature_client.activity.retention import Sweeper
from feature_client.near_cache import NearCache
from feature_client.stores.lmdb_store import EmbeddedStore
from feature_client.stores.redis.store import RedisStore
from feature_client.stores.store import Store


class NearCacheCollector(Collector):
    def __init__(self, caches: Mapping[bytes, NearCache]) -> None:
        self._caches = caches

    def collect(self) -> Iterator[Metric]:
        looked_up = CounterMetricFamily(
            "pinrank_near_cache_pins",
            "Pins looked up in the near cache, by whether they were found",
            labels=["group", "found"],
        )
        evicted = CounterMetricFamily(
            "pinrank_near_cache_evictions", "Rows evicted from the near cache", labels=["group"]
        )
        held = GaugeMetricFamily("pinrank_near_cache_rows", "Rows in the near cache", labels=["group"])
        age = GaugeMetricFamily(
            "pinrank_near_cache_age_seconds", "Mean age of the rows in the near cache", labels=["group"]
        )
        for cache in list(self._caches.values()):  # models may be loaded or dropped meanwhile
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


class SweepCollector(Collector):
    """Exports how far the sweep of recorded sequences has come."""

    def __init__(self, sweeper: Sweeper) -> None:
        self._sweeper = sweeper

    def collect(self) -> Iterator[Metric]:
        swept = CounterMetricFamily(
            "pinrank_swept_sequences",
            "Recorded sequences that the retention looked at, and those that it deleted, in a store that does not "
            "expire values; one process sweeps a store",
            labels=["outcome"],
        )
        swept.add_metric(["kept"], self._sweeper.read - self._sweeper.deleted)
        swept.add_metric(["deleted"], self._sweeper.deleted)
        yield swept


class RedisCollector(Collector):
    def __init__(self, store: RedisStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        calls = CounterMetricFamily(
            "pinrank_redis_calls",
            "Round trips by Redis server and kind: all reads, those sent a second time because the server "
            "was slow (hedged), failures, failures with an invalid reply (malformed), those not made because "
            "the circuit was open (spared); and connections replaced because of their age (renewed)",
            labels=["node", "kind"],
        )
        circuit = GaugeMetricFamily(
            "pinrank_redis_circuit_open",
            "1 while the circuit breaker keeps requests from a Redis server",
            labels=["node"],
        )
        for name, node in sorted(self._store.nodes.items()):
            for kind, count in asdict(node.counts).items():
                calls.add_metric([name, kind], count)
            circuit.add_metric([name], node.breaker.open)
        yield calls
        yield circuit


class EmbeddedStoreCollector(Collector):
    def __init__(self, store: EmbeddedStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "pinrank_feature_store_reopened",
            "Times that another LMDB file was found in the store's place and opened",
            self._store.reopened,
        )


@singledispatch
def store_collectors(store: Store) -> tuple[Collector, ...]:  # noqa: ARG001 - the kinds registered below use it
    """Return the collectors of a store's own metrics; register new kinds of stores below."""
    return ()


@store_collectors.register
def _(store: RedisStore) -> tuple[Collector, ...]:
    return (RedisCollector(store),)


@store_collectors.register
def _(store: EmbeddedStore) -> tuple[Collector, ...]:
    return (EmbeddedStoreCollector(store),)
