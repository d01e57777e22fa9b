"""What was predicted of each number before it was measured: from what the compiler says, and from `predicted.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.plan import COMPILED, SHAPES, shape_name, tuning_name, tunings

#: Rows/s of a card that is full, by how the kernel is compiled: written by `python -m bench gpu_compiled`.
COMPILER = Path(__file__).parents[1] / "results" / "gpu_compiled.json"
#: By phase and name of the number, what no compiler says; bench/NOTES.md says why.
WRITTEN = Path(__file__).with_name("predicted.json")
_ARCHITECTURE = "9.0"
#: From so many rows on, every multiprocessor has all the work that it can take.
_FULL_ROWS = 16_384

#: Rows/s, from low to high.
Range = tuple[float, float]


def predictions() -> dict[str, dict[str, Range]]:
    """Return what is predicted, by phase and name of the number."""
    written = json.loads(WRITTEN.read_text())
    found: dict[str, dict[str, Range]] = {
        phase: {what: (low, high) for what, (low, high) in names.items()} for phase, names in written.items()
    }
    by_launch = _said(json.loads(COMPILER.read_text()))
    for compiled, rows_s in by_launch.items():
        for shape, of, tile_rows in tunings():
            if of == compiled and shape[0] * shape[1] >= _FULL_ROWS:
                found.setdefault("tuning", {})[tuning_name(shape, of, tile_rows)] = rows_s
    if COMPILED[0] in by_launch:
        full = [shape for shape in SHAPES if shape[0] * shape[1] >= _FULL_ROWS]
        found.setdefault("encoder", {}).update({shape_name(*shape): by_launch[COMPILED[0]] for shape in full})
    return found


def _said(compiler: Mapping[str, Any]) -> dict[tuple[int, int], Range]:
    return {
        (one["block"], one["warps"]): (one["rows_s"][0], one["rows_s"][1])
        for one in compiler["raw"]["facts"]
        if one["architecture"] == _ARCHITECTURE and one["rows_s"][1]
    }
