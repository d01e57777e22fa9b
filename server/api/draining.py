"""Ending calls so that each caller gets its answer or UNAVAILABLE.

gRPC's own shutdown does not: calls that have arrived and wait to be taken up, and those that arrive while it says
goodbye, end with CANCELLED (grpc/grpc#41785), which to a caller means its own doing and is not worth another try. So
before gRPC is stopped, its listeners are closed and its connections are hung up: what had no answer by then ends with
UNAVAILABLE, and a client connects elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio

from server.errors import DrainingError


class Calls:
    """Counts the calls that were taken up; takes no more once `draining`. Belongs to one event loop."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self._changed = asyncio.Event()

    def take(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Take a call up; it is in flight until its answer has left. Raises DrainingError."""
        self.check()
        self.in_flight += 1
        context.add_done_callback(self._ended)  # type: ignore[arg-type]  # its type is of no function

    def check(self) -> None:
        """Raise DrainingError once no more is taken."""
        if self.draining:
            raise DrainingError("the server is shutting down; another replica can answer")

    async def drain(self, within_s: float, hurry: asyncio.Event | None = None) -> None:
        """Take no more, and wait until nothing is in flight, for so long at most.

        Args:
            within_s: how long calls in flight may take.
            hurry: ends the wait.
        """
        self.draining = True
        waits = [asyncio.ensure_future(self.ended()), asyncio.ensure_future((hurry or asyncio.Event()).wait())]
        await asyncio.wait(waits, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def ended(self) -> None:
        """Wait until nothing is in flight."""
        while self.in_flight:
            self._changed.clear()
            await self._changed.wait()

    def _ended(self, _: object) -> None:
        self.in_flight -= 1
        self._changed.set()


def hang_up(name: int | str) -> None:
    """Close this process's listeners of a name, and send the end of every connection that they accepted.

    What was written before still arrives. gRPC hands out no sockets, so they are found among the open descriptors.

    Args:
        name: a TCP port, or the path of a Unix socket, which is removed.

    Raises:
        OSError: the system does not tell the open descriptors.
    """
    if isinstance(name, str):  # while it is ours: a successor may make its own once ours refuses
        Path(name).unlink(missing_ok=True)
    # Listeners first, as a client that is hung up comes back at once. Each is replaced: gRPC would log the failure of
    # one that was shut down.
    with Path(os.devnull).open("rb") as nowhere:
        for number, own in _sockets(name):
            if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                os.dup2(nowhere.fileno(), number, inheritable=False)
    for _, own in _sockets(name):
        # One way only: what clients send is still read, so that no reset takes what is on its way to them.
        with contextlib.suppress(OSError):  # the client was first
            own.shutdown(socket.SHUT_WR)


def _sockets(name: int | str) -> Iterator[tuple[int, socket.socket]]:
    """Yield the open descriptors that are sockets of a name, each with a socket of our own on what it is."""
    for entry in os.listdir("/dev/fd"):  # noqa: PTH208 - numbers, not files
        number = int(entry)
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            own = socket.socket(fileno=os.dup(number))
        except OSError:  # closed meanwhile
            continue
        with own:
            if _name(own) == name:
                yield number, own


def _name(own: socket.socket) -> int | str | None:
    """Return the port or the path that a socket is bound to."""
    try:
        match own.family:
            case socket.AF_INET | socket.AF_INET6 if own.type == socket.SOCK_STREAM:
                return int(own.getsockname()[1])
            case socket.AF_UNIX:
                return str(own.getsockname())
    except OSError:  # its other end is gone
        return None
    return None
