"""One connection to a Redis server: redis-py's (names, TLS, passwords, options), read by our own bounded reader."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Sequence
from typing import Any

import hiredis
from redis._parsers import BaseParser
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from feature_client.redis_replies import Command, error_of, is_answer
from feature_client.resp import Incomplete, MalformedReplyError, Reply, ReplyReader

#: No two exchanges of any processes have the same number.
_exchanges = itertools.count(secrets.randbits(62))


class BoundedParser(BaseParser):
    """Stands in for redis-py's parser (`parser_class`, with `protocol=2`): it reads the handshake too."""

    def __init__(self, socket_read_size: int) -> None:
        self._read_size = socket_read_size
        self._stream: asyncio.StreamReader | None = None
        self._replies = ReplyReader(error_of)

    def on_connect(self, connection: Any) -> None:
        self._stream = connection._reader  # noqa: SLF001 - as redis-py's own parsers do
        self._replies = ReplyReader(error_of)

    def on_disconnect(self) -> None:
        self._stream = None

    async def can_read(self) -> bool:
        """Tell whether more came than the replies that were read."""
        return self._replies.pending

    async def read_response(self, disable_decoding: bool = False, push_request: bool = False) -> Reply:  # noqa: ARG002
        """Return the next reply; nothing is ever decoded."""
        while (reply := self._replies.take()) is Incomplete.INCOMPLETE:
            if self._stream is None:
                raise RedisConnectionError("the connection is closed")
            content = await self._stream.read(self._read_size)
            if not content:
                raise RedisConnectionError("the server closed the connection")
            self._replies.feed(content)
        if isinstance(reply, RedisConnectionError):  # such as LOADING
            raise reply
        return reply


async def exchange(connection: AbstractConnection, commands: Sequence[Command]) -> list[Reply]:
    """Send commands and read their replies; errors of single commands come back as exceptions.

    On redis-py's connection without its command layer, packing and pool: those cost 0.3 ms a call of 228 keys.

    A reply too many or too few would give every later caller what another one asked for. So each exchange ends with a
    PING of its own number, which only its own reply answers; on whatever goes wrong, the connection is closed.

    Raises:
        MalformedReplyError: what came is not what these commands are answered with.
        RedisError, OSError: the connection broke, or the server refuses to talk to us.
    """
    number = b"%x" % next(_exchanges)
    asked = [*commands, ("PING", number)]
    try:
        packed: list[bytes] = [hiredis.pack_command(command) for command in asked]  # type: ignore[arg-type]
        await connection.send_packed_command(b"".join(packed))
        replies: list[Reply] = []
        for command in asked:
            try:
                reply = await connection.read_response(disable_decoding=True)
            except ResponseError as error:
                reply = error
            else:
                if not is_answer(command, reply):
                    raise MalformedReplyError(f"what it answered to {command[0]!s} is no answer to that")
            replies.append(reply)
        if await connection.can_read():
            raise MalformedReplyError("it sent more replies than there were commands")
        last = replies.pop()
        if isinstance(last, ResponseError):
            raise last
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return replies
