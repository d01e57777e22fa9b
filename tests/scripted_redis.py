"""A server that speaks Redis's protocol and sends the answers that a test scripts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Self

from feature_client.stores.redis.resp import Incomplete, ReplyReader
from feature_client.stores.redis.slots import SLOTS
from tests.tcp_server import TcpServer

#: Takes a command (its name and arguments) and returns the bytes of the answer; None answers as an empty Redis would.
Answer = Callable[[list[bytes]], bytes | None]


class ScriptedRedis:
    """Answers commands in the order in which they arrive.

    Attributes:
        answer: returns the answer to a command.
        greeting: bytes sent on a new connection, before any command.
        pause_s: pause between the bytes of an answer; None sends the answer whole.
        commands: all commands received.
        asked_on: for each command, the number of its connection.
        connections: number of connections accepted so far.
    """

    def __init__(self, answer: Answer = lambda _: None) -> None:
        self.answer = answer
        self.greeting = b""
        self.pause_s: float | None = None
        self.commands: list[list[bytes]] = []
        self.asked_on: list[int] = []
        self._server = TcpServer(self._handle)

    @property
    def connections(self) -> int:
        return self._server.connections

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Cut all connections, and accept no more."""
        await self._server.stop()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own_number = self.connections
        writer.write(self.greeting)
        commands = ReplyReader(ValueError)  # a command has the form of an array reply
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
    """Answer as an empty Redis does."""
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


def layout(*ports: int, host: bytes = b"127.0.0.1") -> bytes:
    """Return an answer to CLUSTER SLOTS: primaries at these ports share the slots evenly, in this order."""
    bounds = [SLOTS * i // len(ports) for i in range(len(ports) + 1)]
    return array(*(
        array(b":%d\r\n" % start, b":%d\r\n" % (stop - 1), array(bulk(host), b":%d\r\n" % port))
        for port, start, stop in zip(ports, bounds[:-1], bounds[1:], strict=True)
    ))  # fmt: skip


def honest(values: Mapping[bytes, bytes]) -> Answer:
    """Answer as a Redis that holds these values, and accepts writes but drops them."""

    def answer(command: list[bytes]) -> bytes | None:
        match command:
            case [b"MGET", *keys]:
                return array(*(b"$-1\r\n" if (value := values.get(key)) is None else bulk(value) for key in keys))
        return None

    return answer


def echoing_error(command: list[bytes]) -> bytes:
    """Refuse a command as Redis refuses an unknown one: with an error that quotes all of its arguments."""
    arguments = b" ".join(b"'" + word + b"'" for word in command[1:])
    error = b"-ERR unknown command '" + command[0] + b"', with args beginning with: " + arguments
    return error.replace(b"\r", b" ").replace(b"\n", b" ") + b"\r\n"


def echo(command: list[bytes]) -> bytes:
    """Send the command back, which is not a valid reply."""
    return b"?".join(command) + b"\r\n"


def wrong_type(_: list[bytes]) -> bytes:
    return b":7\r\n"


@contextlib.contextmanager
def on_a_thread(server: ScriptedRedis) -> Iterator[ScriptedRedis]:
    """Let a server answer on an event loop of its own, for tests that block theirs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
