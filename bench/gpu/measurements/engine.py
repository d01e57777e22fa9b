"""Measure the engine with the whole ranker: accuracy, speed, memory growth, and opening it under load."""

from __future__ import annotations

import sys
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
from kernels.engine import Engine, EngineError, FeatureBatch
from kernels.engines import engine_factory
from model_store.bundle.files import GOLDEN, NETWORK, Bundle
from model_store.bundle.golden import decode_golden
from model_store.model.assembly import Assembler
from model_store.model.loaded import calibrate
from model_store.registry.store import open_model_store

MODELS, MODEL, LABEL, ENGINE = ROOT / "deploy" / "demo" / "models", "ml1m", "stable", "torch"
_STREAMS = 3
_RUNS, _DRY_RUNS = 300, 2
#: Runs per stream, before the first and between the readings of memory.
_MEMORY_RUNS, _DRY_MEMORY_RUNS = 500, 3
#: While the other engine is opened and captures.
_OPENED_SHAPES = ((1, 64), (1, 512), (4, 512), (16, 512), (16, 1024), (64, 4096))
_OPENED = 2


def engine(_out: Path, numbers: Numbers) -> None:
    """Verify the demo bundle's golden scores, time four batches, measure memory growth, and time the warm-up."""
    needs_gpu(numbers)
    bundle, dry_run = _bundle(), numbers.dry_run
    sample, expected = _golden(bundle)
    began_s = time.perf_counter()
    opened = _open(bundle, _STREAMS)
    opened_s = time.perf_counter() - began_s

    def goldens() -> dict[str, Any]:
        found = calibrate(bundle.manifest, opened.run(sample))
        difference = float(np.max(np.abs(found - expected)))
        allowed = max(bundle.manifest.golden_tolerance, opened.tolerance)
        # NaN must fail the check.
        checked = {"difference": difference, "allowed": allowed, "holds": difference <= allowed}
        return {**checked, "rows": sample.rows, "kernel": opened.kernel, "opened_s": opened_s}

    numbers.measure("goldens", goldens)
    for requests, rows in engine_shapes(dry_run=dry_run):
        batch = tiled(sample, requests, requests * rows)
        numbers.measure(shape_name(requests, rows), partial(_throughput, opened, batch, numbers))
    batch = tiled(sample, *((2, 16) if dry_run else (16, 8192)))
    numbers.measure("memory", partial(_memory, opened, batch, numbers))
    numbers.measure("warm-up", partial(_warm_up, opened, sample, numbers), 2)
    opened.close()


def needs_gpu(numbers: Numbers) -> None:
    """End the phase if PyTorch finds no GPU. The engine would run on the CPU, and its numbers look like a GPU's."""
    import torch  # noqa: PLC0415 - only some phases need it

    if not numbers.dry_run and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU")


def _bundle() -> Bundle:
    store = open_model_store(str(MODELS))
    return store.read(MODEL, store.resolve(MODEL, LABEL))


def _golden(bundle: Bundle) -> tuple[FeatureBatch, np.ndarray]:
    """Return the golden requests as a batch, and their expected probabilities, float32[N, H]."""
    golden, assembler = decode_golden(bundle.files[GOLDEN]), Assembler(bundle.manifest)
    sample = FeatureBatch.concat([assembler.assemble(one.fetched, one.surface) for one in golden])
    return sample, np.concatenate([one.probabilities for one in golden])


def _open(bundle: Bundle, streams: int) -> Engine:
    """Open the engine without the checks of a server, so that an engine with wrong answers is measured, too."""
    manifest = bundle.manifest
    return engine_factory(ENGINE)(bundle.files[NETWORK], manifest.specs, len(manifest.heads), streams)


def _throughput(engine: Engine, batch: FeatureBatch, numbers: Numbers) -> dict[str, Any]:
    """Time a batch on as many threads as the engine has streams, including copies to and from the device."""
    repeats = _DRY_RUNS if numbers.dry_run else _RUNS

    def work(times: int) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < times and (not seconds or numbers.left_s() > 0):
            began_s = time.perf_counter()
            engine.run(batch)
            seconds.append(time.perf_counter() - began_s)
        return seconds

    with ThreadPoolExecutor(engine.streams) as threads:
        list(threads.map(work, [min(3, repeats)] * engine.streams))  # capture the graphs
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
    """Measure how much the memory of the process and of the device grows over many runs."""
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
    import torch  # noqa: PLC0415 - the engine has imported it

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    used = {"process": pages * 4096}
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        used |= {"device": whole - free, "reserved": torch.cuda.memory_reserved()}
    return used


def _warm_up(engine: Engine, sample: FeatureBatch, numbers: Numbers) -> dict[str, Any]:
    """Time the engine's warm-up, which a server completes before it is ready."""
    began_s = time.perf_counter()
    done = engine.warm_up(sample, lambda _runs, _of: numbers.left_s() > 0)
    seconds = time.perf_counter() - began_s
    costs = {f"{rows} rows": engine.cost_s(rows) * 1e3 for rows in (128, 512)}
    return {"seconds": seconds, "runs": done.runs, "of": done.of, "cost_ms": costs}


def two_engines(_out: Path, numbers: Numbers) -> None:
    """Open two engines while a third one runs. No capture may break another or a run, or change an answer."""
    needs_gpu(numbers)

    def measured() -> dict[str, Any]:
        try:
            return _opened_under_load(numbers)
        except EngineError as error:  # this is a finding
            return {"holds": False, "failed": str(error)[:600]}

    numbers.measure("opened under load", measured, 5)


def _opened_under_load(numbers: Numbers) -> dict[str, Any]:
    bundle = _bundle()
    sample, _ = _golden(bundle)
    first = _open(bundle, 1)
    shapes = engine_shapes(dry_run=True) if numbers.dry_run else _OPENED_SHAPES
    batches = [tiled(sample, requests, max(requests, rows)) for requests, rows in shapes]
    expected = [calibrate(bundle.manifest, first.run(batch)) for batch in batches]
    opened = threading.Event()

    def differs(engine: Engine, number: int) -> float:
        """Run a batch. Return the largest difference from the first answer, or infinity if a value is NaN."""
        difference = np.abs(calibrate(bundle.manifest, engine.run(batches[number])) - expected[number])
        return float(np.max(np.where(np.isfinite(difference), difference, np.inf)))

    def load() -> list[float]:
        differences = []
        while not opened.is_set():
            differences += [differs(first, number) for number in range(len(batches))]
        return differences

    def opens(_: int) -> list[float]:
        """Return each shape's difference, as far as there is time."""
        engine, differences = _open(bundle, 1), []
        for number in range(len(batches)):
            if numbers.left_s() <= 0:
                break
            differences.append(max(differs(engine, number) for _ in range(2)))  # capture, then replay
        return differences

    with ThreadPoolExecutor(1 + _OPENED) as threads:
        loading = threads.submit(load)
        began_s = time.perf_counter()
        try:
            captured = list(threads.map(opens, range(_OPENED)))
        finally:
            opened.set()
        opened_s = time.perf_counter() - began_s
        under_load = loading.result()  # raises the error of the first engine
    allowed = max(bundle.manifest.golden_tolerance, first.tolerance)
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
