"""A TCP server for scripted peers, of which no connection outlives it, not even one accepted just before its end."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

#: Time for handlers to end by themselves when their connections are cut.
_HANDLERS_S = 1.0
#: Turns of the event loop from the end of a connection to its closed socket.
_TURNS_TO_CLOSE = 4


class TcpServer:
    """Lets a function handle each connection to a free port on loopback.

    A server of asyncio's forgets sockets that it accepted just before it was closed, and handlers that were cancelled
    before they began. Here a connection is known from its accept to its end.

    Attributes:
        port: number of the port.
        connections: number of connections accepted so far.
    """

    def __init__(self, handle: Handle) -> None:
        self.port = 0
        self.connections = 0
        self._handle = handle
        self._listening: socket.socket
        self._tls: ssl.SSLContext | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._stopped = False

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(0)
        self.port = self._listening.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._listening, self._accept)

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def stop(self) -> None:
        """Cut all connections, accept no more, and end the handlers; raises what one of them raised."""
        if not self._stopped:
            self._stopped = True
            asyncio.get_running_loop().remove_reader(self._listening)
            self._listening.close()
        self.cut()
        if self._tasks:
            ended, left = await asyncio.wait(self._tasks, timeout=_HANDLERS_S)
            for one in left:  # they wait for somebody else than their client
                one.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            for one in ended:
                one.result()
        for _ in range(_TURNS_TO_CLOSE):
            await asyncio.sleep(0)

    def _accept(self) -> None:
        accepted, _ = self._listening.accept()
        self.connections += 1
        self._tasks.append(asyncio.ensure_future(self._serve(accepted)))

    async def _serve(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted, ssl=self._tls)
        except OSError:  # of a TLS handshake
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        self._writers.add(writer)
        try:
            if not self._stopped:
                await self._handle(reader, writer)
        finally:
            self._writers.discard(writer)
            writer.transport.abort()
