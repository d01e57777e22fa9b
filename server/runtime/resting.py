"""Lets the event loop rest while it could only interrupt, so that it does the work of several requests in one turn.

A turn of the loop begins on processor caches that the engine has just filled: the first request of a turn costs two to
three times as much as those after it. While every engine stream has work ahead, no turn can start a run earlier.
Network cards and kernels do the same with interrupts (interrupt moderation).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

#: The longest rest. Answers and refusals lose as much time at most.
_LONGEST_S = 0.002
#: A shorter rest gains less than it costs.
_SHORTEST_S = 0.0002
_RESTLESS_S = 0.1


class Rest:
    """The rests of one event loop. Everything that the loop does waits meanwhile."""

    def __init__(self, count: Callable[[float], None]) -> None:
        """Create it; `count` is called with the seconds of each rest."""
        self._count = count
        self._due_s = 0.0
        self._is_called = False
        self._restless_until_s = 0.0

    def not_now(self) -> None:
        """Do not rest for a while: what was refused is to be told at once, and so is what is refused next."""
        self._restless_until_s = time.monotonic() + _RESTLESS_S
        self._due_s = 0.0

    def after_this_turn(self, seconds: float) -> None:
        """Rest once, after what is ready now was done and written, for the time last asked for, 2 ms at most."""
        if seconds < _SHORTEST_S or time.monotonic() < self._restless_until_s:
            return
        if not self._is_called:
            self._is_called, loop = True, asyncio.get_running_loop()
            # Called from the next turn, so that this one's answers are on their way.
            loop.call_soon(loop.call_soon, self._rest)
        self._due_s = min(seconds, _LONGEST_S)

    def _rest(self) -> None:
        seconds, self._due_s, self._is_called = self._due_s, 0.0, False
        if seconds:
            self._count(seconds)
            time.sleep(seconds)
