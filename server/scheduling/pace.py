"""Work beside requests that keeps out of their way: in the server, and in the process that proves versions for it."""

from __future__ import annotations

import mmap
import os
import time

#: Between looks at whether requests still need much.
_LOOK_S = 0.004
#: How many times longer a pause may become when requests never leave enough idle.
_STRETCH_MAX = 16.0


class Pace:
    """Pauses between pieces of work, longer while requests need much of what there is.

    A share of a core is not enough: what runs while requests queue makes all of them late, and what runs while streams
    stand idle hardly any. The server says which it is; the byte that it says it with is shared between processes.
    """

    def __init__(self, file: int | None = None) -> None:
        """Share with another process.

        Args:
            file: descriptor of the other one's `file`; a new one without.
        """
        self.file = os.memfd_create("pinrank-pace") if file is None else file
        if file is None:
            os.truncate(self.file, 1)
        self._busy = mmap.mmap(self.file, 1)

    @property
    def busy(self) -> bool:
        """Whether requests leave too little for anything else."""
        return self._busy[0] != 0

    @busy.setter
    def busy(self, value: bool) -> None:
        self._busy[0] = value

    def pause(self, used_s: float, share: float) -> float:
        """Sleep for as long as a share of a core asks for after so much work, and on, within bounds, while busy.

        Returns:
            Seconds of the second kind.
        """
        pause_s = used_s * (1 / share - 1)
        until_s = time.monotonic() + pause_s * _STRETCH_MAX
        time.sleep(pause_s)
        paused_s = time.monotonic()
        while self.busy and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(_LOOK_S, left_s))
        return time.monotonic() - paused_s

    def close(self) -> None:
        """Give up the byte."""
        self._busy.close()
        os.close(self.file)
