"""The whole ranker through an engine on a GPU, alone and served: for `bench.gpu`, where the wheels for it are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kernels.engine import Engine, EngineError, FeatureBatch
from kernels.opening import engine_factory
from model_store.bundle import BundleError
from model_store.live import load_live
from model_store.store import open_model_store

ENGINES = ("torch", "tensorrt", "tensorrt_rtx")
_STORE, _MODEL, _LABEL = "deploy/demo/models", "ml1m", "stable"
_STREAMS = 3
_TARGET_MS = 10.0
_CANDIDATES, _FIRST_PER_S = 512, 200.0


def ranker(engine: str, shapes: Sequence[tuple[int, int]], repeats: int) -> Iterator[dict[str, Any]]:
    """Run batches of each shape from as many threads as the engine has streams; yield rows/s and a run's quantiles."""
    try:
        store = open_model_store(_STORE)
        bundle = store.read(_MODEL, store.resolve(_MODEL, _LABEL))
        live = load_live(bundle, engine_factory(engine), _STREAMS, warm=False)
    except (BundleError, EngineError, ValueError) as error:
        yield {"engine": engine, "rows_s": "not measured", "why": str(error)[:300]}
        return
    try:
        for requests, rows in shapes:
            about = {"engine": engine, "requests": requests, "rows": rows}
            try:
                yield {**about, **_run(live.engine, _batch(live.manifest.specs, requests, rows), repeats)}
            except EngineError as error:
                yield {**about, "rows_s": "not measured", "why": str(error)[:300]}
    finally:
        live.engine.close()


def served(engine: str, seconds: float) -> dict[str, Any]:
    """Serve through gRPC, and return the highest rate of power-law traffic that is answered within 10 ms at P99."""
    about = {"engine": engine, "candidates": _CANDIDATES}
    try:
        from bench import client  # noqa: PLC0415 - the ranker alone needs no gRPC
        from bench.harness import BenchmarkError  # noqa: PLC0415
        from bench.scene import SEED, scene  # noqa: PLC0415
    except ImportError as error:
        return {**about, "rows_s": "not measured", "why": f"{error}: carry the wheel"}
    try:
        with scene(extra=f'engine = "{engine}"\n', candidates=_CANDIDATES) as stage:
            rate_per_s, _ = stage.client.submit(
                client.highest_rate,
                stage.server.address,
                stage.subject.requests,
                _FIRST_PER_S,
                _TARGET_MS,
                seconds / 4,
                seconds,
                SEED,
            ).result()
    except BenchmarkError as error:
        return {**about, "rows_s": "not measured", "why": str(error)[-300:]}
    return {**about, "requests_s": rate_per_s, "rows_s": rate_per_s * _CANDIDATES}


def _batch(specs: Any, requests: int, rows: int) -> FeatureBatch:
    rng = np.random.default_rng(0)
    sides: dict[str, dict[str, np.ndarray]] = {"request": {}, "candidate": {}}
    for spec in specs:
        shape = (requests if spec.side == "request" else requests * rows, *spec.shape)
        value = np.ones(shape) if spec.dtype == "int64" else rng.normal(size=shape)
        sides[spec.side][spec.name] = value.astype(spec.dtype)
    return FeatureBatch(sides["request"], sides["candidate"], np.arange(requests + 1, dtype=np.int32) * rows)


def _run(engine: Engine, batch: FeatureBatch, repeats: int) -> dict[str, float]:
    def work(times: int) -> list[float]:
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            engine.run(batch)
            seconds.append(time.perf_counter() - began)
        return seconds

    with ThreadPoolExecutor(engine.streams) as threads:
        list(threads.map(work, [min(3, repeats)] * engine.streams))
        began = time.perf_counter()
        seconds = [one for mine in threads.map(work, [repeats] * engine.streams) for one in mine]
        whole_s = time.perf_counter() - began
    return {
        "rows_s": batch.rows * repeats * engine.streams / whole_s,
        "ms_p50": float(np.quantile(seconds, 0.5)) * 1e3,
        "ms_p99": float(np.quantile(seconds, 0.99)) * 1e3,
    }
