"""A call in progress, as its handler sees it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
import urllib.parse
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, NoReturn

import grpc
import grpc.aio

from server.edge.http2 import Http2Connection

#: zlib's window bits by the name of an encoding (zlib.decompressobj).
_WINDOW_BITS = {"gzip": 31, "deflate": 15}


class UnreadableMessageError(Exception):
    """A compressed message cannot be read. Carries the status of its call."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Call:
    """A call on a connection. Has the part of `grpc.aio.ServicerContext` that our handlers and grpcio's own use."""

    def __init__(
        self,
        http2: Http2Connection,
        stream: int,
        timeout_us: int,
        serialise: Callable[[Any], bytes],
        flush: Callable[[], None],
        peer: str,
    ) -> None:
        """Create a call that just came.

        Args:
            http2: its connection.
            stream: the call's number on it.
            timeout_us: time until its deadline, in microseconds; -1 if it has none.
            serialise: turns a message of the answer into bytes.
            flush: writes what is to be sent on the connection.
            peer: the caller's address as gRPC writes it.
        """
        self._http2 = http2
        self._stream = stream
        self._serialise = serialise
        self._flush = flush
        self._peer = peer
        self.deadline_s = None if timeout_us < 0 else time.monotonic() + timeout_us / 1e6
        self.task: asyncio.Task[None] | None = None
        self.answered = False
        self._done_callbacks: list[Callable[[Call], None]] = []
        self._inbox: asyncio.Queue[tuple[bytes, int] | None] | None = None

    def time_remaining(self) -> float | None:
        """Return the seconds until the call's deadline, at least 0; None if it has none."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - time.monotonic())

    def add_done_callback(self, callback: Callable[[Call], None]) -> None:
        """Call back when the call is over: its answer is on its way, or the caller is gone."""
        self._done_callbacks.append(callback)

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the call's metadata; values of names that end with `-bin` are bytes, if they can be decoded."""
        return tuple(
            (name, _bytes_of(value) if name.endswith("-bin") else value)
            for name, value in self._http2.metadata(self._stream)
        )

    def peer(self) -> str:
        """Return the caller's address as gRPC writes it."""
        return self._peer

    async def write(self, message: Any) -> None:
        """Send one message of the answer."""
        self._http2.message(self._stream, self._serialise(message))
        self._flush()

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> NoReturn:
        """End the call with a status. Raises grpc.aio.AbortError always."""
        self.end(code, details, trailing_metadata)
        raise grpc.aio.AbortError

    def end(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> None:
        """End the call with a status, unless it has one."""
        if self.answered:
            return
        self.answered = True
        trailers = [(name.encode(), _header_value(value)) for name, value in trailing_metadata]
        quoted = urllib.parse.quote(details, safe=_UNQUOTED)
        self._http2.end(self._stream, code.value[0], quoted, trailers)
        self._flush()

    def answer(self, message: Any) -> None:
        """Answer with one message and status OK, unless the call has a status."""
        if self.answered:
            return
        content = self._serialise(message)
        self.answered = True
        self._http2.answer(self._stream, content)
        self._flush()

    def over(self) -> None:
        """Note that the call is over. A handler that still runs is cancelled."""
        if self.task is not None and not self.answered:
            self.task.cancel()
        self.answered = True
        for callback in self._done_callbacks:
            callback(self)

    def requests(self) -> AsyncIterator[bytes]:
        """Return the messages of a request that is a stream of them; `receive` brings them."""
        self._inbox = asyncio.Queue()
        return self._received(self._inbox)

    def receive(self, message: bytes, size: int) -> None:
        """Take a message of the request, which had `size` bytes on the wire."""
        if self._inbox is not None:
            self._inbox.put_nowait((message, size))

    def end_of_request(self) -> None:
        """Note that no further messages will come."""
        if self._inbox is not None:
            self._inbox.put_nowait(None)

    async def _received(self, inbox: asyncio.Queue[tuple[bytes, int] | None]) -> AsyncIterator[bytes]:
        while (received := await inbox.get()) is not None:
            message, size = received
            self._http2.taken(self._stream, size)
            self._flush()
            yield message

    def decompressed(self, message: bytes, bytes_max: int) -> bytes:
        """Return what a compressed message contains. Raises UnreadableMessageError."""
        encoding = dict(self._http2.metadata(self._stream)).get("grpc-encoding", "identity")
        if encoding not in _WINDOW_BITS:
            known = ", ".join(_WINDOW_BITS)
            raise UnreadableMessageError(
                grpc.StatusCode.UNIMPLEMENTED,
                f"messages compressed by {encoding!r} cannot be read; use {known} or none",
            )
        machine = zlib.decompressobj(_WINDOW_BITS[encoding])
        try:
            content = machine.decompress(message, bytes_max + 1)
        except zlib.error as error:
            raise UnreadableMessageError(grpc.StatusCode.INTERNAL, f"cannot decompress a message: {error}") from error
        if len(content) > bytes_max:
            raise UnreadableMessageError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"a message has more than {bytes_max} bytes when decompressed"
            )
        if not machine.eof:
            raise UnreadableMessageError(grpc.StatusCode.INTERNAL, "cannot decompress a message: it is cut off")
        return content


#: Characters of a grpc-message that are sent as they are (gRPC over HTTP/2, "Status-Message").
_UNQUOTED = "".join(chr(byte) for byte in range(0x20, 0x7F) if byte != 0x25)


def _bytes_of(value: str) -> bytes | str:
    try:
        return base64.b64decode(value + "==")
    except binascii.Error:
        return value


def _header_value(value: str | bytes) -> bytes:
    """Return trailing metadata as it is sent; bytes, under a name that ends with `-bin`, in base64."""
    return base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode("ascii")
