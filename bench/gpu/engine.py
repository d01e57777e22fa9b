"""The whole ranker through the engine that serves it: is it right, how fast, does memory stay, can two be opened."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.carried import ROOT
from bench.gpu.numbers import OUT_OF_TIME, Numbers
from bench.gpu.plan import engine_shapes, shape_name
from kernels.cost import tiled
from kernels.engine import Engine, FeatureBatch
from kernels.opening import engine_factory
from model_store.bundle import GOLDEN, Bundle
from model_store.golden import decode_golden
from model_store.live import LiveModel, load_live
from model_store.store import open_model_store

MODELS, MODEL, LABEL, ENGINE = ROOT / "deploy" / "demo" / "models", "ml1m", "stable", "torch"
_STREAMS = 3
_RUNS, _DRY_RUNS = 300, 2
#: Each stream's, before memory is looked at and in between.
_MEMORY_RUNS, _DRY_MEMORY_RUNS = 500, 3
#: While the other engine is opened and captures.
_OPENED_SHAPES = ((1, 64), (1, 512), (4, 512), (16, 512), (16, 1024), (64, 4096))
_WAIT_S = 60.0


def engine(_out: Path, numbers: Numbers) -> None:
    """Score the demo bundle's golden requests, run four batches, look at memory, and time the warm-up."""
    bundle = _bundle()
    opened: list[LiveModel] = []
    sample: list[FeatureBatch] = []

    def goldens() -> dict[str, Any]:
        began_s = time.perf_counter()
        live = load_live(bundle, engine_factory(ENGINE), _STREAMS, warm=False)
        opened.append(live)
        opened_s = time.perf_counter() - began_s
        golden = decode_golden(bundle.files[GOLDEN])
        sample.append(FeatureBatch.concat([live.assembler.assemble(one.fetched, one.surface) for one in golden]))
        found = live.probabilities(live.engine.run(sample[0]))
        difference = float(np.max(np.abs(found - np.concatenate([one.probabilities for one in golden]))))
        allowed = max(live.manifest.golden_tolerance, live.engine.tolerance)
        return {
            "difference": difference,
            "allowed": allowed,
            "holds": difference <= allowed,
            "rows": sample[0].rows,
            "kernel": live.engine.kernel,
            "opened_s": opened_s,
        }

    numbers.measure("goldens", goldens, 5)
    if not sample:  # and the reason stands there
        return
    live, dry_run = opened[0], numbers.dry_run
    for requests, rows in engine_shapes(dry_run=dry_run):
        batch = tiled(sample[0], requests, requests * rows)
        numbers.measure(shape_name(requests, rows), partial(_throughput, live.engine, batch, numbers))
    batch = tiled(sample[0], *((2, 16) if dry_run else (16, 8192)))
    numbers.measure("memory", partial(_memory, live.engine, batch, _DRY_MEMORY_RUNS if dry_run else _MEMORY_RUNS))
    numbers.measure("warm-up", partial(_warm_up, live.engine, sample[0], numbers), 2)
    live.engine.close()


def _bundle() -> Bundle:
    store = open_model_store(str(MODELS))
    return store.read(MODEL, store.resolve(MODEL, LABEL))


def _throughput(engine: Engine, batch: FeatureBatch, numbers: Numbers) -> dict[str, Any]:
    """Run a batch from as many threads as the engine has streams; its copies to and from the device count."""
    repeats = _DRY_RUNS if numbers.dry_run else _RUNS

    def work(times: int) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < times and (not seconds or numbers.left_s() > 0):
            began_s = time.perf_counter()
            engine.run(batch)
            seconds.append(time.perf_counter() - began_s)
        return seconds

    with ThreadPoolExecutor(engine.streams) as threads:
        list(threads.map(work, [min(3, repeats)] * engine.streams))  # graphs are captured
        began_s = time.perf_counter()
        seconds = [one for mine in threads.map(work, [repeats] * engine.streams) for one in mine]
        whole_s = time.perf_counter() - began_s
    return {
        "rows_s": batch.rows * len(seconds) / whole_s,
        "ms_p50": float(np.quantile(seconds, 0.5)) * 1e3,
        "ms_p99": float(np.quantile(seconds, 0.99)) * 1e3,
        "runs": len(seconds),
    }


def _memory(engine: Engine, batch: FeatureBatch, runs: int) -> dict[str, Any]:
    """Return by how much memory grows, of the process and of the device, over as many runs again."""

    def work(_: int) -> None:
        for _run in range(runs):
            engine.run(batch)

    grown = []
    with ThreadPoolExecutor(engine.streams) as threads:
        for _ in range(2):
            list(threads.map(work, range(engine.streams)))
            grown.append(_used())
    return {
        "runs": runs * engine.streams,
        **{f"{name}_growth_bytes": grown[1][name] - grown[0][name] for name in grown[0]},
        **{f"{name}_bytes": value for name, value in grown[1].items()},
    }


def _used() -> dict[str, int]:
    import torch  # noqa: PLC0415 - imported by the engine

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    used = {"process": pages * 4096}
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        used |= {"device": whole - free, "reserved": torch.cuda.memory_reserved()}
    return used


def _warm_up(engine: Engine, sample: FeatureBatch, numbers: Numbers) -> dict[str, Any]:
    """Time the engine's own warm-up, which a server waits for before it is ready."""
    runs = count()

    def rest() -> None:
        done = next(runs)
        if numbers.left_s() <= 0:
            raise TimeoutError(f"{OUT_OF_TIME} after {done} runs")

    began_s = time.perf_counter()
    engine.warm_up(sample, rest)
    seconds = time.perf_counter() - began_s
    costs = {f"{rows} rows": engine.cost_s(1, rows) * 1e3 for rows in (128, 512)}
    return {"seconds": seconds, "runs": next(runs), "cost_ms": costs}


def two_engines(_out: Path, numbers: Numbers) -> None:
    """Open a second engine, and capture its graphs, while the first answers: neither may fail or answer otherwise."""
    numbers.measure("opened under load", partial(_opened_under_load, numbers), 5)


def _opened_under_load(numbers: Numbers) -> dict[str, Any]:
    bundle = _bundle()
    first = load_live(bundle, engine_factory(ENGINE), 1, warm=False)
    golden = decode_golden(bundle.files[GOLDEN])
    sample = FeatureBatch.concat([first.assembler.assemble(one.fetched, one.surface) for one in golden])
    shapes = engine_shapes(dry_run=True) if numbers.dry_run else _OPENED_SHAPES
    batches = [tiled(sample, requests, max(requests, rows)) for requests, rows in shapes]
    expected = [first.engine.run(batch) for batch in batches]
    # Half precision adds up in another order in another shape, never in the same one.
    stop, answered = threading.Event(), queue.SimpleQueue[float]()

    def load() -> None:
        while not stop.is_set():
            for batch, answer in zip(batches, expected, strict=True):
                answered.put(_largest(first.engine.run(batch), answer))

    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load)
        began_s = time.perf_counter()
        captured, worst = 0, 0.0
        try:
            second = load_live(bundle, engine_factory(ENGINE), 1, warm=False)
            for batch, answer in zip(batches, expected, strict=True):
                if numbers.left_s() <= 0 or loading.done():
                    break
                for _ in range(2):  # captured, then replayed
                    worst = max(worst, _largest(second.engine.run(batch), answer))
                captured += 1
        finally:
            stop.set()
        opened_s = time.perf_counter() - began_s
        loading.result(_WAIT_S)  # raises what the first engine met
    under_load = [answered.get() for _ in range(answered.qsize())]
    allowed = max(first.manifest.golden_tolerance, first.engine.tolerance)
    worst = max(worst, *under_load, 0.0)
    return {
        "opened_s": opened_s,
        "shapes": captured,
        "answers_under_load": len(under_load),
        "difference": worst,
        "allowed": allowed,
        "holds": worst <= allowed and captured == len(batches),
    }


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of two sets of probabilities, infinite where one is not finite."""
    difference = np.abs(_sigmoid(found) - _sigmoid(expected))
    return float(np.max(np.where(np.isfinite(difference), difference, np.inf)))


_sigmoid: Callable[[np.ndarray], np.ndarray] = lambda logits: 1 / (1 + np.exp(-np.clip(logits, -80, 80)))  # noqa: E731
