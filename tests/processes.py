"""Finds the child processes of a process, and waits until they have ended."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable, Iterator
from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the ids of the processes that a process's main thread started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def family(pid: int) -> list[int]:
    """Return the ids of a process and all of its descendants, itself first."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    started = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [pid, *(one for child in started for one in family(child))]


@contextlib.contextmanager
def ends_of(pids: Iterable[int]) -> Iterator[None]:
    """Run the block, and then wait until all of these processes have ended, whoever their parents are."""
    with contextlib.ExitStack() as opened:
        waited = select.poll()
        left = set()
        for pid in pids:
            descriptor = os.pidfd_open(pid)
            opened.callback(os.close, descriptor)
            waited.register(descriptor, select.POLLIN)
            left.add(descriptor)
        yield
        while left:
            ended = waited.poll(30_000)
            assert ended, f"{len(left)} processes did not end"
            for descriptor, _ in ended:
                waited.unregister(descriptor)
                left.remove(descriptor)
