"""Which CPU cores this process may use, and which of its threads use them first."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

#: Niceness that threads which compute add to the process's, and the slice of those that answer.
_COMPUTING_NICE, _SLICE_NS = 5, 100_000
#: Threads and processes that this one starts have the usual slice.
_RESET_ON_FORK = 1
#: The system call by architecture, and its `struct sched_attr`: size, policy, flags, nice, priority, runtime (here the
#: slice), deadline, period.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
#: Mount points of control groups: version 2 (alone, or beside version 1), and version 1.
_MOUNTS_2 = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_MOUNTS_1 = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")


def cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process can keep busy, at least 1.

    Under a quota (`docker run --cpus`, a CPU limit in Kubernetes) all cores stay visible, but a process that has used
    up its quota stops until the next period. Fractions are rounded down: they cannot keep a thread busy.
    """
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([visible, *_quotas(root)])))


def own_cores(threads: int) -> tuple[int, ...]:
    """Return a core for each of several threads that compute at the same time, or () if they need none of their own.

    If there are as many threads as cores, Linux places two that wake together on one core whenever the waking thread
    occupies the other, and leaves them there: each then waits for the other while a core idles. With fewer threads than
    cores it finds an idle core, and a core of one's own would only be one that other work may occupy.
    """
    visible = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return tuple(visible) if 1 < threads == len(visible) == cores() else ()


def keep_to(core: int) -> None:
    """Run this thread on one core only."""
    os.sched_setaffinity(0, {core})


def compute_behind_others() -> bool:
    """Let threads that wake for a moment interrupt this one, which computes for milliseconds at a time.

    Where all cores compute, Linux would let an event loop wait for a core until a slice of such a thread ends.

    Returns:
        Whether Linux does so; other systems do not know it.
    """
    return _set_scheduling(_COMPUTING_NICE, 0, 0)


def answer_at_once() -> bool:
    """Let this thread, which computes for microseconds at a time, interrupt the others when it wakes.

    Threads with a shorter slice interrupt those with a longer one from Linux 6.12 on; before, only the niceness of the
    others counts.

    Returns:
        Whether Linux took the request.
    """
    return _set_scheduling(0, _SLICE_NS, _RESET_ON_FORK)


def _set_scheduling(nicer: int, slice_ns: int, flags: int) -> bool:
    """Raise the niceness of this thread, and set its slice, 0 for the usual one (sched_setattr(2); Python lacks it)."""
    number = _SCHED_SETATTR.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return False
    nice = min(19, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + nicer)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, flags, nice, 0, slice_ns, 0, 0)
    return bool(ctypes.CDLL(None).syscall(number, 0, attributes, 0) == 0)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in cores, of this process's control groups and their ancestors."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for group in _groups(root, _MOUNTS_2, path):
                yield from _version_2(group)
        elif "cpu" in controllers.split(","):
            for group in _groups(root, _MOUNTS_1, path):
                yield from _version_1(group)


def _groups(root: Path, mounts: tuple[str, ...], path: str) -> Iterator[Path]:
    """Yield the folders of a group and its ancestors. In a container the path may be the host's."""
    parts = PurePosixPath(path).parts[1:]
    for mount in mounts:
        for depth in range(len(parts) + 1):
            yield root.joinpath(mount, *parts[:depth])


def _version_2(group: Path) -> Iterator[float]:
    words = _words(group / "cpu.max")
    if len(words) == 2 and words[0] != "max":
        yield int(words[0]) / int(words[1])


def _version_1(group: Path) -> Iterator[float]:
    quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        yield int(quota[0]) / int(period[0])


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
