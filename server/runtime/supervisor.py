"""Runs background loops and tasks; a failure is logged, counted and shown on `/healthz`, and loops restart."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

import structlog

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RestartAt:
    """Restart a loop at this time, on the clock that the policy was called with."""

    time_s: float


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff: the pause before a failed loop's restart doubles with each failure in a row. Pure.

    Attributes:
        first_s: the pause after the first failure.
        longest_s: the longest pause.
        well_s: a loop that ran this long before it failed starts over with the first pause.
    """

    first_s: float = 0.1
    longest_s: float = 30.0
    well_s: float = 60.0

    def after_failure(self, failures_in_a_row: int, started_s: float, now_s: float) -> tuple[int, RestartAt]:
        """Return the number of failures in a row, including this one, and when to restart."""
        row = 1 if now_s - started_s >= self.well_s else failures_in_a_row + 1
        doublings = min(row - 1, 32)
        return row, RestartAt(now_s + min(self.longest_s, self.first_s * 2**doublings))


@dataclass(slots=True)
class Background:
    """The state of background work: of a loop that runs until the server stops, or of short tasks with the same name.

    Attributes:
        state: `waiting` means the pause before a restart.
        last_error: the type of the last error, without its message, which may contain users' data.
        failed_at_s: time of the last error, on the supervisor's clock.
    """

    name: str
    state: Literal["running", "waiting", "idle", "ended"]
    restarts: int = 0
    failures: int = 0
    last_error: str = ""
    failed_at_s: float = float("-inf")


class Supervisor:
    """Runs a server's background work. Call `thread` from any thread, everything else on one event loop."""

    def __init__(self, backoff: Backoff | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._backoff = backoff or Backoff()
        self._clock = clock
        self._known: dict[str, Background] = {}
        self._closing = threading.Event()

    @property
    def background(self) -> list[Background]:
        """All background work that was ever started, sorted by name."""
        return sorted(self._known.values(), key=lambda one: one.name)

    def close(self) -> None:
        """Stop restarting threads that fail."""
        self._closing.set()

    def lines(self) -> list[str]:
        """Describe all background work for `/healthz`, one line each."""
        now_s = self._clock()
        return [
            f"{one.name}: {one.state}, failures {one.failures}, restarts {one.restarts}"
            + (f", last {one.last_error} {now_s - one.failed_at_s:.0f} s ago" if one.last_error else "")
            for one in self.background
        ]

    async def loop(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a loop until it returns or is cancelled; if it raises, restart it after a pause."""
        one, row = self._begun(name), 0
        try:
            while True:
                one.state, started_s = "running", self._clock()
                try:
                    await work()
                    return
                except Exception as error:  # noqa: BLE001 - the boundary: a bug must not end a background loop
                    row, restart = self._backoff.after_failure(row, started_s, self._clock())
                    self._failed(one, error, restart)
                await asyncio.sleep(restart.time_s - self._clock())
                one.restarts += 1
        finally:
            one.state = "ended"

    async def task(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run a task once; if it raises, record the failure instead of raising it."""
        one = self._begun(name, "idle")
        one.state = "running"
        try:
            await work
        except Exception as error:  # noqa: BLE001 - the boundary, as above
            self._failed(one, error, None)
        finally:
            one.state = "idle"

    def thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Return a thread, not started yet, that runs a loop until it returns; if it raises, it restarts after a pause.

        The thread is a daemon: even if it hangs, the process can end.
        """

        def run() -> None:
            one, row = self._begun(name), 0
            while True:
                one.state, started_s = "running", self._clock()
                try:
                    work()
                    break
                except BaseException as error:  # noqa: BLE001 - SystemExit, too, would end a thread silently
                    row, restart = self._backoff.after_failure(row, started_s, self._clock())
                    self._failed(one, error, restart)
                if self._closing.wait(max(0.0, restart.time_s - self._clock())):
                    break
                one.restarts += 1
            one.state = "ended"

        return threading.Thread(target=run, name=name, daemon=True)

    def catch_strays(self, loop: asyncio.AbstractEventLoop) -> None:
        """Record exceptions in an event loop's callbacks and tasks that nothing else handles."""

        def failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            error = context.get("exception")
            if isinstance(error, Exception):
                self.note("event-loop", error)
            else:
                loop.default_exception_handler(context)

        self._begun("event-loop")
        loop.set_exception_handler(failed)

    def note(self, name: str, error: Exception) -> None:
        """Record a failure of work that the supervisor does not run itself."""
        self._failed(self._begun(name, "idle"), error, None)

    def _begun(self, name: str, state: Literal["running", "idle"] = "running") -> Background:
        return self._known.setdefault(name, Background(name, state))

    def _failed(self, one: Background, error: BaseException, restart: RestartAt | None) -> None:
        one.failures += 1
        one.last_error, one.failed_at_s = type(error).__name__, self._clock()
        pause_s = None
        if restart is not None:
            one.state, pause_s = "waiting", round(restart.time_s - self._clock(), 3)
        _log.error("background_failed", name=one.name, failures=one.failures, restart_in_s=pause_s, exc_info=error)
