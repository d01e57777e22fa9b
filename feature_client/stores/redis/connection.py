"""One connection to a Redis server. redis-py connects and authenticates; our own bounded reader parses the replies."""

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
#: The number of each exchange is unique across all processes.
_exchanges = itertools.count(secrets.randbits(62))


class BoundedParser(BaseParser):
    """Replaces the parser of redis-py (`parser_class`, with `protocol=2`), so that it reads the handshake too."""

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
        """Whether more was received than the replies that were read."""
        return self._reader.pending

    async def read_response(self, disable_decoding: bool = False, push_request: bool = False) -> Reply:  # noqa: ARG002
        """Return the next reply. Values stay bytes."""
        while (reply := self._reader.take()) is Incomplete.INCOMPLETE:
            if self._stream is None:
                raise RedisConnectionError("the connection is closed")
            content = await self._stream.read(self._read_size)
            if not content:
                raise RedisConnectionError("the server closed the connection")
            self._reader.feed(content)
        if isinstance(reply, RedisConnectionError):  # for example LOADING
            raise reply
        return reply


class Connection:
    """One connection, which is closed until `open` is called.

    Attributes:
        opened_s: when it was last opened.
        expires_s: when it is due to be replaced.
        replaced: whether another connection has replaced it.
    """

    def __init__(self, pool: redis.ConnectionPool) -> None:
        """Prepare a connection with the options of a pool."""
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
        """Resolve the host name, connect and authenticate. Raises RedisError and OSError."""
        try:
            await self._to.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await self.close()  # otherwise late replies to the handshake would answer the first command
            raise
        self.opened_s, self.replaced = asyncio.get_running_loop().time(), False
        # Connections must not all expire at the same time.
        self.expires_s = self.opened_s + age_max_s * random.uniform(0.5, 1.0)

    async def close(self) -> None:
        await self._to.disconnect(nowait=True)

    async def exchange(self, commands: Sequence[Command]) -> list[Reply]:
        """Send commands and read their replies. If a command fails, its reply is the exception.

        This bypasses the command layer, packing and pool of redis-py, which cost 0.3 ms for a call of 228 keys.

        One reply too many or too few would give every later caller the reply to another caller's command. Each exchange
        therefore ends with a PING that carries a unique number, and its reply must carry the same number. If anything
        is wrong, the connection is closed.

        Raises:
            MalformedReplyError: the replies do not fit the commands.
            RedisError, OSError: the connection broke, or the server refused the exchange.
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
                    raise MalformedReplyError(f"the reply does not fit the command {command[0]!s}")
                replies.append(reply)
            if self._parser.pending:
                raise MalformedReplyError("there were more replies than commands")
            if isinstance(last := replies.pop(), ResponseError):
                raise last
        except BaseException:
            await self.close()
            raise
        if any(meaning_of(reply).reconnect for reply in replies):
            await self.close()
        return replies
