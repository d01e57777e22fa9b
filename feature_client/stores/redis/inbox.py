"""What one connection receives: an asyncio protocol that gives bytes to whoever waits for an answer."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from feature_client.stores.redis.resp import Incomplete, MalformedReplyError

#: How many bytes may wait for somebody who reads them.
_EARLY_BYTES_MAX = 1 << 17


class Reader(Protocol):
    """Takes bytes until it has an answer. It may raise RedisError instead."""

    def feed(self, content: bytes) -> Any | Incomplete: ...


class Inbox(asyncio.Protocol):
    """The receiving end of a connection. At most one answer is awaited at a time.

    Bytes are parsed as they arrive, so that whoever waits is woken once, by the whole answer.
    """

    def __init__(self, transport: asyncio.Transport, early: bytes) -> None:
        """Take over a transport.

        Args:
            transport: a connected transport.
            early: what it received before.
        """
        self._transport = transport
        self._early = early
        self._reader: Reader | None = None
        self._answer: asyncio.Future[Any] | None = None
        self._lost: Exception | None = None
        #: redis-py waits for the end of its stream when it closes a connection after a failed handshake.
        self._stream = transport.get_protocol()
        transport.set_protocol(self)

    @property
    def pending(self) -> bool:
        """Whether bytes were received that nobody waited for."""
        return bool(self._early)

    def ask(self, packed: bytes, reader: Reader) -> asyncio.Future[Any]:
        """Send bytes and return the answer to come.

        Raises:
            MalformedReplyError: an answer is there before anything was asked.
            RedisError, OSError: the connection is lost.
        """
        if self._early:
            raise MalformedReplyError("there were more replies than commands")
        if self._lost is not None:
            raise self._lost
        answer = self.answer(reader)
        self._transport.write(packed)
        return answer

    def answer(self, reader: Reader) -> asyncio.Future[Any]:
        """Return the answer that a reader makes of the next bytes. If the connection is lost, it raises that."""
        answer = asyncio.get_running_loop().create_future()
        self._reader, self._answer = reader, answer
        if early := self._early:
            self._early = b""
            self._transport.resume_reading()
            self.data_received(early)
        if self._lost is not None and not answer.done():
            answer.set_exception(self._lost)
        return answer

    def data_received(self, content: bytes) -> None:
        reader, answer = self._reader, self._answer
        if reader is None or answer is None or answer.done():
            self._early += content
            if len(self._early) > _EARLY_BYTES_MAX:
                self._transport.pause_reading()
            return
        try:
            found = reader.feed(content)
        except RedisError as error:
            answer.set_exception(error)
        else:
            if found is not Incomplete.INCOMPLETE:
                answer.set_result(found)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = exc or RedisConnectionError("the server closed the connection")
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._lost)
        self._stream.connection_lost(exc)
