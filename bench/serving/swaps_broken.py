"""Two hundred versions taken in under steady load, every fifth one broken in another way: see `bench.serving.swaps`."""

from __future__ import annotations

from pathlib import Path

from bench.harness import Measurement
from bench.serving import swaps
from bench.test_bed import CONFIG


def measure(*, quick: bool = False, config: Path = CONFIG) -> Measurement:
    """Measure swaps of which every fifth is to be refused. Raises BenchmarkError when one comes to nothing at all."""
    return swaps.measure(quick=quick, config=config, broken_every=5)
