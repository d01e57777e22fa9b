"""Loads new model versions on a background thread that leaves processor time to requests."""

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

#: The interpreter's thread switch interval while a version loads; its default of 5 ms would slow requests noticeably.
_SWITCH_S = 0.0005
#: When the server stops, how long the work in progress has to finish.
_CLOSE_S = 10.0


class Loader:
    """Runs one job after another and pauses after each. Belongs to one event loop, except `pause`."""

    def __init__(self, pace: Pace, cpu_share: float, recent: RecentRequests, supervisor: Supervisor) -> None:
        """Store the parts; the thread starts with the first job.

        Args:
            pace: computes the pauses and sleeps.
            cpu_share: the fraction of one core to use while the server answers requests.
            recent: tells whether the server has answered requests.
            supervisor: watches the thread.
        """
        self._pace = pace
        self._cpu_share = cpu_share
        self._recent = recent
        self._worker = Worker("model-loader", supervisor)
        #: The thread's processor time at its last pause, in seconds.
        self._paused_at_s = 0.0

    @property
    def share(self) -> float:
        """The fraction of one core to use: all of it until the first request was answered."""
        return self._cpu_share if self._recent.seen else 1.0

    async def do(self, work: Callable[..., _T], *arguments: object) -> _T:
        """Run work on the thread, and return its result."""
        return await self._worker.do(self._run, work, *arguments)

    async def ask(self, limit_s: float, work: Callable[..., _T], *arguments: object) -> _T:
        """Call the model store on the thread. Raises ModelStoreError when that takes longer than `limit_s`."""
        return await self._worker.ask(limit_s, self._run, work, *arguments)

    def pause(self) -> None:
        """Sleep for as long as the share demands after the work so far. Call it on the thread."""
        self._pace.pause(time.thread_time() - self._paused_at_s, self.share)
        self._paused_at_s = time.thread_time()

    async def close(self) -> None:
        await self._worker.close(_CLOSE_S)

    def _run(self, work: Callable[..., _T], *arguments: object) -> _T:
        """Run work with a short thread switch interval, so that Python's other threads wait less; then pause."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._paused_at_s = time.thread_time()
        try:
            return work(*arguments)
        finally:
            sys.setswitchinterval(before)
            self.pause()
