"""A call in progress, as its handler sees it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import inspect
import time
import urllib.parse
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import grpc
import grpc.aio

from server.access.gate import CALLER
from server.api.calls import Deferred, kind_of
from server.api.status import MESSAGE_BYTES_MAX, within
from server.edge.http2 import Credentials, Http2Connection

if TYPE_CHECKING:
    from server.api.calls import Handler

#: zlib's window bits by the name of an encoding (zlib.decompressobj).
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_SHOWN_MAX = 60
#: Bytes of the objects that a message becomes, for each of its own.
_OBJECTS_BYTES = 4
#: Methods whose calls are no work: a connection that has only these makes room for others.
_IDLE_METHODS = frozenset({"/grpc.health.v1.Health/Watch"})
_FREE_SERVICES = ("/grpc.health.", "/grpc.reflection.")
_REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class Method(NamedTuple):
    """A method's behaviour, from bytes to bytes.

    Attributes:
        behaviour: takes the request (bytes, or an iterator of them) and the `Call`.
        serialise: turns a message of an answer into bytes.
        takes_stream: whether a request is a stream of messages.
        answers_stream: whether an answer is.
        is_work: whether a call keeps its connection from being closed for another.
        is_free: whether no quota or limit bounds its calls.
    """

    behaviour: Callable[[Any, Any], Any]
    serialise: Callable[[Any], bytes]
    takes_stream: bool
    answers_stream: bool
    is_work: bool
    is_free: bool

    @classmethod
    def of(cls, path: str, handler: Handler) -> Method:
        """Return the method of a guarded handler."""
        behaviour = getattr(handler, kind_of(handler))
        serialise = handler.response_serializer or bytes
        sides = handler.request_streaming, handler.response_streaming
        return cls(behaviour, serialise, *sides, path not in _IDLE_METHODS, path.startswith(_FREE_SERVICES))


class Call:
    """A call on a connection. Has the part of `grpc.aio.ServicerContext` that our handlers and grpcio's own use."""

    def __init__(
        self,
        http2: Http2Connection,
        stream: int,
        timeout_us: int,
        credentials: int,
        serialise: Callable[[Any], bytes],
        flush: Callable[[], None],
        peer: str,
        auth_context: Mapping[str, list[bytes]],
    ) -> None:
        """Create a call that just came.

        Args:
            http2: its connection.
            stream: the call's number on it.
            timeout_us: time until its deadline, in microseconds; -1 if it has none.
            credentials: their number on the connection.
            serialise: turns a message of the answer into bytes.
            flush: writes what is to be sent on the connection.
            peer: the caller's address as gRPC writes it.
            auth_context: what its connection's client certificate says.
        """
        self._http2 = http2
        self._stream = stream
        self._credentials = credentials
        self._serialise = serialise
        self._flush = flush
        self._peer = peer
        self._auth_context = auth_context
        self.deadline_s = None if timeout_us < 0 else time.monotonic() + timeout_us / 1e6
        self.task: asyncio.Task[None] | None = None
        #: The method, once the call has begun.
        self.begun: Method | None = None
        #: Whether it was not let in; and whether a proxy passed it on that speaks for others.
        self.is_refused = self.by_proxy = False
        #: Until when the whole request must have come.
        self.asks_until_s = float("inf")
        self.answered = False
        #: Whether the time to take the answer runs.
        self.is_taking = False
        self._done_callbacks: list[Callable[[Call], None]] = []
        self._inbox: asyncio.Queue[tuple[bytes, bool] | None] | None = None
        self._sent: asyncio.Event | None = None

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
            if not name.startswith("grpc-") and name not in _OF_THE_PROTOCOL
        )

    def credentials(self) -> Credentials:
        """Return the values of each of `CREDENTIALS` in the call's metadata."""
        return self._http2.credentials(self._stream, self._credentials)

    def peer(self) -> str:
        """Return the caller's address as gRPC writes it."""
        return self._peer

    def auth_context(self) -> Mapping[str, list[bytes]]:
        """Return the names of the caller's verified certificate, as gRPC calls them; nothing without a certificate.

        `x509_common_name` has at most one value, and `x509_subject_alternative_name` one for each name. grpcio's own
        has further properties, such as `transport_security_type`.
        """
        return self._auth_context

    async def write(self, message: Any) -> None:
        """Send one message of the answer, and wait until the client's windows have room for it."""
        self._sent = asyncio.Event()
        self._http2.message(self._stream, self._serialise(message))
        self._flush()
        await self._sent.wait()

    def sent(self) -> None:
        """Note that all messages so far are on their way."""
        if self._sent is not None:
            self._sent.set()

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
        # In the call's own task, which knows of a proxy as soon as its gate does.
        self.by_proxy = bool(CALLER.get().via)
        self.is_refused = code in _REFUSALS
        trailers = [(name.encode(), _header_value(value)) for name, value in trailing_metadata]
        quoted = urllib.parse.quote(within(details, MESSAGE_BYTES_MAX), safe=_UNQUOTED)
        self._http2.end(self._stream, code.value[0], quoted, trailers)
        self._flush()

    def answer(self, message: Any) -> None:
        """Answer with one message and status OK, unless the call has a status."""
        if self.answered:
            return
        content = self._serialise(message)
        self.answered, self.by_proxy = True, bool(CALLER.get().via)
        self._http2.answer(self._stream, content)
        self._flush()

    def over(self) -> None:
        """Note that the call is over. A handler that still runs is cancelled."""
        if self.task is not None and not self.answered:
            self.task.cancel()
        self.answered = True
        for callback in self._done_callbacks:
            callback(self)

    def requests(self, bytes_max: int, rests: Callable[[], None]) -> AsyncIterator[bytes]:
        """Return the messages of a request that is a stream of them; `receive` brings them.

        Args:
            bytes_max: maximum size of a message when decompressed.
            rests: called whenever there is no further message yet.
        """
        self._inbox = asyncio.Queue()
        return self._received(self._inbox, bytes_max, rests)

    def receive(self, message: bytes, *, compressed: bool) -> None:
        """Take a message of the request."""
        if self._inbox is not None:
            self._inbox.put_nowait((message, compressed))

    def end_of_request(self) -> None:
        """Note that no further messages will come."""
        if self._inbox is not None:
            self._inbox.put_nowait(None)

    async def _received(
        self, inbox: asyncio.Queue[tuple[bytes, bool] | None], bytes_max: int, rests: Callable[[], None]
    ) -> AsyncIterator[bytes]:
        while True:
            if inbox.empty():
                rests()
            if (received := await inbox.get()) is None:
                return
            message, compressed = received
            content = await self.decompressed(message, bytes_max) if compressed else message
            objects_bytes = _OBJECTS_BYTES * len(content)
            await self._keep(objects_bytes)
            yield content
            # Not before: meanwhile it takes memory.
            self._http2.taken(self._stream, len(message), objects_bytes + (len(content) if compressed else 0))
            self._flush()
            await asyncio.sleep(0)  # a client's messages must not hold up the calls of others

    async def decompressed(self, message: bytes, bytes_max: int) -> bytes:
        """Return what a compressed message contains. If it cannot be read, end the call and raise AbortError."""
        encoding = dict(self._http2.metadata(self._stream)).get("grpc-encoding", "identity")
        if encoding == "identity":
            await self.abort(grpc.StatusCode.INTERNAL, "a message is marked as compressed, without a grpc-encoding")
        if encoding not in _WINDOW_BITS:
            known = ",".join(("identity", *_WINDOW_BITS))
            problem = f"messages compressed by {encoding[:_SHOWN_MAX]!r} cannot be read; use gzip, deflate or none"
            await self.abort(grpc.StatusCode.UNIMPLEMENTED, problem, (("grpc-accept-encoding", known),))
        machine = zlib.decompressobj(_WINDOW_BITS[encoding])
        try:
            content = machine.decompress(message, bytes_max + 1)
        except zlib.error as error:
            await self.abort(grpc.StatusCode.INTERNAL, f"cannot decompress a message: {error}")
        if len(content) > bytes_max:
            problem = f"a message has more than {bytes_max} bytes when decompressed"
            await self.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, problem)
        if not machine.eof:
            await self.abort(grpc.StatusCode.INTERNAL, "cannot decompress a message: it is cut off")
        await self._keep(len(content))
        return content

    async def _keep(self, size: int) -> None:
        """Count further bytes for the call. If there is no room, end the call and raise AbortError."""
        if not self._http2.keep(self._stream, size):
            await self.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many bytes are in unanswered calls")


async def run(method: Method, request: bytes | Compressed | AsyncIterator[bytes], call: Call) -> None:
    """Run a guarded handler and send what it answers."""
    try:
        result = method.behaviour(request, call)
        if not method.answers_stream:
            call.answer(await result)
        elif inspect.isasyncgen(result):
            async for message in result:
                await call.write(message)
            call.end(grpc.StatusCode.OK)
        else:
            await result
            call.end(grpc.StatusCode.OK)
    except grpc.aio.AbortError:  # the call has its status
        pass
    except asyncio.CancelledError:  # the caller is gone, or the call was cut off
        call.end(grpc.StatusCode.CANCELLED)
    finally:  # no effect on a call that was answered
        call.end(grpc.StatusCode.INTERNAL, "the call ended without an answer")


class Compressed(Deferred):
    """A request that is decompressed when its caller was let in; one after the other, so that few are at a time."""

    def __init__(self, message: bytes, call: Call, bytes_max: int) -> None:
        self._message, self._call, self._bytes_max = message, call, bytes_max

    async def content(self) -> bytes:
        return await self._call.decompressed(self._message, self._bytes_max)


def peer_name(name: tuple[Any, ...] | str | bytes | None) -> str:
    """Return a peer's address as gRPC writes it."""
    match name:
        case (str(host), int(port)):
            return f"ipv4:{host}:{port}"
        case (str(host), int(port), *_):
            return f"ipv6:[{host}]:{port}"
    return "unix:"


#: Characters of a grpc-message that are sent as they are (gRPC over HTTP/2, "Status-Message").
_UNQUOTED = "".join(chr(byte) for byte in range(0x20, 0x7F) if byte != 0x25)


#: Headers that are no metadata of the caller; neither are those that begin with `grpc-`.
_OF_THE_PROTOCOL = frozenset({"content-type", "te"})


def _bytes_of(value: str) -> bytes | str:
    try:
        return base64.b64decode(value + "==")
    except binascii.Error:
        return value


def _header_value(value: str | bytes) -> bytes:
    """Return trailing metadata as it is sent; bytes, under a name that ends with `-bin`, in base64."""
    return base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode("ascii")
