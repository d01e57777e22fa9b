"""Polls the model store for the newest history entry of a model; keeps the last entry when a read fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import structlog

from model_store.registry.history import HistoryEntry
from model_store.registry.objects import ModelStoreError
from model_store.registry.store import ModelStore
from server.config_sections import SwapConfig
from server.runtime.supervisor import Supervisor
from server.runtime.worker import Worker

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

#: When the server stops, how long a read of the store has to finish.
_CLOSE_S = 1.0


class NewestEntry:
    """Polls the model store for one model. Belongs to one event loop.

    Attributes:
        entry: the newest entry that was read; None while the store has none.
        read_s: when the store was last read, on `clock`.
        failure: why the last read failed; empty if it succeeded.
    """

    def __init__(
        self,
        store: ModelStore,
        model: str,
        swap: SwapConfig,
        supervisor: Supervisor,
        failed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store the parts; nothing is read yet.

        Args:
            store: the model store to read.
            model: the model's name.
            swap: the polling interval, and the time limit of a read.
            supervisor: watches the thread that reads.
            failed: called after each failed read.
            clock: seconds, monotonic.
        """
        self._store = store
        self._model = model
        self._swap = swap
        self._failed = failed
        self._clock = clock
        self._worker = Worker("model-store", supervisor)
        self._wake = asyncio.Event()
        self.entry: HistoryEntry | None = None
        self.read_s = float("-inf")
        self.failure = ""

    @property
    def labels(self) -> Mapping[str, int]:
        """The version of each label."""
        return self.entry.state.labels if self.entry else {}

    @property
    def traffic(self) -> Mapping[str, Mapping[str, float]]:
        """For each surface, the share of traffic of each label."""
        return self.entry.state.traffic if self.entry else {}

    async def read(self) -> bool:
        """Read the newest entry; return whether it changed. Raises ModelStoreError."""
        entry = await self._worker.ask(self._swap.store_timeout_s, self._store.head, self._model)
        self.read_s = self._clock()
        if entry is None or entry == self.entry:
            return False
        self.entry = entry
        return True

    async def poll(self) -> bool:
        """Read the newest entry if it is due; return whether it changed. A failed read changes nothing."""
        if not self._wake.is_set() and self._clock() - self.read_s < self._swap.poll_s:
            return False
        self._wake.clear()
        try:
            changed = await self.read()
        except ModelStoreError as error:
            if not self.failure:
                _log.warning("model_store_failed", reason=str(error))
            self.failure = str(error)
            self._failed()
            return False
        if self.failure:
            _log.info("model_store_back")
        self.failure = ""
        return changed

    def poll_now(self) -> None:
        """Make the next `poll` read the store, and end `wait`."""
        self._wake.set()

    async def wait(self, at_most_s: float) -> None:
        """Wait until `poll_now` is called, but at most this long."""
        try:
            async with asyncio.timeout(at_most_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def ask(self, limit_s: float, work: Callable[..., _T], *arguments: object) -> _T:
        """Do other work with the store on the same thread. Raises ModelStoreError, or what the work raises."""
        return await self._worker.ask(limit_s, work, *arguments)

    async def close(self) -> None:
        await self._worker.close(_CLOSE_S)
