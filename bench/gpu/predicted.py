"""The predictions for each number from before its measurement: from the compiler's output, and `predicted.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.plan import COMPILED, SHAPES, shape_name, tuning_name, tunings

#: Predicted rows/s of a fully used card, by the way of compiling; written by `python -m bench gpu_compiled`.
COMPILER = Path(__file__).parents[1] / "results" / "gpu_compiled.json"
#: Other predictions, by phase and name of the number. bench/NOTES.md gives the reasons.
WRITTEN = Path(__file__).with_name("predicted.json")
_ARCHITECTURE = "9.0"
#: Number of rows from which all multiprocessors are fully used.
_FULL_ROWS = 16_384

#: Predicted rows/s: low, high.
Range = tuple[float, float]


def predictions() -> dict[str, dict[str, Range]]:
    """Return all predictions, by phase and name of the number."""
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
