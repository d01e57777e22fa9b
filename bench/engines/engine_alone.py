"""The baseline of the serving benchmarks: the same engine and requests in a tight loop, in a separate process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from bench.serving.ideal_queue import REST_S, RunTimes
from feature_client.fetch import fetch
from feature_client.stores.open_store import open_store
from kernels.engine import Engine, FeatureBatch
from kernels.engines import engine_factory
from model_store.model.loaded import LoadedModel, load_model
from model_store.registry.store import open_model_store
from pinrank.v1 import ranking_pb2


@dataclass(frozen=True, slots=True)
class EngineSubject:
    """The model to load, and the serialised requests to run."""

    model_store: Path
    model: str
    label: str
    engine: str
    streams: int
    feature_store: str
    requests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Throughput:
    """Number of runs of all streams; `cpu_s` is the CPU time of the whole process, in seconds."""

    runs: int
    wall_s: float
    cpu_s: float


def throughput(subject: EngineSubject, duration_s: float) -> Throughput:
    """Run the requests in a tight loop, on as many threads as the engine has streams."""
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


def run_seconds(subject: EngineSubject, duration_s: float) -> np.ndarray:
    """Return the time of each run without concurrent runs, float64[K], in seconds."""
    engine, batches = _loaded(subject)
    seconds: list[float] = []
    end_s = time.perf_counter() + duration_s
    while (start_s := time.perf_counter()) < end_s:
        engine.run(batches[len(seconds) % len(batches)])
        seconds.append(time.perf_counter() - start_s)
    return np.array(seconds)


def run_times(subject: EngineSubject, duration_s: float) -> RunTimes:
    """Measure whole requests and two concurrent halves, each with and without a pause before it.

    Each of the five measurements takes a fifth of the time. Engines must have two streams, as in the ideal queue.
    """
    engine, batches = _loaded(subject)
    part_s = duration_s / 5
    alone = run_seconds(subject, part_s)
    rested = [_timed(engine, batches[i % len(batches)], REST_S) for i in range(_runs(part_s, alone, REST_S))]
    beside: list[list[float]] = [[], []]
    end_s = time.perf_counter() + part_s

    def whole(stream: int) -> None:
        while time.perf_counter() < end_s:
            beside[stream].append(_timed(engine, batches[(2 * len(beside[stream]) + stream) % len(batches)]))

    _on_two_threads(whole)
    return RunTimes(
        alone, np.array(beside[0] + beside[1]), _halves(engine, batches, _runs(part_s, alone, 0), 0),
        np.array(rested), _halves(engine, batches, _runs(part_s, alone, REST_S), REST_S),
    )  # fmt: skip


def _halves(engine: Engine, batches: list[FeatureBatch], runs: int, pause_s: float) -> np.ndarray:
    """Return the time of the longer of two halves that start together after a pause, float64[runs]."""
    seconds: list[list[float]] = [[], []]
    together = threading.Barrier(2)

    def half(stream: int) -> None:
        for i in range(runs):
            batch = batches[i % len(batches)]
            middle = batch.rows // 2
            piece = batch.piece(0, middle) if stream == 0 else batch.piece(middle, batch.rows)
            time.sleep(pause_s)
            together.wait()
            seconds[stream].append(_timed(engine, piece))

    _on_two_threads(half)
    longer: np.ndarray = np.maximum(np.array(seconds[0]), np.array(seconds[1]))
    return longer


def _runs(duration_s: float, alone_s: np.ndarray, pause_s: float) -> int:
    return max(2, int(duration_s / (float(np.median(alone_s)) + pause_s)))


def _timed(engine: Engine, batch: FeatureBatch, pause_s: float = 0) -> float:
    if pause_s:
        time.sleep(pause_s)
    start_s = time.perf_counter()
    engine.run(batch)
    return time.perf_counter() - start_s


def _on_two_threads(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(stream,)) for stream in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def load_subject(subject: EngineSubject) -> LoadedModel:
    """Load and verify the subject's bundle."""
    store = open_model_store(subject.model_store)
    bundle = store.read(subject.model, store.resolve(subject.model, subject.label))
    return load_model(bundle, engine_factory(subject.engine), subject.streams)


@cache
def _loaded(subject: EngineSubject) -> tuple[Engine, list[FeatureBatch]]:
    """Load the model once per process. The pool keeps its process between calls."""
    model = load_subject(subject)
    return model.engine, asyncio.run(_assembled(model, subject))


async def _assembled(model: LoadedModel, subject: EngineSubject) -> list[FeatureBatch]:
    store = open_store(subject.feature_store, read_only=True)
    await store.start()
    batches = []
    for content in subject.requests:
        request = ranking_pb2.RankRequest.FromString(content)
        fetched = await fetch(store, model.needs, request.user_id, np.array(request.pin_ids, np.uint64))
        batches.append(model.assembler.assemble(fetched, request.surface))
    await store.close()
    return batches
