"""Handles the signals that end a server: it drains on SIGTERM, SIGINT (Ctrl-C) and SIGHUP (its terminal closed).

A second SIGINT comes from a person who does not want to wait, and ends the drain early. A second SIGTERM does not:
supervisors send it to every process of a group, and the parent of several servers also passes it on.
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
    """The requests to end that signals have made so far.

    Attributes:
        asked: set once the server should drain and end.
        hurried: set once the server should end without waiting for calls in flight.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def heard(self, number: int) -> None:
        if number == signal.SIGINT and self.asked.is_set():
            self.hurried.set()
        self.asked.set()


def ending_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a server; without SIGHUP under nohup, which makes processes ignore it."""
    return tuple(n for n in _ENDING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


def end_on_signals() -> None:
    """Exit on these signals until a server handles them; process 1 of a container would ignore them by default."""
    for number in ending_signals():
        signal.signal(number, lambda *_: sys.exit(0))


def heed_signals(loop: asyncio.AbstractEventLoop, limit_s: float) -> Ending:
    """Handle the ending signals on an event loop; force the process to exit `limit_s` seconds after the first one."""
    ending = Ending()

    def heard(number: int) -> None:
        if not ending.asked.is_set():
            exit_within(limit_s)
        ending.heard(number)

    for number in ending_signals():
        loop.add_signal_handler(number, heard, number)
    return ending


def exit_within(limit_s: float) -> None:
    """Force this process to exit after `limit_s` seconds, even if a thread hangs in a call that never returns."""

    def end() -> None:
        _log.error("exit_forced", after_s=limit_s, threads=sorted(thread.name for thread in threading.enumerate()))
        os._exit(1)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
