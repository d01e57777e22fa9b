"""Measure the Triton kernel alone: its accuracy, its speed, and the best way to launch it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.measurements.subject import Batch, GpuSubject, device_of, length_of
from bench.gpu.measurements.timing import graphed, rates, seconds_of
from bench.gpu.numbers import Numbers
from bench.gpu.plan import COMPILED, DRY_COMPILED, DRY_SHAPES, SHAPES, parity_name, shape_name, tuning_name, tunings
from bench.gpu.results import PARITY_MAX

_REPEATS = 200
_TUNING_REPEATS = 50
_MATRIX, _DRY_MATRIX = 8192, 64
_COPIED_BYTES, _DRY_COPIED_BYTES = 1 << 32, 1 << 16
#: Without fusion, a row needs more than half a megabyte.
_ROWS_AT_ONCE = 4096
#: Seconds for a compilation of the kernel, and a run.
_COMPILES_S = 6.0


def parity(_out: Path, numbers: Numbers) -> None:
    """Compare the kernel, compiled in each way, with the published form in float64."""
    dry_run = numbers.dry_run
    device, length = device_of(dry_run=dry_run), length_of(dry_run=dry_run)
    subject = GpuSubject(device, length=length)
    # Full, short and empty sequences, and rows that do not fill a tile; the last request has no rows.
    rows, actions = ([3, 2, 1], [length, 5, 0]) if dry_run else ([40, 129, 7, 1, 0], [length, 33, 1, 0, length])
    batch = Batch(rows, device, length=length, actions=actions)
    exact = subject.exact(batch)
    for compiled in (None, *(DRY_COMPILED if dry_run else COMPILED)):
        numbers.measure(parity_name(compiled), partial(_difference, subject, batch, exact, compiled), _COMPILES_S)


def _difference(
    subject: GpuSubject, batch: Batch, exact: torch.Tensor, compiled: tuple[int, int] | None
) -> dict[str, Any]:
    found = subject.fused(batch, compiled)().cpu().double()
    norms = exact.norm(dim=1)
    # A request without actions must give exactly 0.
    relative = (found - exact).norm(dim=1) / torch.where(norms > 0, norms, 1.0)
    worst = float(relative.nan_to_num(nan=torch.inf).max())
    return {"relative_difference": worst, "allowed": PARITY_MAX, "rows": batch.rows, "holds": worst <= PARITY_MAX}


def ceilings(_out: Path, numbers: Numbers) -> None:
    """Record the device, and the peaks that PyTorch reaches: dense bf16 products, and copies within device memory."""
    device = device_of(dry_run=numbers.dry_run)
    size = _DRY_MATRIX if numbers.dry_run else _MATRIX
    copied = _DRY_COPIED_BYTES if numbers.dry_run else _COPIED_BYTES

    def product() -> dict[str, Any]:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        seconds = seconds_of(lambda: torch.matmul(a, b, out=out), device, 30, numbers.until_s)
        return {"flop_s": 2 * size**3 / float(np.median(seconds)), "runs": len(seconds)}

    def copy() -> dict[str, Any]:
        source = torch.ones(copied, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = seconds_of(lambda: target.copy_(source), device, 30, numbers.until_s)
        return {"bytes_s": 2 * copied / float(np.median(seconds)), "runs": len(seconds)}

    numbers.measure("device", lambda: _device(device))
    numbers.measure("bf16 product", product)
    numbers.measure("copy", copy)


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "none: a dry run"}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def encoder(_out: Path, numbers: Numbers) -> None:
    """Time the kernel on batches of every shape, in CUDA graphs; then the published form on the largest."""
    device, length = device_of(dry_run=numbers.dry_run), length_of(dry_run=numbers.dry_run)
    subject = GpuSubject(device, length=length)
    shapes = DRY_SHAPES if numbers.dry_run else SHAPES
    for requests, rows in shapes:
        numbers.measure(shape_name(requests, rows), partial(_fused, subject, (requests, rows), numbers, _REPEATS))
    requests, rows = shapes[-1]

    def published() -> dict[str, Any]:
        batch = Batch([rows] * requests, device, length=length)
        run = subject.published(batch, _ROWS_AT_ONCE)
        return rates(seconds_of(run, device, 1 if numbers.dry_run else 20, numbers.until_s), batch.rows)

    numbers.measure(f"{shape_name(requests, rows)}, published form", published, 2)


def tuning(_out: Path, numbers: Numbers) -> None:
    """Time every way to launch the kernel, to choose the default of the next version."""
    device, length = device_of(dry_run=numbers.dry_run), length_of(dry_run=numbers.dry_run)
    subject = GpuSubject(device, length=length)
    for shape, compiled, tile_rows in tunings(dry_run=numbers.dry_run):
        numbers.measure(
            tuning_name(shape, compiled, tile_rows),
            partial(_fused, subject, shape, numbers, _TUNING_REPEATS, compiled, tile_rows),
        )


def _fused(
    subject: GpuSubject,
    shape: tuple[int, int],
    numbers: Numbers,
    repeats: int,
    compiled: tuple[int, int] | None = None,
    tile_rows: int = 0,
) -> dict[str, Any]:
    requests, rows = shape
    device, length = device_of(dry_run=numbers.dry_run), length_of(dry_run=numbers.dry_run)
    batch = Batch([rows] * requests, device, length=length)
    run = subject.fused(batch, compiled, tile_rows)
    if numbers.dry_run:
        return {**rates(seconds_of(run, device, 1, numbers.until_s), batch.rows), "without": "CUDA graphs"}
    return rates(seconds_of(graphed(run), device, repeats, numbers.until_s), batch.rows)
