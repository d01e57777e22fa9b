"""Measure time on the device, by its own clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

_WARM_RUNS = 3
#: Runs between two readings of the clock.
_CHUNK_S = 0.25


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """Capture a run in a CUDA graph, and return a function that replays it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())  # which what is read was put into
    with torch.cuda.stream(stream):
        run()  # compile and load everything
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int, until_s: float) -> np.ndarray:
    """Time runs after a few warm-up runs. Return seconds per run, float64[K].

    Args:
        run: queues work on the current stream.
        device: the device, whose clock is read.
        repeats: maximum number of runs; at least one is made.
        until_s: time on the monotonic clock after which no run starts.
    """
    began_s = time.perf_counter()
    for _ in range(min(_WARM_RUNS, repeats)):
        run()
    if device.type != "cuda":
        return np.array([_elapsed(run) for _ in range(repeats)])
    torch.cuda.synchronize()
    warm_s = (time.perf_counter() - began_s) / _WARM_RUNS
    chunk = max(1, min(repeats, int(_CHUNK_S / max(warm_s, 1e-6))))
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or time.monotonic() < until_s):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(chunk + 1)]  # type: ignore[no-untyped-call]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        seconds += [one.elapsed_time(other) / 1e3 for one, other in pairwise(marks)]
    return np.array(seconds)


def rates(seconds: np.ndarray, rows: int) -> dict[str, Any]:
    """Return rows/s and the quantiles of the time of a run."""
    return {
        "rows_s": rows / float(seconds.mean()),
        "ms_p50": float(np.quantile(seconds, 0.5)) * 1e3,
        "ms_p99": float(np.quantile(seconds, 0.99)) * 1e3,
        "runs": len(seconds),
    }


def _elapsed(run: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s
