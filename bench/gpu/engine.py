"""The whole ranker through the engine that serves it: is it right, how fast, does memory stay, can two be opened."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
_OPENED = 2


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
    numbers.measure("memory", partial(_memory, live.engine, batch, numbers))
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


def _memory(engine: Engine, batch: FeatureBatch, numbers: Numbers) -> dict[str, Any]:
    """Return by how much memory grows, of the process and of the device, over as many runs again."""
    runs = _DRY_MEMORY_RUNS if numbers.dry_run else _MEMORY_RUNS

    def work(_: int) -> None:
        for done in range(runs):
            if numbers.left_s() <= 0:
                raise TimeoutError(f"{OUT_OF_TIME} after {done} of {runs} runs")
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
    began_s = time.perf_counter()
    done = engine.warm_up(sample, lambda _runs, _of: numbers.left_s() > 0)
    seconds = time.perf_counter() - began_s
    costs = {f"{rows} rows": engine.cost_s(1, rows) * 1e3 for rows in (128, 512)}
    return {"seconds": seconds, "runs": done.runs, "of": done.of, "cost_ms": costs}


def two_engines(_out: Path, numbers: Numbers) -> None:
    """Open two engines at once, while a third answers: no capture may break another, or a run, or change an answer."""
    numbers.measure("opened under load", partial(_opened_under_load, numbers), 5)


def _opened_under_load(numbers: Numbers) -> dict[str, Any]:
    bundle = _bundle()
    first = load_live(bundle, engine_factory(ENGINE), 1, warm=False)
    golden = decode_golden(bundle.files[GOLDEN])
    sample = FeatureBatch.concat([first.assembler.assemble(one.fetched, one.surface) for one in golden])
    shapes = engine_shapes(dry_run=True) if numbers.dry_run else _OPENED_SHAPES
    batches = [tiled(sample, requests, max(requests, rows)) for requests, rows in shapes]
    expected = [first.engine.run(batch) for batch in batches]
    opened = threading.Event()

    def load() -> list[float]:
        differences = []
        while not opened.is_set():
            for batch, answer in zip(batches, expected, strict=True):
                differences.append(_largest(first.engine.run(batch), answer))
        return differences

    def opens(_: int) -> list[float]:
        """Return each shape's difference, as far as there is time."""
        live, differences = load_live(bundle, engine_factory(ENGINE), 1, warm=False), []
        for batch, answer in zip(batches, expected, strict=True):
            if numbers.left_s() <= 0:
                break
            runs = [live.engine.run(batch) for _ in range(2)]  # captured, then replayed
            differences.append(max(_largest(found, answer) for found in runs))
        return differences

    with ThreadPoolExecutor(1 + _OPENED) as threads:
        loading = threads.submit(load)
        began_s = time.perf_counter()
        try:
            captured = list(threads.map(opens, range(_OPENED)))
        finally:
            opened.set()
        opened_s = time.perf_counter() - began_s
        under_load = loading.result()  # raises what the first engine met
    allowed = max(first.manifest.golden_tolerance, first.engine.tolerance)
    worst = max([*under_load, *(one for differences in captured for one in differences)])
    shapes_run = [len(differences) for differences in captured]
    if worst <= allowed and min(shapes_run) < len(batches):
        raise TimeoutError(f"{OUT_OF_TIME} after {shapes_run} of {len(batches)} shapes, without a wrong answer")
    return {
        "opened": _OPENED,
        "opened_s": opened_s,
        "shapes": shapes_run,
        "answers_under_load": len(under_load),
        "difference": worst,
        "allowed": allowed,
        "holds": worst <= allowed,
    }


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of two sets of probabilities, infinite where one is not finite."""
    difference = np.abs(_sigmoid(found) - _sigmoid(expected))
    return float(np.max(np.where(np.isfinite(difference), difference, np.inf)))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    likely: np.ndarray = 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
    return likely
