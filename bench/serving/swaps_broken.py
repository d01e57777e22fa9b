"""Swap 200 versions under steady load, every fifth one broken in another way. See `bench.serving.swaps`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.harness import Raw
from bench.serving import swaps
from bench.test_bed import CONFIG

conclude = swaps.conclude


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a version neither serves nor fails in time."""
    yield from swaps.measure(quick=quick, config=config, broken_every=5)
