"""Clean up after a run in any case: `python -m bench.gpu.guard FOLDER`, with a pipe from the run at standard input.

A run that is killed by SIGKILL cannot stop its phases, nor the processes that they started, such as servers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

#: Time for processes to exit, in seconds.
_LOOKS, _LOOK_S = 100, 0.05


class Guard:
    """Used by the run to control its guard."""

    def __init__(self, scratch: Path) -> None:
        """Start the guard process.

        Args:
            scratch: folder to delete at the end.
        """
        command = [sys.executable, "-m", "bench.gpu.guard", str(scratch)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def tell(self, group: int) -> None:
        """Tell the guard which process group to kill; 0 means none."""
        assert self._process.stdin is not None  # noqa: S101 - the pipe was requested
        with contextlib.suppress(BrokenPipeError):  # the guard was killed; the run continues without it
            self._process.stdin.write(f"{group}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """Let the guard clean up, and wait for it."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def main() -> None:
    """Wait for the end of the run, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # these signals are for the run
        signal.signal(number, signal.SIG_IGN)
    group = 0
    for line in sys.stdin.buffer:
        group = int(line)
    if group:
        with contextlib.suppress(ProcessLookupError):
            for _ in range(_LOOKS):  # processes that have not exited yet may still create files
                os.killpg(group, signal.SIGKILL)
                time.sleep(_LOOK_S)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
