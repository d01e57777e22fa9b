"""Slows down background work while requests need the processor, in the server and while it tests new models."""

from __future__ import annotations

import mmap
import os
import time

#: Interval between checks whether the server is still busy, in seconds.
_LOOK_S = 0.004
#: Largest factor by which a busy server lengthens a pause.
_STRETCH_MAX = 16.0


class Pace:
    """Computes pauses between pieces of background work; they are longer while the server is busy.

    Limiting work to a share of a core is not enough: work while requests queue makes all of them late, and work while
    streams are idle makes hardly any late. The server sets a flag while it is busy, in a byte of memory that the
    processes share.
    """

    def __init__(self, file: int | None = None) -> None:
        """Create the shared byte, or open one.

        Args:
            file: descriptor of another process's `file`; None creates a new one.
        """
        self.file = os.memfd_create("pinrank-pace") if file is None else file
        if file is None:
            os.truncate(self.file, 1)
        self._busy = mmap.mmap(self.file, 1)

    @property
    def busy(self) -> bool:
        """Whether requests need so much of the processor that other work should wait."""
        return self._busy[0] != 0

    @busy.setter
    def busy(self, value: bool) -> None:
        self._busy[0] = value

    def pause(self, used_s: float, share: float) -> float:
        """Sleep after work, so that it uses only its share of a core; sleep longer, within bounds, while busy.

        Args:
            used_s: processor seconds of the work.
            share: fraction of one core that the work may use.

        Returns:
            The additional seconds slept because the server was busy.
        """
        pause_s = used_s * (1 / share - 1)
        until_s = time.monotonic() + pause_s * _STRETCH_MAX
        time.sleep(pause_s)
        paused_s = time.monotonic()
        while self.busy and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(_LOOK_S, left_s))
        return time.monotonic() - paused_s

    def close(self) -> None:
        """Close the shared byte."""
        self._busy.close()
        os.close(self.file)
