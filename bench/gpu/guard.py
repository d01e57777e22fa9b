"""Clears up after a run, however that ends: `python -m bench.gpu.guard FOLDER`, with the run at its standard input.

A run that is killed by SIGKILL can end no phase, and what a phase has started (a server, its clients) outlives it too.
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

#: For processes to be gone.
_LOOKS, _LOOK_S = 100, 0.05


class Guard:
    """The run's side."""

    def __init__(self, scratch: Path) -> None:
        """Start the process that clears up.

        Args:
            scratch: the folder to remove.
        """
        command = [sys.executable, "-m", "bench.gpu.guard", str(scratch)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def tell(self, group: int) -> None:
        """Say which process group to kill, 0 for none."""
        assert self._process.stdin is not None  # noqa: S101 - asked for
        with contextlib.suppress(BrokenPipeError):  # somebody ended it; the run goes on without
            self._process.stdin.write(f"{group}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """Let it clear up, and wait for that."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def main() -> None:
    """Wait until the run is gone, then clear up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for the run
        signal.signal(number, signal.SIG_IGN)
    group = 0
    for line in sys.stdin.buffer:
        group = int(line)
    if group:
        with contextlib.suppress(ProcessLookupError):
            for _ in range(_LOOKS):  # what is not gone yet may still make files
                os.killpg(group, signal.SIGKILL)
                time.sleep(_LOOK_S)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
