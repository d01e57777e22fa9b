"""What one exchange sends, and how its answer is recognised. Pure: the connection provides the bytes.

One reply too many or too few would give every later caller the reply to another caller's command. Each exchange
therefore ends with a PING that carries a unique number, and its reply must carry the same number and be the last.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Protocol

import hiredis
import numpy as np
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from feature_client.stores.redis.replies import Command, are_values, error_of, is_answer
from feature_client.stores.redis.resp import Bounds, Incomplete, MalformedReplyError, Reply, ReplyReader
from feature_client.values.keys import Keys
from feature_client.values.native_values import NativeValues, ReadOutcome, native_values
from feature_client.values.stored_values import StoredValues

_NO_BOUNDS = Bounds()


class AnswerReader(Protocol):
    """Takes the bytes of an answer as they are received."""

    def feed(self, content: bytes) -> list[Reply] | Incomplete:
        """Return the replies once all of them were received. The reply to a command that failed is the exception.

        Raises:
            MalformedReplyError: the replies do not fit the commands.
            RedisError: the server refused the exchange.
        """


class Request(Protocol):
    """Commands that are sent together."""

    def packed(self, number: bytes) -> bytes:
        """Return the bytes of the commands, and of a PING with this number."""

    def answer_reader(self, number: bytes) -> AnswerReader: ...


class Commands:
    """Any commands that `replies` knows."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self._commands = commands

    def packed(self, number: bytes) -> bytes:
        each: list[bytes] = [hiredis.pack_command(command) for command in self._commands]  # type: ignore[arg-type]
        return b"".join((*each, _ping(number)))

    def answer_reader(self, number: bytes) -> AnswerReader:
        return Replies([(str(command[0]), partial(is_answer, command)) for command in self._commands], number)


class GetMany:
    """An MGET. Its reply is the `StoredValues`, or a list of them if the native library is not built."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = keys

    def packed(self, number: bytes) -> bytes:
        if not isinstance(self._keys, Keys):
            return Commands([("MGET", *self._keys)]).packed(number)
        parts: list[bytes | bytearray] = [b"*%d\r\n$4\r\nMGET\r\n" % (len(self._keys) + 1)]
        parts += [b"$%d\r\n%b\r\n" % (len(key), key) for key in self._keys.single]
        parts += [_packed_run(run.prefix, run.ids) for run in self._keys.runs]
        parts.append(_ping(number))
        return b"".join(parts)

    def answer_reader(self, number: bytes) -> AnswerReader:
        native = native_values()
        return (
            Replies.of_values(len(self._keys), number)
            if native is None
            else ValuesReader(native, len(self._keys), number)
        )


def _ping(number: bytes) -> bytes:
    return b"*2\r\n$4\r\nPING\r\n" + _bulk(number)


def _bulk(content: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(content), content)


def _packed_run(prefix: bytes, ids: np.ndarray) -> bytearray:
    row, dtype = _bulk_row(prefix)
    packed = bytearray(row) * len(ids)
    np.frombuffer(packed, dtype)["id"] = ids
    return packed


@lru_cache(maxsize=256)
def _bulk_row(prefix: bytes) -> tuple[bytes, np.dtype[np.void]]:
    """Return the bulk string of a key of this prefix with the id 0, and where the id stands in it."""
    row = _bulk(prefix + bytes(8))
    offset = len(row) - len(b"\r\n") - 8
    return row, np.dtype({"names": ["id"], "formats": [">u8"], "offsets": [offset], "itemsize": len(row)})


class Replies:
    """Reads replies one by one."""

    def __init__(
        self, asked: Sequence[tuple[str, Callable[[Reply], bool]]], number: bytes, bounds: Bounds = _NO_BOUNDS
    ) -> None:
        """Prepare to read.

        Args:
            asked: for each command its name, and whether a reply that is no error has the form that it gets.
            number: what the PING at the end carries.
            bounds: the limits of each reply.
        """
        self._asked: list[tuple[str, Callable[[Reply], bool]]] = [*asked, ("PING", partial(operator.eq, number))]
        self._reader = ReplyReader(error_of, bounds)
        self._replies: list[Reply] = []

    @classmethod
    def of_values(cls, count: int, number: bytes, bounds: Bounds = _NO_BOUNDS) -> Replies:
        return cls([("MGET", partial(are_values, count))], number, bounds)

    def feed(self, content: bytes) -> list[Reply] | Incomplete:
        self._reader.feed(content)
        for name, fits in self._asked[len(self._replies) :]:
            if (reply := self._reader.take()) is Incomplete.INCOMPLETE:
                return Incomplete.INCOMPLETE
            if isinstance(reply, RedisConnectionError):  # for example LOADING
                raise reply
            if not isinstance(reply, ResponseError) and not fits(reply):
                raise MalformedReplyError(f"the reply does not fit the command {name}")
            self._replies.append(reply)
        if self._reader.pending:
            raise MalformedReplyError("there were more replies than commands")
        if isinstance(last := self._replies.pop(), ResponseError):
            raise last
        return self._replies


class ValuesReader:
    """Reads the reply to an MGET without an object for each value.

    The native library reads replies that are exactly as a server writes them when all is well. Whatever else was
    received is read once more, from its first byte, as any other reply: what that way refuses is refused.
    """

    def __init__(self, native: NativeValues, count: int, number: bytes, bounds: Bounds = _NO_BOUNDS) -> None:
        """Prepare to read.

        Args:
            native: the native library.
            count: the number of keys, at least one.
            number: what the PING at the end carries.
            bounds: the limits of the reply.
        """
        self._count, self._number, self._bounds = count, number, bounds
        self._reply = native.values_reply(count, b"*%d\r\n" % count, _bulk(number), bounds.size_bytes)
        self._received: bytes | bytearray = b""
        self._otherwise: Replies | None = None

    def feed(self, content: bytes) -> list[Reply] | Incomplete:
        if self._otherwise is not None:
            return self._otherwise.feed(content)
        if isinstance(self._received, bytearray):
            self._received += content
        else:  # most replies come whole
            self._received = bytearray(self._received) + content if self._received else content
        match self._reply.read(self._received):
            case ReadOutcome.COMPLETE:
                return [StoredValues(bytes(self._received), self._reply.starts, self._reply.sizes)]
            case ReadOutcome.INCOMPLETE:
                return Incomplete.INCOMPLETE
        self._otherwise = Replies.of_values(self._count, self._number, self._bounds)
        return self._otherwise.feed(bytes(self._received))
