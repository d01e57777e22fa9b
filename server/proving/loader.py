"""The thread that loads versions, which gives way to requests."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from server.proving.recent_requests import RecentRequests
from server.runtime.supervisor import Supervisor
from server.runtime.worker import Worker
from server.scheduling.pace import Pace

_T = TypeVar("_T")

#: How long another thread may be kept waiting by the one that loads: the interpreter's own 5 ms would be felt.
_SWITCH_S = 0.0005
#: For what is loaded to end when the server does.
_CLOSE_S = 10.0


class Loader:
    """Does one thing after the other and pauses after each. Belongs to one event loop, except for `pause`."""

    def __init__(self, pace: Pace, cpu_share: float, recent: RecentRequests, supervisor: Supervisor) -> None:
        """Remember.

        Args:
            pace: how long pauses are.
            cpu_share: the part of a core to take while requests are answered.
            recent: whether any are.
            supervisor: of the thread.
        """
        self._pace = pace
        self._cpu_share = cpu_share
        self._recent = recent
        self._worker = Worker("model-loader", supervisor)
        #: The thread's own time at its last pause.
        self._paused_at_s = 0.0

    @property
    def share(self) -> float:
        """The part of a core to take; at the start, when nothing is served yet, all of it."""
        return self._cpu_share if self._recent.seen else 1.0

    async def do(self, work: Callable[..., _T], *arguments: object) -> _T:
        """Do work on the thread."""
        return await self._worker.do(self._politely, work, *arguments)

    async def ask(self, limit_s: float, work: Callable[..., _T], *arguments: object) -> _T:
        """Ask the model store on the thread. Raises ModelStoreError when it takes longer."""
        return await self._worker.ask(limit_s, self._politely, work, *arguments)

    def pause(self) -> None:
        """On the thread: leave the processor to requests for as long as the share asks for."""
        self._pace.pause(time.thread_time() - self._paused_at_s, self.share)
        self._paused_at_s = time.thread_time()

    async def close(self) -> None:
        await self._worker.close(_CLOSE_S)

    def _politely(self, work: Callable[..., _T], *arguments: object) -> _T:
        """Do work of Python's without keeping other threads of Python's waiting, and leave them some time after it."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._paused_at_s = time.thread_time()
        try:
            return work(*arguments)
        finally:
            sys.setswitchinterval(before)
            self.pause()
