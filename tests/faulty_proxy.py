"""A TCP proxy with faults that a test switches on and off: delays, silence and refused connections."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

from tests.tcp_server import TcpServer


class FaultyProxy:
    """Forwards connections to a port on loopback.

    Attributes:
        delay_s: delays answers by this many seconds.
        silent: reads all bytes but passes none on, like a half-open connection.
        refusing: cuts all connections, and closes new ones at once.
        connections: number of connections accepted so far.
    """

    def __init__(self, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self._target_port = target_port
        self._tls = tls
        self._server = TcpServer(self._handle)
        self.delay_s = 0.0
        self.silent = False
        self._refusing = False

    @property
    def connections(self) -> int:
        return self._server.connections

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def refusing(self) -> bool:
        return self._refusing

    @refusing.setter
    def refusing(self, refusing: bool) -> None:
        self._refusing = refusing
        if refusing:
            self._server.cut()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            return
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            return
        try:
            await asyncio.gather(self._pump(reader, to_writer, 0.0), self._pump(to_reader, writer, None))
        finally:
            to_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float | None) -> None:
        with contextlib.suppress(ConnectionError):
            while content := await reader.read(1 << 16):
                await asyncio.sleep(self.delay_s if delay_s is None else delay_s)
                if not self.silent:
                    writer.write(content)
                    await writer.drain()
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FaultyProxy]:
        await self._server.start(self._tls)
        try:
            yield self
        finally:
            await self._server.stop()
