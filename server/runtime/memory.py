"""Measures the memory that this process may still use, and returns freed memory to the system."""

from __future__ import annotations

import ctypes
from pathlib import Path

#: mallopt parameters (malloc.h): the minimum size of a block with its own mapping, and the number of heaps (arenas).
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE_BYTES = 1 << 20
_HEAPS = 2


def set_up_allocator() -> None:
    """Configure glibc's malloc so that a dropped version's memory goes back to the system; do nothing elsewhere.

    - Large blocks get a mapping of their own. By default, glibc raises its threshold for this, up to 32 MB, whenever
      such a block is freed. A second version's near caches would then come from a heap, and not even malloc_trim
      returns the top of a heap. We fix the threshold, which turns this adjustment off.
    - Threads share two heaps; by default, each has its own, up to eight per processor. Versions are loaded and dropped
      on various threads, and every further heap adds fragmentation.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        choose(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        choose(_M_ARENA_MAX, _HEAPS)


def available_bytes(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the smaller of the machine's and the container's available memory in bytes; None if neither is known."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in proc.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) << 10)
    except (OSError, KeyError, ValueError):  # not Linux
        pass
    try:
        limit, used = (cgroup / "memory.max").read_text().strip(), int((cgroup / "memory.current").read_text())
        if limit != "max":
            found.append(max(0, int(limit) - used))
    except (OSError, ValueError):  # no container, or cgroups v1
        pass
    return min(found, default=None)


def give_back_freed() -> None:
    """Return freed memory to the system (glibc only; does nothing elsewhere)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
