"""Measure what Record calls of 5,000 actions cost concurrent rankings.

The benchmark compares P99 with and without them in one run. It also measures how long such a call blocks the event
loop, in CPU time, which does not depend on the load of other users of the machine.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from pydantic import SecretStr

from bench import client
from bench.awake import kept_awake
from bench.features.synthetic import fill
from bench.harness import Claim, Conclusion, Raw
from bench.processes import ServerProcess, server_process, single_process
from bench.test_bed import CONFIG, SEED, known_median, known_ratio, median, recording_all
from feature_client.groups import SequenceGroup
from feature_client.stores.open_store import open_store
from loadtest.arrivals import poisson
from loadtest.report import summarise
from loadtest.workload import Workload
from model_store.bundle.files import Bundle
from model_store.registry.store import open_model_store
from pinrank.v1 import activity_pb2, activity_pb2_grpc
from server.access.gate import Gate
from server.api.activity import ActivityEdge
from server.api.draining import Calls
from server.config import ServerConfig
from server.config_sources import load_config
from server.request.recording import Recording
from server.telemetry.metrics import Metrics
from tests.redis_servers import running

_DEADLINE_S = 1.0


@dataclass(frozen=True, slots=True)
class RecordingPlan:
    rounds: int = 2
    rank_per_s: float = 30.0
    warmup_s: float = 1.0
    step_s: float = 6.0
    actions: int = 5_000
    record_every_s: float = 1.0
    users: int = 500
    held_calls: int = 5
    stores: tuple[str, ...] = ("redis", "lmdb")


QUICK = RecordingPlan(
    rounds=1, rank_per_s=20.0, warmup_s=0.1, step_s=0.5, actions=200, record_every_s=0.1, users=50, held_calls=1,
    stores=("redis",),
)  # fmt: skip


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark with both kinds of stores. Raises BenchmarkError if a server does not start."""
    plan = QUICK if quick else RecordingPlan()
    settings = load_config(config)
    models = open_model_store(settings.model_store)
    bundle = models.read(settings.model, models.resolve(settings.model, settings.labels[0]))
    found: dict[str, list[dict[str, Any]]] = {}
    held_ms: dict[str, list[float]] = {}
    with ExitStack() as stack:
        awake = stack.enter_context(kept_awake())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-recording-")))
        redis = stack.enter_context(running(folder))
        own = folder / "pinrank.toml"
        own.write_text(recording_all(config, settings))
        urls = {"redis": redis.url, "lmdb": f"lmdb://{folder / 'features'}"}
        for name in plan.stores:
            url = urls[name]
            users, pins = asyncio.run(_fill(url, bundle, plan))
            requests = tuple(Workload(users, pins, ((128, 1.0),), seed=SEED).requests(256))
            with server_process(own, url, folder / f"{name}.log") as server, single_process(calls_max=1) as caller:
                caller.submit(client.saturate, server.address, server.pid, requests, 2, 0.0, 1.0).result()
                found[name] = []
                held_ms[name] = asyncio.run(_held_ms(url, _sequence(bundle), users, plan))
                for number in range(plan.rounds):
                    due_s = poisson(plan.rank_per_s, plan.warmup_s + plan.step_s, SEED + number)
                    without = _ranked(caller, server, requests, due_s, plan)
                    with _recording(server.address, _sequence(bundle), users, plan) as took_s:
                        beside = _ranked(caller, server, requests, due_s, plan)
                    found[name].append({"without": without, "beside": beside, "record_s": list(took_s)})
                    yield {"cores_kept_awake": awake, "rounds": found, "held_ms": held_ms}


def _ranked(
    caller: Executor, server: ServerProcess, requests: tuple[bytes, ...], due_s: np.ndarray, plan: RecordingPlan
) -> dict[str, Any]:
    samples = caller.submit(client.offer_at, server.address, requests, due_s, _DEADLINE_S).result()
    return summarise(samples.since(plan.warmup_s), plan.step_s, 1e3 * _DEADLINE_S).as_json()


async def _fill(url: str, bundle: Bundle, plan: RecordingPlan) -> tuple[np.ndarray, np.ndarray]:
    store = open_store(url)
    await store.start()
    found = await fill(store, bundle, plan.users, SEED)
    await store.close()
    return found


class _Context:
    """What a handler asks of the call that it answers."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


async def _stream(request: activity_pb2.RecordRequest) -> AsyncIterator[activity_pb2.RecordRequest]:
    yield request


async def _held_ms(url: str, group: SequenceGroup, users: np.ndarray, plan: RecordingPlan) -> list[float]:
    """Return, for each call, the CPU time of the event loop's longest turn, in milliseconds."""
    store = open_store(url)
    await store.start()
    metrics = Metrics()
    recording = Recording(store, metrics.actions.future_actions.inc)
    recording.write_into([group])
    config = ServerConfig(model_store="none", model="none", feature_store=SecretStr(url), record_actions_max=1 << 20)
    edge = ActivityEdge(metrics.actions, Calls(), recording, None, Gate(None, None, metrics.callers), config)
    longest_ms = []
    gc.freeze()  # the server does the same
    for _ in range(plan.held_calls):
        call = asyncio.create_task(edge.record_stream(_stream(_request(group, users, plan)), _Context()))  # type: ignore[arg-type]
        turns, before_s = [0.0], time.thread_time()
        while not call.done():
            await asyncio.sleep(0)
            now_s = time.thread_time()
            turns.append(now_s - before_s)
            before_s = now_s
        await call
        longest_ms.append(max(turns) * 1e3)
    await store.close()
    return longest_ms


def _request(group: SequenceGroup, users: np.ndarray, plan: RecordingPlan) -> activity_pb2.RecordRequest:
    now_ms = int(time.time() * 1e3)
    actions = [
        activity_pb2.Action(
            event_id=now_ms * plan.actions + i, user_id=int(users[i % len(users)]), pin_id=i + 1,
            action=group.actions[0], surface=group.surfaces[0], time_ms=now_ms,
        )
        for i in range(plan.actions)
    ]  # fmt: skip
    return activity_pb2.RecordRequest(actions=actions)


def _sequence(bundle: Bundle) -> SequenceGroup:
    assert bundle.manifest.sequence is not None, "the demo's models read a sequence"  # noqa: S101
    return bundle.manifest.sequence


@contextmanager
def _recording(address: str, group: SequenceGroup, users: np.ndarray, plan: RecordingPlan) -> Iterator[list[float]]:
    """Record many actions per call in a loop. Yields a list of the calls' durations, in seconds."""
    took_s: list[float] = []
    stop = threading.Event()

    def record() -> None:
        with grpc.insecure_channel(address) as channel:
            stub = activity_pb2_grpc.ActivityServiceStub(channel)
            while True:
                request = _request(group, users, plan)
                start_s = time.perf_counter()
                stub.Record(request, timeout=60)
                took_s.append(time.perf_counter() - start_s)
                if stop.wait(plan.record_every_s):
                    return

    thread = threading.Thread(target=record)
    thread.start()
    try:
        yield took_s
    finally:
        stop.set()
        thread.join()


def conclude(raw: Raw) -> Conclusion:
    summary: dict[str, float | None] = {}
    claims = []
    for store, rounds in raw["rounds"].items():
        p99: dict[str, list[float | None]] = {
            step: [r[step]["latency_ms"] and r[step]["latency_ms"]["p99"] for r in rounds]
            for step in ("without", "beside")
        }
        ratio = known_ratio(p99["beside"], p99["without"])
        claims.append(
            Claim(
                f"P99 of rankings beside Records of 5,000 actions, over without: {store}",
                ratio,
                2.0,
                "ratio",
                "at_most",
                "no ranking was answered beside Records, or without",
            )
        )
        held = median(raw["held_ms"][store])
        claims.append(Claim(f"{store}: such a Record keeps the event loop at once", held, 5.0, "ms", "at_most"))
        for step, values in p99.items():
            summary[f"{store}, rankings {step}, P99 ms"] = known_median(values)
        summary[f"{store}, Record of 5,000 actions, s"] = median([s for r in rounds for s in r["record_s"]])
    return Conclusion(summary, tuple(claims))
