"""Keeping the processor cores of a virtual machine from being taken away while they have nothing to do."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REQUEST = Path("/dev/cpu_dma_latency")


@contextmanager
def kept_awake() -> Iterator[bool]:
    """Ask Linux to let idle cores poll instead of sleep (PM QoS, latency 0), and say whether it does.

    A virtual core that sleeps is given back late by its host: on the machines that these benchmarks run on, the median
    of an echo goes from 1.5 to 20 ms because of it. Asking takes the right to write to /dev/cpu_dma_latency.
    """
    try:
        held = _REQUEST.open("wb", buffering=0)
    except OSError:
        yield False
        return
    with held:
        held.write(struct.pack("i", 0))
        yield True
