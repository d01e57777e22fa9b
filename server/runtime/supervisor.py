"""Background work that never ends silently: what fails is logged, counted, shown, and started again after a pause."""

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
    """Start a loop again at this time, on the policy's clock."""

    time_s: float


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a loop that failed waits: twice as long each time, until it ran well for a while. Pure.

    Attributes:
        first_s, longest_s: the first pause, and the longest.
        well_s: a loop that ran so long begins with the first pause again.
    """

    first_s: float = 0.1
    longest_s: float = 30.0
    well_s: float = 60.0

    def after_failure(self, failures_in_a_row: int, started_s: float, now_s: float) -> tuple[int, RestartAt]:
        """Return the failures in a row, with this one, and when to start again."""
        row = 1 if now_s - started_s >= self.well_s else failures_in_a_row + 1
        doublings = min(row - 1, 32)
        return row, RestartAt(now_s + min(self.longest_s, self.first_s * 2**doublings))


@dataclass(slots=True)
class Background:
    """Background work of one name: a loop that goes on for ever, or tasks that come and go.

    Attributes:
        state: `waiting` is the pause after a failure.
        last_error: the type of what failed last; its message may hold what strangers must not read.
        failed_at_s: when, on the supervisor's clock.
    """

    name: str
    state: Literal["running", "waiting", "idle", "ended"]
    restarts: int = 0
    failures: int = 0
    last_error: str = ""
    failed_at_s: float = float("-inf")


class Supervisor:
    """Runs a server's background work. `thread` may be called from any thread, the rest belongs to one event loop."""

    def __init__(self, backoff: Backoff | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._backoff = backoff or Backoff()
        self._clock = clock
        self._known: dict[str, Background] = {}
        self._closing = threading.Event()

    @property
    def background(self) -> list[Background]:
        """All work that was ever begun, by name."""
        return sorted(self._known.values(), key=lambda one: one.name)

    def close(self) -> None:
        """Start no thread again that fails from now on."""
        self._closing.set()

    def lines(self) -> list[str]:
        """Describe every loop for `/healthz`, a line each."""
        now_s = self._clock()
        return [
            f"{one.name}: {one.state}, failures {one.failures}, restarts {one.restarts}"
            + (f", last {one.last_error} {now_s - one.failed_at_s:.0f} s ago" if one.last_error else "")
            for one in self.background
        ]

    async def loop(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a loop until it returns or is cancelled; when it raises, pause and run it again."""
        one, row = self._begun(name), 0
        try:
            while True:
                one.state, started_s = "running", self._clock()
                try:
                    await work()
                    return
                except Exception as error:  # noqa: BLE001 - the boundary: a bug must not end what heals the server
                    row, restart = self._backoff.after_failure(row, started_s, self._clock())
                    self._failed(one, error, restart)
                await asyncio.sleep(restart.time_s - self._clock())
                one.restarts += 1
        finally:
            one.state = "ended"

    async def task(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run work that is done once; when it raises, that is noted here and goes no further."""
        one = self._begun(name, "idle")
        one.state = "running"
        try:
            await work
        except Exception as error:  # noqa: BLE001 - the boundary, as above
            self._failed(one, error, None)
        finally:
            one.state = "idle"

    def thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Return a thread, not started yet, that runs a loop until it returns; when it raises, it runs again.

        It is a daemon: what hangs in it does not keep the process from ending.
        """

        def run() -> None:
            one, row = self._begun(name), 0
            while True:
                one.state, started_s = "running", self._clock()
                try:
                    work()
                    break
                except BaseException as error:  # noqa: BLE001 - SystemExit, too, would end a thread without a word
                    row, restart = self._backoff.after_failure(row, started_s, self._clock())
                    self._failed(one, error, restart)
                if self._closing.wait(max(0.0, restart.time_s - self._clock())):
                    break
                one.restarts += 1
            one.state = "ended"

        return threading.Thread(target=run, name=name, daemon=True)

    def catch_strays(self, loop: asyncio.AbstractEventLoop) -> None:
        """Note what fails in callbacks and tasks of an event loop that nobody else looks after."""

        def failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            error = context.get("exception")
            if isinstance(error, Exception):
                self.note("event-loop", error)
            else:
                loop.default_exception_handler(context)

        self._begun("event-loop")
        loop.set_exception_handler(failed)

    def note(self, name: str, error: Exception) -> None:
        """Note a failure of work that is done by others."""
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
