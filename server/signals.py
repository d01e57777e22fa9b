"""What ends a server: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (its terminal closed) have it drain.

A second SIGINT, of a person who has no patience, cuts the draining short. A second SIGTERM does not: supervisors send
it to every process of a group, and the parent of several servers passes it on too.
"""

from __future__ import annotations

import asyncio
import signal
import sys

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


def heed_signals(loop: asyncio.AbstractEventLoop) -> Ending:
    """Take the ending signals on an event loop from now on."""
    ending = Ending()
    for number in ending_signals():
        loop.add_signal_handler(number, ending.heard, number)
    return ending
