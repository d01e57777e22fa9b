"""A call within a time limit that is sent a second time when it takes unusually long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

_Result = TypeVar("_Result")


class HedgedCall(Generic[_Result]):
    """One call. Its first attempt runs in the caller's task; a second one, if it is needed, in a task of its own.

    A usual call makes no task and one timer. The timer, and a second attempt that was faster, end the first attempt as
    `asyncio.timeout` ends its body: they cancel the caller's task, and `run` turns that cancellation into the result.
    """

    def __init__(
        self,
        send: Callable[[], Coroutine[Any, Any, _Result]],
        budget_s: float,
        slow_s: float,
        may_hedge: Callable[[], bool],
    ) -> None:
        """Prepare a call.

        Args:
            send: makes one attempt. Cancelling it must be safe.
            budget_s: the time limit of the call.
            slow_s: after which time a second attempt is made; infinity makes none.
            may_hedge: whether a second attempt may be made; asked when the time has come.
        """
        self._send, self._may_hedge = send, may_hedge
        self._loop = asyncio.get_running_loop()
        start_s = self._loop.time()
        self._ends_s = start_s + budget_s
        self._slow_at_s = start_s + slow_s
        self._second: asyncio.Task[_Result] | None = None
        #: The caller's task while the first attempt can be ended.
        self._caller: asyncio.Task[Any] | None = None
        self._ended = False

    async def run(self) -> _Result:
        """Return the result of the attempt that succeeds first.

        Raises:
            TimeoutError: the time limit has passed.
            Exception: all attempts failed.
        """
        caller = self._caller = asyncio.current_task()
        assert caller is not None, "coroutines run in tasks"  # noqa: S101
        cancelling = caller.cancelling()
        if self._slow_at_s < self._ends_s:
            self._timer = self._loop.call_at(self._slow_at_s, self._slow)
        else:
            self._timer = self._loop.call_at(self._ends_s, self._end_first)
        try:
            try:
                return await self._send()
            except Exception:
                if self._second is None or _failed(self._second):
                    raise
                return await asyncio.shield(self._second)
        except asyncio.CancelledError:
            if not self._ended or caller.cancelling() > cancelling + 1:  # the caller is cancelled by others too
                raise
            if self._second is not None and self._second.done() and not _failed(self._second):
                return self._second.result()
            raise TimeoutError from None
        finally:
            if self._ended:
                caller.uncancel()
            self._caller = None
            self._timer.cancel()
            if self._second is not None:
                self._second.cancel()

    def _slow(self) -> None:
        """Make a second attempt, unless there were too many."""
        self._timer = self._loop.call_at(self._ends_s, self._end_first)
        if self._may_hedge():
            self._second = self._loop.create_task(self._send())
            self._second.add_done_callback(self._land)

    def _land(self, second: asyncio.Task[_Result]) -> None:
        if not _failed(second):
            self._end_first()

    def _end_first(self) -> None:
        if self._caller is not None and not self._ended:
            self._ended = True
            self._caller.cancel()


def _failed(attempt: asyncio.Task[_Result]) -> bool:
    """Return whether an attempt ended without a result."""
    return attempt.done() and (attempt.cancelled() or attempt.exception() is not None)
