"""A server that speaks Redis's protocol and answers what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Self

from feature_client.stores.redis.resp import Incomplete, ReplyReader
from feature_client.stores.redis.slots import SLOTS

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


def layout(*ports: int, host: bytes = b"127.0.0.1") -> bytes:
    """Answer CLUSTER SLOTS with primaries at these ports, which share the slots evenly in this order."""
    bounds = [SLOTS * i // len(ports) for i in range(len(ports) + 1)]
    return array(*(
        array(b":%d\r\n" % start, b":%d\r\n" % (stop - 1), array(bulk(host), b":%d\r\n" % port))
        for port, start, stop in zip(ports, bounds[:-1], bounds[1:], strict=True)
    ))  # fmt: skip


def honest(values: Mapping[bytes, bytes]) -> Answer:
    """Answer as a Redis that holds these values and takes writes without keeping them."""

    def answer(command: list[bytes]) -> bytes | None:
        match command:
            case [b"MGET", *keys]:
                return array(*(b"$-1\r\n" if (value := values.get(key)) is None else bulk(value) for key in keys))
        return None

    return answer


def echoing_error(command: list[bytes]) -> bytes:
    """Refuse a command as Redis does one that it does not know: with all that stood in it."""
    arguments = b" ".join(b"'" + word + b"'" for word in command[1:])
    said = b"-ERR unknown command '" + command[0] + b"', with args beginning with: " + arguments
    return said.replace(b"\r", b" ").replace(b"\n", b" ") + b"\r\n"


def echo(command: list[bytes]) -> bytes:
    """Send back what came, which is no reply at all."""
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
