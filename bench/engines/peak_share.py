"""Compare the native encoder with the multiply-adds that the cores can do at most, for each instruction set.

The peak is measured out of registers, in the same run and in rounds that alternate with the encoder's, so that whatever
else the machine does, and clocks that depend on the load, affect both. Both use the same number of threads: virtual
cores that share one physical core also share its peak.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.harness import Claim, markdown_table
from kernels.encoder import EncoderShape, FusedEncoder, instruction_sets
from kernels.engine import FeatureBatch
from kernels.fusion import EncoderCall
from kernels.native.library import library

#: Required shares of the peak. Other instruction sets are measured without a claim.
REQUIRED = {"avx2": 0.70, "avx512": 0.85}
#: Steps of one call of the peak's loop: about a millisecond.
_STEPS = 500_000


@dataclass(frozen=True, slots=True)
class PeakShare:
    """Medians over rounds, for one instruction set on some threads."""

    isa: str
    threads: int
    #: Floating-point operations per second of the multiply-add loop.
    peak: float
    rows_per_s: float
    #: Median of the rounds' encoder over peak, where a row counts `flop_per_row`.
    share: float
    #: The same with the products alone.
    share_of_products: float


def flop_per_row(weights: Mapping[str, np.ndarray], shape: EncoderShape) -> tuple[float, float]:
    """Count the floating-point operations that the kernel's form of the encoder needs for a row, without any padding.

    With L actions, K rows that are read, tokens of d = (action) + p + c numbers, h hidden values, a basis of
    B = p + (codes of actions) numbers and pins of D numbers, the multiply-adds of the products are

        candidate  c (D + L + d + h)
        layer 1    L B (L + d + h) + L h d
        layer 2    K (2 d d + 2 L d + 2 d h)

    and a multiply-add is two operations. Row by row, layer 1 also takes 12 operations for each of its L d numbers (sum
    of three parts 3, squares 2, gain, scale, sum and bias 4, squares and sum 3) and 6 for each of its L h hidden
    values, and layer 2 takes 26 for each of its K d numbers (scaling 3, two sums 3, two norms of 10). Exponentials are
    not counted, nor what a request needs once.

    Returns:
        All operations, and those of the products.
    """
    length, rows = shape.length, shape.rows
    (pin, embedding), candidate = weights["acted"].shape, len(weights["candidate"])
    hidden, dim = weights["layer1_hidden"].shape
    basis = pin + len(weights["action_table"]) - 1
    multiply_adds = (
        candidate * (embedding + length + dim + hidden)
        + length * basis * (length + dim + hidden)
        + length * hidden * dim
        + rows * (2 * dim * dim + 2 * length * dim + 2 * dim * hidden)
    )
    row_wise = length * (12 * dim + 6 * hidden) + rows * 26 * dim
    return 2.0 * multiply_adds + row_wise, 2.0 * multiply_adds


def measure_shares(call: EncoderCall, batch: FeatureBatch, *, quick: bool) -> list[PeakShare]:
    """Measure every instruction set of this processor, on one thread and on one per core."""
    rounds, window_s = (2, 0.02) if quick else (60, 0.05)
    given = {**batch.request, **batch.candidate}
    actions, embeddings, candidates = (given[name] for name in call.inputs)
    multiply_adds = library().pinrank_multiply_adds
    multiply_adds.argtypes, multiply_adds.restype = (ctypes.c_int, ctypes.c_int64), ctypes.c_double
    all_flop, product_flop = flop_per_row(call.weights, call.shape)

    def encode(isa: str) -> Callable[[], float]:
        kernel = FusedEncoder(call.weights, call.shape, isa)

        def run() -> float:
            return float(len(kernel.run(actions, embeddings, candidates, batch.row_splits)))

        return run

    def multiply(isa: int) -> Callable[[], float]:
        return lambda: float(multiply_adds(isa, _STEPS))

    shares = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        sides = [(name, [multiply(n)] * threads, [encode(name)] * threads) for n, name in enumerate(instruction_sets())]
        for _, _, encoders in sides:
            per_second(encoders, window_s)  # the first calls of a thread allocate memory
        found: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in sides}
        for _ in range(rounds):
            for name, peaks, encoders in sides:
                found[name].append((per_second(peaks, window_s), per_second(encoders, window_s)))
        for name, pairs in found.items():
            peak, rows = np.array(pairs).T
            median = float(np.median(rows / peak))
            shares.append(
                PeakShare(
                    name,
                    threads,
                    float(np.median(peak)),
                    float(np.median(rows)),
                    median * all_flop,
                    median * product_flop,
                )
            )
    return shares


def per_second(works: Sequence[Callable[[], float]], window_s: float) -> float:
    """Repeat each work on a thread of its own for a while, and return the total of what they return, per second."""
    done = [0.0] * len(works)
    start = threading.Barrier(len(works) + 1)

    def loop(number: int) -> None:
        start.wait()
        end_s = time.perf_counter() + window_s
        while time.perf_counter() < end_s:
            done[number] += works[number]()

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    start.wait()
    start_s = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start_s)


def claims_of(shares: Sequence[PeakShare]) -> list[Claim]:
    return [
        Claim(f"encoder's share of the peak, {_name(s)}", s.share, REQUIRED[s.isa], "ratio", "at_least")
        for s in shares
        if s.isa in REQUIRED
    ]


def table_of(shares: Sequence[PeakShare], all_flop: float, product_flop: float) -> str:
    """Return the shares as a Markdown section, with the operations of a row that `flop_per_row` counts."""
    header = ["", "multiply-add peak, GFLOP/s", "encoder, rows/s", "encoder, GFLOP/s", "share of the peak", "products"]
    lines = [
        [
            _name(s),
            f"{s.peak / 1e9:.1f}",
            f"{s.rows_per_s:,.0f}",
            f"{s.rows_per_s * all_flop / 1e9:.1f}",
            f"{s.share:.1%}",
            f"{s.share_of_products:.1%}",
        ]
        for s in shares
    ]
    text = markdown_table("Encoder alone, against the multiply-adds that the cores can do", header, lines)
    return (
        f"{text}\nA row takes {all_flop / 1e6:.2f} million floating-point operations, "
        f"{product_flop / 1e6:.2f} million of them in products.\n"
    )


def _name(share: PeakShare) -> str:
    return f"{share.isa}, {share.threads} thread" + ("s" if share.threads > 1 else "")
