"""A server that speaks Redis's protocol and answers what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self

from feature_client.resp import Incomplete, ReplyReader

#: From a command, its name and arguments, to the bytes of its answer; None answers as an empty Redis would.
Answer = Callable[[list[bytes]], bytes | None]


class ScriptedRedis:
    """Answers commands one after the other.

    Attributes:
        answer: what is sent for a command.
        greeting: sent before anything was asked.
        pause_s: between the bytes of an answer; None sends it whole.
        commands: that came.
        asked_on: by command, the number of the connection that it came on.
        connections: accepted since the start.
    """

    def __init__(self, answer: Answer = lambda _: None) -> None:
        self.answer = answer
        self.greeting = b""
        self.pause_s: float | None = None
        self.commands: list[list[bytes]] = []
        self.asked_on: list[int] = []
        self.connections = 0
        self.port = 0
        self._server: asyncio.Server
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._track, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Cut all connections and take none."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks)

    async def _track(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            with contextlib.suppress(ConnectionError):
                await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        own_number = self.connections
        writer.write(self.greeting)
        commands = ReplyReader(ValueError)  # a command is written as an array of values
        while content := await reader.read(1 << 16):
            commands.feed(content)
            while (command := commands.take()) is not Incomplete.INCOMPLETE:
                self.commands.append(command)
                self.asked_on.append(own_number)
                answer = self.answer(command)
                await self._send(writer, like_redis(command) if answer is None else answer)

    async def _send(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        if self.pause_s is None:
            writer.write(answer)
        else:
            for i in range(len(answer)):
                if writer.is_closing():
                    return
                writer.write(answer[i : i + 1])
                await asyncio.sleep(self.pause_s)
        await writer.drain()


def like_redis(command: list[bytes]) -> bytes:
    """What an empty Redis answers."""
    match command:
        case [b"PING", number]:
            return bulk(number)
        case [b"PING"]:
            return b"+PONG\r\n"
        case [b"MGET", *keys]:
            return array(*(b"$-1\r\n" for _ in keys))
        case [b"GET", _]:
            return b"$-1\r\n"
        case [b"EVAL", *_]:
            return b":1\r\n"
        case [b"XREADGROUP", *_]:
            return b"*-1\r\n"
        case [b"XAUTOCLAIM", *_]:
            return array(bulk(b"0-0"), array())
        case [b"XACK" | b"XTRIM", *_]:
            return b":0\r\n"
        case [b"XINFO", *_]:
            return array()
    return b"+OK\r\n"


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def array(*elements: bytes) -> bytes:
    return b"*%d\r\n" % len(elements) + b"".join(elements)
