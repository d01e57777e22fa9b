"""Processes that others started, and their ends."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable, Iterator
from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the processes that one's first thread started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def family(pid: int) -> list[int]:
    """Return the processes that descend from one, itself first."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    started = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [pid, *(one for child in started for one in family(child))]


@contextlib.contextmanager
def ends_of(pids: Iterable[int]) -> Iterator[None]:
    """Do something, and wait until none of these processes is there any more, whoever their parents are."""
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
