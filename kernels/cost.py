"""Measuring what a run costs: a straight line in rows, fitted to the fastest of a few runs per size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kernels.engine import FeatureBatch, Rest, no_rest
from kernels.gpu.staging import Bucket

_ROWS = (8, 32, 128, 256)
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of a run as `fixed_s + per_row_s * rows`."""

    fixed_s: float = 0.0
    per_row_s: float = 0.0

    def __call__(self, rows: int) -> float:
        return self.fixed_s + self.per_row_s * rows


def measure_cost(
    run: Callable[[FeatureBatch], np.ndarray],
    sample: FeatureBatch,
    rest: Rest = no_rest,
    repeats: int = _REPEATS,
) -> LinearCost:
    """Fit the cost of single-request runs; the minimum of a few repeats ignores what else the machine does.

    Args:
        run: an engine's `run`.
        sample: at least one request with at least one row; its first request's rows are repeated to each size.
        rest: called after each run.
        repeats: of each size, at least.
    """
    seconds = []
    for rows in _ROWS:
        batch = tiled(sample, 1, rows)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            run(batch)
            best = min(best, time.perf_counter() - start)
            rest()
        seconds.append(best)
    per_row_s, fixed_s = np.polyfit(_ROWS, seconds, 1, w=1 / np.array(seconds))
    return LinearCost(max(0.0, float(fixed_s)), max(0.0, float(per_row_s)))


def warm_buckets(
    run: Callable[[FeatureBatch], np.ndarray], buckets: Sequence[Bucket], streams: int, sample: FeatureBatch, rest: Rest
) -> None:
    """Run every bucket of shapes on every stream, so that no request is the first of its shape.

    Args:
        run: an engine's `run`, whose streams take turns.
        buckets: the likeliest first.
        streams: of the engine.
        sample: at least one request with at least one row.
        rest: called after each run.
    """
    for bucket in buckets:
        batch = tiled(sample, bucket.requests, bucket.rows)
        for _ in range(streams):
            run(batch)
            rest()


def tiled(sample: FeatureBatch, requests: int, rows: int) -> FeatureBatch:
    """Return a batch of so many requests and rows, made from the first request of `sample`."""
    index = np.arange(rows) % int(sample.row_splits[1])
    return FeatureBatch(
        {name: np.repeat(tensor[:1], requests, axis=0) for name, tensor in sample.request.items()},
        {name: tensor[index] for name, tensor in sample.candidate.items()},
        np.linspace(0, rows, requests + 1).astype(np.int32),
    )
