"""The test bed of the serving benchmarks: a feature store, requests, a server, and processes that measure."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import client
from bench.awake import kept_awake
from bench.engines import engine_alone
from bench.engines.engine_alone import EngineSubject
from bench.features.synthetic import fill
from bench.harness import ROOT, BenchmarkError, Claim
from bench.processes import ServerProcess, cpu_seconds, server_process, single_process
from feature_client.stores.open_store import open_store
from kernels.cores import cores
from kernels.engines import default_streams
from loadtest.open_loop import OK
from loadtest.report import Summary
from loadtest.workload import Workload
from model_store.registry.store import open_model_store
from server.config import ServerConfig
from server.config_sources import load_config
from server.environment import PREFIX, service_links

CONFIG = ROOT / "deploy" / "demo" / "pinrank.toml"
SEED = 0
_USERS = 500
#: Share of its cores that the engine alone must get.
_QUIET_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class TestBed:
    """A running server and the tools to measure it.

    Attributes:
        settings: settings of the server.
        subject: its engine and the requests, for a separate process.
        server: the server process.
        client: a pool of one process, a new one for every call: grpc.aio does not work with a second event loop.
        engine: a pool of one process, which keeps loaded models.
        user_ids, pin_ids: uint64, the ids in the feature store.
        awake: whether idle cores are kept awake.
    """

    settings: ServerConfig
    subject: EngineSubject
    server: ServerProcess
    client: Executor
    engine: Executor
    user_ids: np.ndarray
    pin_ids: np.ndarray
    awake: bool


@contextmanager
def scene(
    config: Path = CONFIG,
    extra: str = "",
    candidates: int = 128,
    requests: int = 256,
    pins: int | None = None,
    metrics_age_s_max: float = 0.0,
) -> Iterator[TestBed]:
    """Fill a feature store and start a server; remove both at the end.

    Args:
        config: TOML file with the server's settings.
        extra: additional settings as TOML.
        candidates: number of pins in a request.
        requests: number of different requests.
        pins: number of pins in the feature store; None means the pins of the model.
        metrics_age_s_max: the server's setting; by default, metrics are of the moment in which they are read.

    Raises:
        BenchmarkError: the server did not start, or the environment overrides its settings.
    """
    check_environment()
    with ExitStack() as stack:
        awake = stack.enter_context(kept_awake())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-bench-")))
        # Paths in the original are relative to its folder, so they are made absolute here.
        settings = load_config(config)
        own = folder / "pinrank.toml"
        own.write_text(without_surfaces(config) + f'\nmodel_store = "{Path(settings.model_store).absolute()}"\n{extra}')
        feature_store = f"lmdb://{folder / 'features'}"
        user_ids, pin_ids = asyncio.run(fill_store(settings, feature_store, pins))
        made = tuple(Workload(user_ids, pin_ids, ((candidates, 1.0),), seed=SEED).requests(requests))
        streams = settings.engine_streams or default_streams(settings.engine, cores())
        subject = EngineSubject(
            Path(settings.model_store),
            settings.model,
            settings.labels[0],
            settings.engine,
            streams,
            feature_store,
            made,
        )
        server = stack.enter_context(
            server_process(own, feature_store, folder / "server.log", metrics_age_s_max=metrics_age_s_max)
        )
        client = stack.enter_context(single_process(calls_max=1))
        engine = stack.enter_context(single_process())
        yield TestBed(settings, subject, server, client, engine, user_ids, pin_ids, awake)


def check_environment() -> None:
    """Raise BenchmarkError if the environment overrides a server's settings."""
    outside = sorted(name for name in os.environ.keys() - service_links(os.environ) if name.startswith(PREFIX))
    if outside:
        raise BenchmarkError(f"{outside[0]} is set, but benchmarks must not depend on the environment; unset it")


def without_surfaces(config: Path) -> str:
    """Return the settings before the first TOML table, without `model_store`, whose path is relative."""
    top = config.read_text().partition("\n[")[0]
    return "\n".join(line for line in top.splitlines() if not line.startswith("model_store"))


def recording_all(config: Path, settings: ServerConfig) -> str:
    """Return settings as `without_surfaces` does, of a server that records whatever is sent, as fast as it can."""
    text = without_surfaces(config) + f'\nmodel_store = "{Path(settings.model_store).absolute()}"\n'
    text = text if settings.record_actions else f"{text}record_actions = true\n"
    return f"{text}record_retention_days = 0\nrecord_new_users_per_s = 0\nrecord_user_actions_per_s = 0\n"


async def fill_store(settings: ServerConfig, feature_store: str, pins: int | None) -> tuple[np.ndarray, np.ndarray]:
    models = open_model_store(settings.model_store)
    bundle = models.read(settings.model, models.resolve(settings.model, settings.labels[0]))
    store = open_store(feature_store)
    await store.start()
    found = await fill(store, bundle, _USERS, SEED, pins)
    await store.close()
    return found


def one_run_p50_ms(stage: TestBed, duration_s: float) -> float:
    """Return the P50 of one request's run with nothing beside it, in milliseconds."""
    stage.engine.submit(engine_alone.throughput, stage.subject, 0.2).result()
    found: np.ndarray = stage.engine.submit(engine_alone.run_seconds, stage.subject, duration_s).result()
    return median(found.tolist()) * 1e3


def saturated(
    stage: TestBed, requests: tuple[bytes, ...], callers: int, warmup_s: float, duration_s: float
) -> dict[str, Any]:
    """Measure the server's throughput and CPU time with callers that do not pause.

    Raises:
        BenchmarkError: it refused or degraded an answer.
    """
    server = stage.server
    before_s = server.metric("pinrank_run_cpu_seconds_total"), cpu_seconds(server.pid)
    done = stage.client.submit(client.saturate, *server[:2], requests, callers, warmup_s, duration_s).result()
    run_s = server.metric("pinrank_run_cpu_seconds_total") - before_s[0]
    all_s = cpu_seconds(server.pid) - before_s[1]
    check_all_ok("saturated", done.summary)
    answered = done.summary.statuses[OK]
    per_request_ms = done.server_cpu_s / answered * 1e3
    return {
        **done.summary.as_json(),
        "callers": callers,
        "server_cpu_ms_per_request": per_request_ms,
        # For the whole call, because the two counters cannot be read at the ends of the window.
        "own_cpu_ms_per_request": per_request_ms * (1 - run_s / all_s) if all_s else None,
        "client_cpu_ms_per_request": done.summary.generator_cores * duration_s / answered * 1e3,
        "late_run_rows": server.metric("pinrank_late_run_rows_total"),
    }


def saturated_per_s(stage: TestBed, requests: tuple[bytes, ...], duration_s: float) -> float:
    """Return how many such requests the server answers in a second when it always has some."""
    window = stage.client.submit(
        client.saturate, *stage.server[:2], requests, 4 * stage.subject.streams, duration_s / 4, duration_s
    ).result()
    return float(window.summary.achieved_per_s)


def check_all_ok(what: str, summary: Summary) -> None:
    """Raise BenchmarkError unless every answer is complete: a partial answer is less work than the engine's."""
    if set(summary.statuses) != {OK} or summary.degraded:
        raise BenchmarkError(f"{what}: {summary.statuses}, {summary.degraded} degraded; expected full answers only")


def median(values: list[float]) -> float:
    return float(np.median(values))


def known_median(values: list[float | None]) -> float | None:
    """Return the median of the values that are there, None without any."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def known_ratio(over: list[float | None], under: list[float | None]) -> float | None:
    """Return the median of the ratios of the rounds that have both values, None without any."""
    return known_median([a / b if a is not None and b else None for a, b in zip(over, under, strict=True)])


def cores_got(stage: TestBed, duration_s: float) -> float:
    """Return the number of cores that the engine alone gets in a tight loop: one a stream on a quiet machine."""
    run = stage.engine.submit(engine_alone.throughput, stage.subject, duration_s).result()
    return float(run.cpu_s / run.wall_s)


def on_a_quiet_machine(claims: tuple[Claim, ...], got: float | None, meant: int) -> tuple[Claim, ...]:
    """Return the claims, unjudged where something else ran, so that the engine alone got fewer cores than meant."""
    if got is None or got >= _QUIET_SHARE * meant:
        return claims
    why = f"the machine was not quiet: the engine alone got {got:.2g} of {meant} cores"
    return tuple(replace(claim, measured=None, unjudged=why) for claim in claims)
