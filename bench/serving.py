"""The demo server against the same engine alone in a tight loop, on the same cores and the same requests.

Each round measures, one after the other: the engine alone (all streams, then one), the server saturated by a closed
loop, the server under an open loop at half of that rate. Rounds are interleaved so that a machine that slows down slows
everything down; the claims are about medians over rounds.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import client, engine_alone
from bench.features import fill
from bench.harness import ROOT, BenchmarkError, Claim, Measured
from bench.processes import server_process, single_process
from feature_client.opening import open_store
from loadtest.open_loop import OK
from loadtest.report import Summary
from loadtest.workload import Workload
from model_store.store import FolderStore
from server.config import ServerConfig, load_config

CONFIG = ROOT / "deploy" / "demo" / "pinrank.toml"
SEED = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured; seconds are per round."""

    rounds: int = 5
    engine_s: float = 3.0
    single_stream_s: float = 1.5
    warmup_s: float = 0.75
    saturated_s: float = 4.0
    open_loop_s: float = 5.0
    callers: int = 8
    users: int = 500
    candidates: int = 128
    requests: int = 256


QUICK = Plan(
    rounds=1, engine_s=0.2, single_stream_s=0.1, warmup_s=0.1, saturated_s=0.3, open_loop_s=0.5, users=20, requests=16
)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Measured:
    """Measure the server of a configuration file.

    Raises:
        BenchmarkError: the server did not start, or an answer was refused or degraded.
    """
    plan = QUICK if quick else Plan()
    settings = _settings(config)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-bench-")))
        feature_store = f"lmdb://{folder / 'features'}"
        requests = asyncio.run(_prepare(settings, feature_store, plan))
        subject = engine_alone.Subject(
            settings.model_store, settings.model, settings.labels[0], settings.engine,
            settings.engine_streams or os.cpu_count() or 1, feature_store, requests,
        )  # fmt: skip
        server = stack.enter_context(server_process(config, feature_store, folder / "server.log"))
        processes = (stack.enter_context(single_process()), stack.enter_context(single_process(calls_max=1)))
        _warm_up(processes, subject, server)
        rounds = [_round(plan, number, subject, server, processes) for number in range(plan.rounds)]
    return _conclude(plan, subject.streams, rounds)


def _settings(config: Path) -> ServerConfig:
    outside = sorted(name for name in os.environ if name.startswith("PINRANK_"))
    if outside:
        raise BenchmarkError(f"{outside[0]} is set; a benchmark takes no settings from the environment")
    return load_config(config)


async def _prepare(settings: ServerConfig, feature_store: str, plan: Plan) -> tuple[bytes, ...]:
    """Fill the feature store, and make requests about what is in it."""
    models = FolderStore(settings.model_store)
    bundle = models.read(settings.model, models.resolve(settings.model, settings.labels[0]))
    store = open_store(feature_store)
    await store.start()
    user_ids, pin_ids = await fill(store, bundle, plan.users, SEED)
    await store.close()
    surface = next(surface.name for surface in bundle.manifest.surfaces if not surface.query)
    workload = Workload(user_ids, pin_ids, ((plan.candidates, 1.0),), surface=surface, seed=SEED)
    return tuple(workload.requests(plan.requests))


def _warm_up(processes: tuple[Executor, Executor], subject: engine_alone.Subject, server: tuple[str, int]) -> None:
    engine_process, client_process = processes
    engine_process.submit(engine_alone.throughput, subject, 0.2).result()
    client_process.submit(client.saturate, *server, subject.requests, 2, 0.0, 0.5).result()


def _round(
    plan: Plan,
    number: int,
    subject: engine_alone.Subject,
    server: tuple[str, int],
    processes: tuple[Executor, Executor],
) -> dict[str, Any]:
    engine_process, client_process = processes
    alone = engine_process.submit(engine_alone.throughput, subject, plan.engine_s).result()
    run_ms = engine_process.submit(engine_alone.run_seconds, subject, plan.single_stream_s).result() * 1e3
    saturated = client_process.submit(
        client.saturate, *server, subject.requests, plan.callers, plan.warmup_s, plan.saturated_s
    ).result()
    _check("saturated", saturated.summary)
    answered = saturated.summary.statuses[OK]
    rate_per_s = saturated.summary.achieved_per_s / 2
    offered = client_process.submit(
        client.offer, server[0], subject.requests, rate_per_s, plan.warmup_s, plan.open_loop_s, SEED + number
    ).result()
    _check("half load", offered)
    return {
        "engine_alone": {
            "runs_per_s": alone.runs / alone.wall_s,
            "cpu_ms_per_run": alone.cpu_s / alone.runs * 1e3,
            "single_stream_run_ms": dict(zip(("p50", "p99"), np.percentile(run_ms, (50, 99)).tolist(), strict=True)),
        },
        "saturated": {
            **saturated.summary.as_json(),
            "callers": plan.callers,
            "server_cpu_ms_per_request": saturated.server_cpu_s / answered * 1e3,
            "client_cpu_ms_per_request": saturated.summary.generator_cores * plan.saturated_s / answered * 1e3,
        },
        "half_load": {**offered.as_json(), "rate_per_s": rate_per_s},
    }


def _check(what: str, summary: Summary) -> None:
    """Every answer must be a full one, or the server was measured doing less than the engine alone."""
    if set(summary.statuses) != {OK} or summary.degraded:
        raise BenchmarkError(f"{what}: {summary.statuses}, {summary.degraded} degraded; expected full answers only")


def _conclude(plan: Plan, streams: int, rounds: list[dict[str, Any]]) -> Measured:
    cores = len(os.sched_getaffinity(0))

    def median(*path: str) -> float:
        values: list[Any] = rounds
        for key in path:
            values = [value[key] for value in values]
        return float(np.median(values))

    alone = np.array([r["engine_alone"]["runs_per_s"] for r in rounds])
    served = np.array([r["saturated"]["achieved_per_s"] for r in rounds])
    left_by_generator = 1 - np.array([r["saturated"]["generator_cores"] for r in rounds]) / cores
    own_cpu_ms = [r["saturated"]["server_cpu_ms_per_request"] - r["engine_alone"]["cpu_ms_per_run"] for r in rounds]
    p99_ms = median("half_load", "latency_ms", "p99")
    claims = (
        Claim("saturated requests/s over engine alone", float(np.median(served / alone)), 0.9, "ratio", "at_least"),
        Claim(
            "the same, the load generator's CPU taken off the engine's cores",
            float(np.median(served / (alone * left_by_generator))), 0.9, "ratio", "at_least",
        ),
        Claim("P99 from due to answered, at half of the saturated rate", p99_ms, 10.0, "ms", "at_most"),
        Claim("server CPU per request beyond the engine's", float(np.median(own_cpu_ms)), 0.45, "core-ms", "at_most"),
    )  # fmt: skip
    summary = {
        "engine alone, runs/s": median("engine_alone", "runs_per_s"),
        "engine alone, one stream, P50 ms": median("engine_alone", "single_stream_run_ms", "p50"),
        "engine alone, one stream, P99 ms": median("engine_alone", "single_stream_run_ms", "p99"),
        "engine alone, core-ms per run": median("engine_alone", "cpu_ms_per_run"),
        "saturated, requests/s": median("saturated", "achieved_per_s"),
        "saturated, P50 ms": median("saturated", "latency_ms", "p50"),
        "saturated, server core-ms per request": median("saturated", "server_cpu_ms_per_request"),
        "saturated, client core-ms per request": median("saturated", "client_cpu_ms_per_request"),
        "half load, requests/s": median("half_load", "rate_per_s"),
        "half load, P50 ms": median("half_load", "latency_ms", "p50"),
        "half load, P99 ms": p99_ms,
        "half load, sent late by, P99 ms": median("half_load", "late_ms", "p99"),
    } | {
        f"half load, median {stage} ms": median("half_load", "stage_ms", stage)
        for stage in rounds[0]["half_load"]["stage_ms"]
    }
    setup = {"candidates": plan.candidates, "streams": streams, "cores": cores, "users": plan.users, "seed": SEED}
    return Measured(summary, claims, {"setup": setup, "rounds": rounds})
