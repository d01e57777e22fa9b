"""How much memory this process may still take, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
from pathlib import Path

#: mallopt's names (malloc.h): the size from which a block is mapped apart, and how many heaps threads share.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE_BYTES = 1 << 20
_HEAPS = 2


def set_up_allocator() -> None:
    """Let what a version took go back to the system when it is gone, where the C library would keep it (glibc).

    - Large blocks are mapped apart. glibc raises the size from which it does so whenever such a block is freed, up to
      32 MB: a version's second near caches would come from a heap, whose top nothing gives back, malloc_trim neither.
      A fixed size keeps it from learning.
    - Threads share two heaps instead of having one each, up to eight per processor: versions are loaded and dropped on
      various threads, and what stays behind between other things' blocks grew with every heap.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        choose(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        choose(_M_ARENA_MAX, _HEAPS)


def available_bytes(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the least of what the machine has left and what the container may still take; None where nobody says."""
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
    except (OSError, ValueError):  # no container, or cgroups of the old kind
        pass
    return min(found, default=None)


def give_back_freed() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
