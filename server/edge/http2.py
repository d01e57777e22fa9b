"""gRPC over one HTTP/2 connection as a state machine: bytes in; events and bytes out. No sockets, clocks or threads.

`kernels/native/http2.cpp` is the machine, on nghttp2; this file calls it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from enum import IntEnum
from functools import cache
from typing import NamedTuple

from kernels.native.library import http2_library
from pinrank.tokens import CREDENTIALS

#: Maximum size of a call's metadata, gRPC's own default.
HEADER_BYTES_MAX = 16 << 10
#: Maximum number of calls at once on a connection. The server's own limits refuse calls; a client that reaches this
#: one queues them itself, and they would be late.
STREAMS_MAX = 2_000
#: Bytes of all unanswered calls of a connection, as a multiple of the largest message; and at least so many.
_KEPT_MESSAGES, KEPT_BYTES_MIN = 16, 64 << 20
#: The same of all connections together.
ALL_KEPT_BYTES_MAX = 256 << 20
#: Bytes that a client may send on a stream before we say that we took them.
_WINDOW_BYTES = 64 << 10
_EVENT_WORDS = 8


#: The values of each of `CREDENTIALS` in a call's metadata.
Credentials = tuple[list[bytes], ...]
_NONE: Credentials = tuple([] for _ in CREDENTIALS)


class ConnectionBrokenError(Exception):
    """The peer does not speak HTTP/2, or the connection can no longer be used."""


class EventKind(IntEnum):
    CALL = 1
    """A call came: with its message, if its method takes one; else its messages follow."""
    MESSAGE = 2
    """A message came."""
    REQUEST_ENDED = 3
    """No further messages will come."""
    CLOSED = 4
    """The call is over: it was answered, or the caller gave it up."""
    BEGUN = 5
    """A call whose method takes one message came without all of it; CALL follows with the message."""
    SENT = 6
    """All messages of an answer so far are on their way, and the answer is not complete."""


class Event(NamedTuple):
    """What happened on a stream.

    Attributes:
        kind: what happened.
        stream: the call's number on this connection.
        method: index of the call's method.
        timeout_us: time that the caller gave the call, from its arrival, in microseconds; -1 if it did not say.
        message: the message that came, if one did.
        compressed: whether the message is compressed.
        credentials: number of the call's credentials, for `Http2Connection.credentials`.
    """

    kind: int
    stream: int
    method: int
    timeout_us: int
    message: bytes
    compressed: int
    credentials: int


class Http2Endpoint:
    """What all connections of a server share: its methods and limits."""

    def __init__(
        self,
        takes_stream: Mapping[str, bool],
        message_bytes_max: int,
        header_bytes_max: int = HEADER_BYTES_MAX,
        streams_max: int = STREAMS_MAX,
        all_kept_bytes_max: int = ALL_KEPT_BYTES_MAX,
    ) -> None:
        """Create an endpoint.

        Args:
            takes_stream: by path (`/service/method`), whether the method takes a stream of messages.
            message_bytes_max: maximum size of a message; a call with a larger one ends with RESOURCE_EXHAUSTED.
            header_bytes_max: maximum size of a call's metadata.
            streams_max: maximum number of calls at once on a connection.
            all_kept_bytes_max: maximum size of what all connections keep of unanswered calls.

        Raises:
            NativeLibraryError: the library is not built.
        """
        self._native = _native()
        self.address = self._native.pinrank_h2_endpoint(
            len(takes_stream), b"".join(path.encode() + b"\0" for path in takes_stream), bytes(takes_stream.values()),
            len(CREDENTIALS), b"".join(name + b"\0" for name in CREDENTIALS),
            message_bytes_max, header_bytes_max, max(KEPT_BYTES_MIN, _KEPT_MESSAGES * message_bytes_max),
            all_kept_bytes_max, streams_max, _WINDOW_BYTES,
        )  # fmt: skip
        if not self.address:
            raise MemoryError

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._native.pinrank_h2_endpoint_free(self.address)


class Http2Connection:
    """One connection. Belongs to one thread."""

    def __init__(self, endpoint: Http2Endpoint) -> None:
        self._endpoint = endpoint  # must outlive this
        self._native = native = endpoint._native  # noqa: SLF001 - the other half of this file
        view = ctypes.POINTER(_View)()
        self._address = native.pinrank_h2_connect(endpoint.address, ctypes.byref(view))
        if not self._address:
            raise MemoryError
        self._view = view.contents
        #: The values of credentials by their number, and the upper half of these numbers.
        self._credentials: dict[int, Credentials] = {}
        self._credentials_from = 0

    def __del__(self) -> None:
        if getattr(self, "_address", None):
            self._native.pinrank_h2_free(self._address)

    @property
    def is_open(self) -> bool:
        """Whether anything more can come or is to be sent."""
        return bool(self._view.is_open)

    @property
    def is_greeted(self) -> bool:
        """Whether the client has begun to speak HTTP/2."""
        return bool(self._view.settings_received)

    @property
    def resets(self) -> int:
        """The number of calls that ended before they were answered: the client gave them up, or broke the protocol."""
        return int(self._view.resets)

    def receive(self, content: bytes) -> list[Event]:
        """Take received bytes, and return what happened.

        Raises:
            ConnectionBrokenError: the bytes are not HTTP/2. `send` has what the peer should be told.
        """
        count = self._native.pinrank_h2_receive(self._address, content, len(content))
        if count < 0:
            raise ConnectionBrokenError
        return self._events(count) if count else []

    def send(self) -> tuple[bytes, list[Event]]:
        """Return the next bytes to write, and the calls that end with them. If `has_more`, there are further ones.

        Raises:
            ConnectionBrokenError: nothing more can be sent.
        """
        count = self._native.pinrank_h2_send(self._address)
        if count < 0:
            raise ConnectionBrokenError
        view = self._view
        return ctypes.string_at(view.output, view.output_bytes), self._events(count) if count else []

    @property
    def has_more(self) -> bool:
        return bool(self._view.more_output)

    def _events(self, count: int) -> list[Event]:
        words = (ctypes.c_int64 * (count * _EVENT_WORDS)).from_address(self._view.events)[:]
        events = []
        for at in range(0, len(words), _EVENT_WORDS):
            kind, stream, method, timeout_us, address, size, compressed, who = words[at : at + _EVENT_WORDS]
            events.append(Event(kind, stream, method, timeout_us, ctypes.string_at(address, size), compressed, who))
        return events

    def message(self, stream: int, message: bytes) -> None:
        """Send one message of an answer that may have several."""
        self._native.pinrank_h2_message(self._address, stream, message, len(message))

    def answer(self, stream: int, message: bytes) -> None:
        """Answer a call with one message and status OK."""
        self._native.pinrank_h2_answer(self._address, stream, message, len(message))

    def end(self, stream: int, code: int, message: str = "", trailers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """End a call.

        Args:
            stream: the call's number.
            code: gRPC's status code.
            message: percent-encoded.
            trailers: further trailers, as they are sent.
        """
        block = b"".join(b"%b\0%b\0" % trailer for trailer in trailers)
        self._native.pinrank_h2_end(self._address, stream, code, message.encode(), block, len(block))

    def reset(self, stream: int) -> None:
        """Give up a call, whatever of its answer is still to be sent."""
        self._native.pinrank_h2_reset(self._address, stream)

    def is_in_progress(self, stream: int) -> bool:
        """Whether a call is neither answered nor given up."""
        return bool(self._native.pinrank_h2_is_open(self._address, stream))

    def keep(self, stream: int, size: int) -> bool:
        """Count further bytes for a call's message, such as those of what it becomes. Return whether there is room."""
        return bool(self._native.pinrank_h2_keep(self._address, stream, size))

    def taken(self, stream: int, size: int, kept: int = 0) -> None:
        """Note that a handler is done with a message, so that the client may send more.

        Args:
            stream: the call's number.
            size: the message's bytes as they came.
            kept: what was counted for it by `keep`.
        """
        self._native.pinrank_h2_taken(self._address, stream, size, kept)

    def metadata(self, stream: int) -> tuple[tuple[str, str], ...]:
        """Return a call's metadata; nothing if the call is over."""
        parts = self._metadata(stream).decode("latin-1").split("\0")[:-1]
        return tuple(zip(parts[::2], parts[1::2], strict=True))

    def credentials(self, stream: int, number: int) -> Credentials:
        """Return what a call's metadata says of who calls.

        The machine numbers what it has seen on this connection, so that it is taken out of the metadata once.

        Args:
            stream: the call's number.
            number: `Event.credentials` of the call.
        """
        if not number:
            return _NONE
        found = self._credentials.get(number)
        if found is None:
            found = self._credentials_in(stream)
            if number > 0 and any(found):  # a call that is over has no metadata
                if number >> 32 != self._credentials_from:
                    self._credentials.clear()
                    self._credentials_from = number >> 32
                self._credentials[number] = found
        return found

    @property
    def remembered(self) -> int:
        """How many of them are kept here."""
        return len(self._credentials)

    def _credentials_in(self, stream: int) -> Credentials:
        parts = self._metadata(stream).split(b"\0")
        pairs = tuple(zip(parts[:-1:2], parts[1::2], strict=True))
        return tuple([value for name, value in pairs if name == wanted] for wanted in CREDENTIALS)

    def _metadata(self, stream: int) -> bytes:
        size = ctypes.c_int64()
        found = self._native.pinrank_h2_metadata(self._address, stream, ctypes.byref(size))
        return ctypes.string_at(found, size.value) if size.value else b""

    def retire(self) -> None:
        """Announce that the connection will take no further calls. Those on their way are still taken."""
        self._native.pinrank_h2_retire(self._address)

    def go_away(self, *, calm: bool = False) -> None:
        """Take no further calls; clients send them, and those that came too late, over another connection.

        Args:
            calm: whether to tell the client that it asked for too much (ENHANCE_YOUR_CALM).
        """
        self._native.pinrank_h2_go_away(self._address, calm)


class _View(ctypes.Structure):
    """`View` in http2.cpp."""

    _fields_ = (
        ("events", ctypes.c_int64),
        ("event_count", ctypes.c_int64),
        ("output", ctypes.c_int64),
        ("output_bytes", ctypes.c_int64),
        ("more_output", ctypes.c_int64),
        ("is_open", ctypes.c_int64),
        ("settings_received", ctypes.c_int64),
        ("resets", ctypes.c_int64),
    )


@cache
def _native() -> ctypes.PyDLL:
    native = http2_library()
    word, text, place = ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
    for name, result, arguments in (
        ("endpoint", place, (word, text, text, word, text, word, word, word, word, word, word)),
        ("endpoint_free", None, (place,)),
        ("connect", place, (place, place)),
        ("free", None, (place,)),
        ("receive", word, (place, text, word)),
        ("send", word, (place,)),
        ("message", None, (place, ctypes.c_int32, text, word)),
        ("answer", None, (place, ctypes.c_int32, text, word)),
        ("end", None, (place, ctypes.c_int32, ctypes.c_int32, text, text, word)),
        ("reset", None, (place, ctypes.c_int32)),
        ("keep", ctypes.c_int32, (place, ctypes.c_int32, word)),
        ("is_open", ctypes.c_int32, (place, ctypes.c_int32)),
        ("taken", None, (place, ctypes.c_int32, word, word)),
        ("metadata", place, (place, ctypes.c_int32, place)),
        ("retire", None, (place,)),
        ("go_away", None, (place, ctypes.c_int32)),
    ):
        function = getattr(native, f"pinrank_h2_{name}")
        function.restype, function.argtypes = result, arguments
    return native
