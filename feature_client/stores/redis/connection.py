"""One connection to a Redis server: redis-py's (names, TLS, passwords, options), read by our own bounded reader."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections.abc import Sequence
from typing import Any

import hiredis
import redis.asyncio as redis
from redis._parsers import BaseParser
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from feature_client.stores.redis.replies import Command, error_of, is_answer, meaning_of
from feature_client.stores.redis.resp import Incomplete, MalformedReplyError, Reply, ReplyReader

_READ_BYTES = 1 << 16
#: No two exchanges of any processes have the same number.
_exchanges = itertools.count(secrets.randbits(62))


class BoundedParser(BaseParser):
    """Stands in for redis-py's parser (`parser_class`, with `protocol=2`), so that the handshake is read by it too."""

    def __init__(self, socket_read_size: int) -> None:
        self._read_size = socket_read_size
        self._stream: asyncio.StreamReader | None = None
        self._reader = ReplyReader(error_of)

    def on_connect(self, connection: Any) -> None:
        self._stream = connection._reader  # noqa: SLF001 - as redis-py's own parsers do
        self._reader = ReplyReader(error_of)

    def on_disconnect(self) -> None:
        self._stream = None

    @property
    def pending(self) -> bool:
        """Whether more came than the replies that were read."""
        return self._reader.pending

    async def read_response(self, disable_decoding: bool = False, push_request: bool = False) -> Reply:  # noqa: ARG002
        """Return the next reply; nothing is ever decoded."""
        while (reply := self._reader.take()) is Incomplete.INCOMPLETE:
            if self._stream is None:
                raise RedisConnectionError("the connection is closed")
            content = await self._stream.read(self._read_size)
            if not content:
                raise RedisConnectionError("the server closed the connection")
            self._reader.feed(content)
        if isinstance(reply, RedisConnectionError):  # such as LOADING
            raise reply
        return reply


class Connection:
    """One connection, closed until it is first opened.

    Attributes:
        opened_s: when it was last opened.
        expires_s: when it is to be replaced.
        replaced: another one has taken its place.
    """

    def __init__(self, pool: redis.ConnectionPool) -> None:
        """Prepare one with a pool's options."""
        kwargs = pool.connection_kwargs
        self._parser = BoundedParser(kwargs.get("socket_read_size", _READ_BYTES))
        self._to: AbstractConnection = pool.connection_class(
            **(kwargs | {"protocol": 2, "parser_class": lambda **_: self._parser})
        )
        self.opened_s = 0.0
        self.expires_s = 0.0
        self.replaced = False

    @property
    def is_open(self) -> bool:
        return bool(self._to.is_connected)

    async def open(self, age_max_s: float) -> None:
        """Look the server's name up, connect, authenticate. Raises RedisError, OSError."""
        try:
            await self._to.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await self.close()  # given up amid the handshake, its replies would be those of the first command
            raise
        self.opened_s, self.replaced = asyncio.get_running_loop().time(), False
        # Not all at once.
        self.expires_s = self.opened_s + age_max_s * random.uniform(0.5, 1.0)

    async def close(self) -> None:
        await self._to.disconnect(nowait=True)

    async def exchange(self, commands: Sequence[Command]) -> list[Reply]:
        """Send commands and read their replies; errors of single commands come back as exceptions.

        On redis-py's connection without its command layer, packing and pool: those cost 0.3 ms a call of 228 keys.

        A reply too many or too few would give every later caller what another one asked for. So each exchange ends with
        a PING of its own number, which only its own reply answers; on whatever goes wrong, the connection is closed.

        Raises:
            MalformedReplyError: what came is not what these commands are answered with.
            RedisError, OSError: the connection broke, or the server refuses to talk to us.
        """
        number = b"%x" % next(_exchanges)
        asked = [*commands, ("PING", number)]
        try:
            packed: list[bytes] = [hiredis.pack_command(command) for command in asked]  # type: ignore[arg-type]
            await self._to.send_packed_command(b"".join(packed))
            replies: list[Reply] = []
            for command in asked:
                reply = await self._parser.read_response()
                if not isinstance(reply, ResponseError) and not is_answer(command, reply):
                    raise MalformedReplyError(f"what it answered to {command[0]!s} is no answer to that")
                replies.append(reply)
            if self._parser.pending:
                raise MalformedReplyError("it sent more replies than there were commands")
            if isinstance(last := replies.pop(), ResponseError):
                raise last
        except BaseException:
            await self.close()
            raise
        if any(meaning_of(reply).reconnect for reply in replies):
            await self.close()
        return replies
