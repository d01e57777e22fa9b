"""What ends a server: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (its terminal closed) have it drain.

A second SIGINT, of a person who has no patience, cuts the draining short. A second SIGTERM does not: supervisors send
it to every process of a group, and the parent of several servers passes it on too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

import structlog

_log = structlog.get_logger(__name__)

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Ending:
    """What signals asked for so far.

    Attributes:
        asked: to end.
        hurried: to wait for nothing.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def heard(self, number: int) -> None:
        if number == signal.SIGINT and self.asked.is_set():
            self.hurried.set()
        self.asked.set()


def ending_signals() -> tuple[signal.Signals, ...]:
    """Return the signals to heed; not SIGHUP under nohup, which has it ignored."""
    return tuple(n for n in _ENDING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


def end_on_signals() -> None:
    """Let an ending signal end the process until a server heeds them: process 1 of a container would ignore it."""
    for number in ending_signals():
        signal.signal(number, lambda *_: sys.exit(0))


def heed_signals(loop: asyncio.AbstractEventLoop, limit_s: float) -> Ending:
    """Take the ending signals on an event loop from now on; so long after the first, the process ends anyway."""
    ending = Ending()

    def heard(number: int) -> None:
        if not ending.asked.is_set():
            exit_within(limit_s)
        ending.heard(number)

    for number in ending_signals():
        loop.add_signal_handler(number, heard, number)
    return ending


def exit_within(limit_s: float) -> None:
    """End this process after so long at the latest, also where a thread hangs in a call that never returns."""

    def end() -> None:
        _log.error("exit_forced", after_s=limit_s, threads=sorted(thread.name for thread in threading.enumerate()))
        os._exit(1)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
