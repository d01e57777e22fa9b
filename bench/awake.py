"""Keeping the processor cores of a virtual machine at work while something else is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SPIN = """
import os, sys, threading
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
while True:
    pass
"""


@contextmanager
def kept_awake() -> Iterator[None]:
    """Run one process per core that takes only time nobody else wants (SCHED_IDLE).

    A virtual core with nothing to do is taken from the machine and given back late: on the machines that these
    benchmarks run on, an echo's median goes from 1.5 to 20 ms because of it. A server's users have machines of their
    own, or busy ones. The spinners end with this process, whatever happens to it: their standard input closes.
    """
    command = [sys.executable, "-c", _SPIN]
    spinners = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
            assert spinner.stdin is not None  # noqa: S101 - asked for above
            spinner.stdin.close()
