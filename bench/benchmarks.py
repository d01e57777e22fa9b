"""The benchmarks, each with the code that it measures."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A module `bench.ROOM.NAME` with two functions.

    `measure(*, quick: bool) -> Iterator[Raw]` yields everything measured so far after each long part;
    `conclude(raw: Raw) -> Conclusion` computes summary and claims from that and nothing else.
    """

    name: str
    room: str
    #: The paths that it measures. After a change in one of them, its result is old.
    parts: tuple[str, ...]
    #: Runs only when it is named.
    on_request: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """Its parts and its own script."""
        return (*self.parts, f"bench/{self.room}/{self.name}.py")

    def module(self) -> ModuleType:
        return import_module(f"bench.{self.room}.{self.name}")


_SERVER = ("server", "kernels", "feature_client", "model_store", "proto")

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("capacity", "serving", _SERVER),
        # It compares packages that are installed beside pinrank.
        Benchmark("edges", "edges", ("bench/edges/edge_server.py",), on_request=True),
        # It takes ten minutes.
        Benchmark("rolling_restart", "edges", (*_SERVER, "deploy/envoy"), on_request=True),
        Benchmark("tls", "edges", _SERVER),
        Benchmark("exploration", "serving", ("model_store/exploration", "model_store/model")),
        Benchmark("faults", "serving", _SERVER),
        Benchmark("impression_kills", "impressions", (*_SERVER, "impressions"), on_request=True),
        Benchmark("impression_log", "impressions", (*_SERVER, "impressions")),
        Benchmark("isolation", "serving", _SERVER),
        Benchmark("load_tools", "serving", (*_SERVER, "loadtest")),
        Benchmark("overload", "serving", _SERVER),
        Benchmark("recording", "serving", _SERVER),
        Benchmark("scrapes", "attacks", _SERVER),
        Benchmark("serving", "serving", _SERVER),
        Benchmark("swap_kills", "serving", _SERVER),
        Benchmark("swaps", "serving", _SERVER),
        Benchmark("swaps_broken", "serving", _SERVER),
        Benchmark("actions", "features", _SERVER),
        Benchmark("bulk_load", "features", ("feature_client",)),
        Benchmark("feature_reads", "features", _SERVER),
        Benchmark("walks", "embeddings", ("ranker/embedding/graph",)),
        Benchmark("interests", "embeddings", ("ranker/data/users/interests.py",)),
        # They train for half an hour or more.
        Benchmark("user_lift", "embeddings", ("ranker",), on_request=True),
        Benchmark("vectors_lift", "embeddings", ("ranker",), on_request=True),
        # They need data that must be converted first, or may not be passed on.
        Benchmark("user_ages", "embeddings", ("ranker/embedding",), on_request=True),
        Benchmark("user_vectors", "embeddings", ("ranker/embedding",), on_request=True),
        Benchmark("pin_networks", "embeddings", ("ranker/embedding",), on_request=True),
        Benchmark("pin_tasks", "embeddings", ("ranker/embedding",), on_request=True),
        Benchmark("near_cache", "features", ("feature_client/near_cache.py", "kernels/native")),
        Benchmark("join", "impressions", ("impressions",)),
        Benchmark("simulator", "counterfactual", ("ranker/counterfactual", "ranker/evaluation/bootstrap.py")),
        Benchmark("open_bandit", "counterfactual", ("ranker/counterfactual", "ranker/evaluation/bootstrap.py")),
        # It needs data that may not be passed on.
        Benchmark(
            "coat", "counterfactual", ("ranker/counterfactual", "ranker/evaluation/bootstrap.py"), on_request=True
        ),
        Benchmark("writer", "impressions", ("impressions",)),
        Benchmark("encoder", "engines", ("kernels", "ranker/export", "ranker/network")),
        Benchmark("fusion_latency", "engines", (*_SERVER, "ranker/export", "ranker/network")),
        Benchmark("gpu_compiled", "engines", ("kernels/gpu",)),
        # It needs NVIDIA's compiler.
        Benchmark("gpu_design", "engines", ("bench/engines/gpu_design.cu",), on_request=True),
        Benchmark("half", "engines", ("kernels", "model_store/model", "ranker")),
        # It trains for an hour, on data of its own.
        Benchmark("lift", "engines", (*_SERVER, "ranker"), on_request=True),
        # It trains three rankers on each of the data of `lift`.
        Benchmark(
            "published_rankers",
            "rankers",
            (
                *("bench/rankers/dcn_v2.py", "bench/rankers/din.py", "bench/rankers/sasrec.py"),
                *("bench/rankers/inputs.py", "bench/rankers/rows.py", "bench/rankers/fitting.py", "ranker"),
            ),
            on_request=True,
        ),
        # It trains for half an hour, on data of `lift`.
        Benchmark("size_curve", "rankers", ("ranker",), on_request=True),
        Benchmark("tuning", "tuning", ("model_store/model", "ranker/tuning")),
        Benchmark("callers", "attacks", _SERVER),
        Benchmark("resets", "attacks", _SERVER),
        Benchmark("idle_connections", "attacks", _SERVER),
        Benchmark("greedy", "attacks", _SERVER),
        Benchmark("retries", "attacks", _SERVER),
        # A quarter of an hour.
        Benchmark("stops", "attacks", _SERVER, on_request=True),
        # A million requests.
        Benchmark("fuzz_ports", "attacks", _SERVER, on_request=True),
        # Two hours.
        Benchmark("soak", "attacks", (*_SERVER, "impressions"), on_request=True),
        Benchmark("fuzz_atomic", "fuzz", ("ranker/data",)),
        Benchmark("fuzz_parquet", "fuzz", ("feature_client",)),
        Benchmark("fuzz_stream", "fuzz", ("feature_client",)),
    )
}
