"""The reference for serving: the same engine on the same requests in a tight loop, in a process of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from feature_client.fetcher import fetch
from feature_client.opening import open_store
from kernels.engine import Engine, FeatureBatch
from kernels.opening import engine_factory
from model_store.live import LiveModel, load_live
from model_store.store import FolderStore
from pinrank.v1 import ranking_pb2


@dataclass(frozen=True, slots=True)
class Subject:
    """What to load, and the serialised requests to run."""

    model_store: Path
    model: str
    label: str
    engine: str
    streams: int
    feature_store: str
    requests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Throughput:
    """Runs of all streams together; `cpu_s` is what the whole process used."""

    runs: int
    wall_s: float
    cpu_s: float


def throughput(subject: Subject, duration_s: float) -> Throughput:
    """Run from as many threads as the engine has streams, each in a loop without anything else."""
    engine, batches = _loaded(subject)
    counts = [0] * subject.streams
    start = threading.Barrier(subject.streams + 1)

    def loop(stream: int) -> None:
        start.wait()
        end_s = time.perf_counter() + duration_s
        done = stream
        while time.perf_counter() < end_s:
            engine.run(batches[done % len(batches)])
            done += 1
        counts[stream] = done - stream

    threads = [threading.Thread(target=loop, args=(stream,)) for stream in range(subject.streams)]
    for thread in threads:
        thread.start()
    start.wait()
    start_s, cpu_s = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.join()
    return Throughput(sum(counts), time.perf_counter() - start_s, time.process_time() - cpu_s)


def run_seconds(subject: Subject, duration_s: float) -> np.ndarray:
    """Return float64[K], the time of each run with no other beside it."""
    engine, batches = _loaded(subject)
    seconds: list[float] = []
    end_s = time.perf_counter() + duration_s
    while (start_s := time.perf_counter()) < end_s:
        engine.run(batches[len(seconds) % len(batches)])
        seconds.append(time.perf_counter() - start_s)
    return np.array(seconds)


@cache
def _loaded(subject: Subject) -> tuple[Engine, list[FeatureBatch]]:
    """Load once per process; the pool keeps its one process from call to call."""
    store = FolderStore(subject.model_store)
    bundle = store.read(subject.model, store.resolve(subject.model, subject.label))
    live = load_live(bundle, engine_factory(subject.engine), subject.streams)
    return live.engine, asyncio.run(_assembled(live, subject))


async def _assembled(live: LiveModel, subject: Subject) -> list[FeatureBatch]:
    store = open_store(subject.feature_store, read_only=True)
    await store.start()
    batches = []
    for content in subject.requests:
        request = ranking_pb2.RankRequest.FromString(content)
        fetched = await fetch(store, live.needs, request.user_id, np.array(request.pin_ids, np.uint64))
        batches.append(live.assembler.assemble(fetched, request.surface))
    await store.close()
    return batches
