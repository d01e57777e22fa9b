"""Drains a server: every caller gets its answer or UNAVAILABLE.

gRPC's own shutdown does not guarantee this. Calls that no handler has accepted yet, and calls that arrive during the
shutdown, end with CANCELLED (grpc/grpc#41785). Clients take that for their own cancellation and do not retry. So before
gRPC stops, we close its listeners and shut down its connections: unanswered calls then end with UNAVAILABLE, and
clients connect to another server.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from server.errors import DrainingError


class Calls:
    """Counts the calls in flight, and refuses new ones once `draining` is set. Belongs to one event loop."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self._changed = asyncio.Event()

    def take(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Count a call as in flight until its answer has been sent. Raises DrainingError."""
        self.check()
        self.in_flight += 1
        context.add_done_callback(self._ended)  # type: ignore[arg-type]  # grpc's type stub is wrong here

    def check(self) -> None:
        """Raise DrainingError if the server accepts no more calls."""
        if self.draining:
            raise DrainingError("the server is shutting down; retry on another replica")

    async def drain(self, within_s: float, hurry: asyncio.Event | None = None) -> None:
        """Refuse new calls, and wait for the calls in flight.

        Args:
            within_s: maximum wait, in seconds.
            hurry: ends the wait early when it is set.
        """
        self.draining = True
        waits = [asyncio.ensure_future(self.ended()), asyncio.ensure_future((hurry or asyncio.Event()).wait())]
        await asyncio.wait(waits, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def ended(self) -> None:
        """Wait until no call is in flight."""
        while self.in_flight:
            self._changed.clear()
            await self._changed.wait()

    def _ended(self, _: object) -> None:
        self.in_flight -= 1
        self._changed.set()
