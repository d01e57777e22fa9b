"""Warm up an engine, with one run of each shape on each stream, and fit the cost of a run as a line over its rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from kernels.cores import keep_to, own_cores
from kernels.engine import FeatureBatch, Progress, WarmedUp, go_on

_ROWS = (8, 32, 128, 256)
#: Of each size, once every stream has run it.
_REPEATS = 2
#: Rows of the runs that are compared alone and on all streams at once, and how often they run at once.
_ROWS_TOGETHER, _REPEATS_TOGETHER = 128, 8


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of a run as `fixed_s + per_row_s * rows`, and `slowdown` times as many while all streams run."""

    fixed_s: float = 0.0
    per_row_s: float = 0.0
    slowdown: float = 1.0

    def __call__(self, rows: int) -> float:
        return self.fixed_s + self.per_row_s * rows


def warm_and_measure(
    run: Callable[[FeatureBatch], np.ndarray],
    streams: int,
    sample: FeatureBatch,
    progress: Progress = go_on,
    shapes: Iterable[tuple[int, int]] = (),
) -> tuple[WarmedUp, LinearCost]:
    """Run every shape on every stream, as far as there is time, and fit the cost of single-request runs.

    Args:
        run: an engine's `run`, whose streams take turns.
        streams: of the engine.
        sample: at least one request with at least one row; its first request's rows are repeated to each size.
        progress: when it says no, the shapes that are left are left out.
        shapes: requests and rows of what costs more the first time, in the order to run them.

    Returns:
        What was done, and the cost. The fastest run of a size counts, which ignores what else the machine does. Each
        stream runs a size before one counts for certain, so that it is also right when shapes were left out.
    """

    def alone(batch: FeatureBatch) -> float:
        start_s = time.perf_counter()
        run(batch)
        return time.perf_counter() - start_s

    def on_every_stream(batch: FeatureBatch) -> float:
        return _seconds_together(alone, streams, batch)

    shapes, repeats = tuple(shapes), streams + _REPEATS
    together = _REPEATS_TOGETHER if streams > 1 else 0
    made, of = 0, len(shapes) * streams + len(_ROWS) * repeats + together

    def timed(batch: FeatureBatch, seconds_of: Callable[[FeatureBatch], float] = alone) -> tuple[float, bool]:
        nonlocal made
        seconds = seconds_of(batch)
        made += 1
        return seconds, progress(made, of)

    in_time = progress(made, of)
    for requests, rows in shapes:
        if not in_time:
            break
        batch = tiled(sample, requests, rows)
        in_time = all(timed(batch)[1] for _ in range(streams))
    fastest = {}
    for rows in _ROWS:
        batch = tiled(sample, 1, rows)
        fastest[rows] = min(timed(batch)[0] for _ in range(repeats))
    per_row_s, fixed_s = np.polyfit(_ROWS, list(fastest.values()), 1, w=1 / np.array(list(fastest.values())))
    slowdown = 1.0
    if together:
        batch = tiled(sample, 1, _ROWS_TOGETHER)
        beside_s = min(timed(batch, on_every_stream)[0] for _ in range(together))
        slowdown = min(float(streams), max(1.0, beside_s / fastest[_ROWS_TOGETHER]))
    return WarmedUp(made, of), LinearCost(max(0.0, float(fixed_s)), max(0.0, float(per_row_s)), slowdown)


def fastest_s(
    runs: Mapping[str, Callable[[], None]], rounds: int, pause: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Call each run once, then all of them in alternating rounds. Return the seconds of the fastest of each."""
    for run in runs.values():
        run()
    spent_s: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        pause()
        for name, run in runs.items():
            start_s = time.perf_counter()
            run()
            spent_s[name].append(time.perf_counter() - start_s)
    return {name: min(several) for name, several in spent_s.items()}


def _seconds_together(alone: Callable[[FeatureBatch], float], streams: int, batch: FeatureBatch) -> float:
    """Return the mean seconds of a run on each of `streams` threads that start together; raise the error of any."""
    start, own = threading.Barrier(streams), own_cores(streams)

    def one(number: int) -> float:
        if own:
            keep_to(own[number])
        start.wait()
        return alone(batch)

    with ThreadPoolExecutor(streams) as pool:
        return sum(pool.map(one, range(streams))) / streams


def mixed(sample: FeatureBatch, rows: int) -> FeatureBatch:
    """Return a batch of about so many rows, made in equal parts from the requests of `sample` that have any."""
    counts = np.diff(sample.row_splits)
    kept = np.flatnonzero(counts)[:rows]
    each = -(-rows // len(kept))
    index = np.concatenate([sample.row_splits[r] + np.arange(each) % counts[r] for r in kept])
    return FeatureBatch(
        {name: tensor[kept] for name, tensor in sample.request.items()},
        {name: tensor[index] for name, tensor in sample.candidate.items()},
        np.arange(len(kept) + 1, dtype=np.int32) * np.int32(each),
    )


def tiled(sample: FeatureBatch, requests: int, rows: int) -> FeatureBatch:
    """Return a batch of so many requests and rows, made from the first request of `sample`."""
    index = np.arange(rows) % int(sample.row_splits[1])
    return FeatureBatch(
        {name: np.repeat(tensor[:1], requests, axis=0) for name, tensor in sample.request.items()},
        {name: tensor[index] for name, tensor in sample.candidate.items()},
        np.linspace(0, rows, requests + 1).astype(np.int32),
    )
