"""Runs blocking jobs for an event loop on one thread; a job that hangs (a lost network volume) blocks no other work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import structlog

from model_store.registry.objects import ModelStoreError
from server.runtime.supervisor import Supervisor

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")


class Worker:
    """Runs jobs one after the other on a daemon thread. Belongs to one event loop."""

    def __init__(self, name: str, supervisor: Supervisor) -> None:
        self._name = name
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = supervisor.thread(name, self._run)

    async def do(self, work: Callable[..., _T], *arguments: object) -> _T:
        """Run a job and return its result; if the caller is cancelled before the job starts, it does not run."""
        if not self._thread.ident:
            self._thread.start()
        outcome: Future[_T] = Future()
        self._jobs.put((outcome, partial(work, *arguments)))
        return await asyncio.wrap_future(outcome)

    async def ask(self, limit_s: float, work: Callable[..., _T], *arguments: object) -> _T:
        """Run a job that uses the model store.

        Raises:
            ModelStoreError: the job did not end within `limit_s` seconds. Errors of the job itself pass through.
        """
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await self.do(work, *arguments)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ModelStoreError(
                f"the model store has not answered for {limit_s:g} s; is its volume or bucket available?"
            ) from error

    async def close(self, limit_s: float) -> None:
        """Wait at most `limit_s` seconds for the jobs to end; after that, abandon the thread."""
        self._jobs.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, limit_s)
        if self._thread.is_alive():
            _log.warning("thread_left_behind", name=self._name, after_s=limit_s)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            outcome, work = job
            if not outcome.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                outcome.set_exception(error)
            else:
                outcome.set_result(result)
