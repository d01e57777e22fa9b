"""A TCP proxy with faults that a test switches on and off: delays, silence and refused connections."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator


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
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.delay_s = 0.0
        self.silent = False
        self.connections = 0
        self.port = 0
        self._refusing = False

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
            for writer in self._writers:
                writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            writer.transport.abort()
            return
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, to_writer}
        try:
            await asyncio.gather(self._pump(reader, to_writer, 0.0), self._pump(to_reader, writer, None))
        finally:
            for end in (writer, to_writer):
                self._writers.discard(end)
                end.transport.abort()

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
        server = await asyncio.start_server(self._track, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.refusing = True
            await asyncio.gather(*self._tasks)

    async def _track(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._accept(reader, writer)
        finally:
            self._tasks.discard(task)
