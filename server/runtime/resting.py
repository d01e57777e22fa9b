"""Lets the event loop rest while it could only interrupt, so that it does the work of several requests in one turn.

A turn of the loop begins on processor caches that the engine has just filled: the first request of a turn costs two to
three times as much as those after it. While every engine stream has work ahead, no turn can start a run earlier.
Network cards and kernels do the same with interrupts (interrupt moderation).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

#: The longest rest: about three requests gather at 1,500 requests per second, and answers lose at most that much time.
_LONGEST_S = 0.002
#: A shorter rest gains less than it costs.
_SHORTEST_S = 0.0002


class Rest:
    """The rests of one event loop. Everything that the loop does waits meanwhile."""

    def __init__(self, count: Callable[[float], None]) -> None:
        """Create it; `count` is called with the seconds of each rest."""
        self._count = count
        self._due_s: float | None = None

    def after_this_turn(self, seconds: float) -> None:
        """Rest once, after what is ready now was done and written, for the time last asked for, 2 ms at most."""
        if seconds < _SHORTEST_S:
            return
        if self._due_s is None:
            loop = asyncio.get_running_loop()
            # Called from the next turn, so that this one's answers are on their way.
            loop.call_soon(loop.call_soon, self._rest)
        self._due_s = min(seconds, _LONGEST_S)

    def _rest(self) -> None:
        seconds, self._due_s = self._due_s or 0.0, None
        self._count(seconds)
        time.sleep(seconds)
