"""Swap 200 versions under steady load, every fifth one broken in another way. See `bench.serving.swaps`."""

from __future__ import annotations

from pathlib import Path

from bench.harness import Measurement
from bench.serving import swaps
from bench.test_bed import CONFIG


def measure(*, quick: bool = False, config: Path = CONFIG) -> Measurement:
    """Run the benchmark. Raises BenchmarkError if a version neither serves nor fails in time."""
    return swaps.measure(quick=quick, config=config, broken_every=5)
