"""A parser for replies of a Redis server (RESP2) that enforces bounds. It is pure: the caller provides the bytes.

hiredis allocates as many elements as a reply claims to have, so `*2147483647` kills the process. This reader allocates
only what was received, refuses every reply that none of our commands gets, and never quotes a reply in an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from redis.exceptions import InvalidResponse

#: The bytes of a bulk string, the str of a status, an int, None, a list of these, or the exception for an error reply.
Reply = Any


class MalformedReplyError(InvalidResponse):
    """The server sent something that is no reply, or that does not fit the command. The message never quotes it."""


class Incomplete(Enum):
    """The rest of the reply has not been received yet."""

    INCOMPLETE = "incomplete"


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of one reply.

    Attributes:
        size_bytes: the size of the whole reply.
        elements: the number of elements in all of its arrays together.
        depth: the nesting depth of arrays. Replies with stream entries are four arrays deep.
        line_bytes: the size of a length, a number, a status or an error.
    """

    size_bytes: int = 64 << 20
    elements: int = 1 << 20
    depth: int = 8
    line_bytes: int = 8 << 10


_BULK, _ARRAY, _INTEGER, _STATUS, _ERROR = b"$*:+-"
_NIL = b"$-1\r\n"
_INT64 = 1 << 63
_NO_BOUNDS = Bounds()


class ReplyReader:
    """Accepts bytes as they are received and returns whole replies."""

    def __init__(self, error_of: Callable[[str], Exception], bounds: Bounds = _NO_BOUNDS) -> None:
        """Prepare an empty reader.

        Args:
            error_of: returns the exception for the text of an error reply.
            bounds: the limits of each reply.
        """
        self._error_of = error_of
        self._bounds = bounds
        self._buffer = b""
        #: Where the next element starts in the buffer.
        self._at = 0
        self._chunks: list[bytes] = []
        self._bytes_there = 0
        #: How many bytes are needed before another parse can succeed.
        self._bytes_needed = 0
        #: Incomplete arrays, outermost first, and how many elements each will have.
        self._open: list[tuple[list[Reply], int]] = []
        self._elements = 0
        #: How many bytes of the current reply were in previous buffers.
        self._bytes_before = 0

    @property
    def pending(self) -> bool:
        """Whether more was received than the replies that were taken."""
        return bool(self._open) or self._bytes_there > self._at

    def feed(self, content: bytes) -> None:
        self._chunks.append(content)
        self._bytes_there += len(content)

    def take(self) -> Reply | Incomplete:
        """Return the next reply.

        Raises:
            MalformedReplyError: the bytes are no valid reply, and the connection is unusable.
        """
        if self._bytes_there < self._bytes_needed:
            return Incomplete.INCOMPLETE
        if self._chunks:
            self._bytes_before += self._at
            self._buffer = b"".join((self._buffer[self._at :], *self._chunks))
            self._bytes_there, self._at = len(self._buffer), 0
            self._chunks.clear()
        while True:
            element = self._element()
            if element is Incomplete.INCOMPLETE:
                return element
            if element is _OPENED:
                continue
            while self._open:
                elements, wanted = self._open[-1]
                elements.append(element)
                if len(elements) < wanted:
                    break
                self._open.pop()
                element = elements
            else:
                self._elements, self._bytes_before, self._bytes_needed = 0, -self._at, 0
                return element

    def _element(self) -> Reply | Incomplete:
        """Read one element or the header of an array."""
        buffer, at = self._buffer, self._at
        if buffer.startswith(_NIL, at):
            self._at = at + len(_NIL)
            return None
        end = buffer.find(b"\r\n", at, at + self._bounds.line_bytes)
        if end < 0:
            if len(buffer) - at >= self._bounds.line_bytes:
                raise MalformedReplyError(f"a line of more than {self._bounds.line_bytes} bytes")
            return self._wait_for(len(buffer) + 1)
        if end == at:
            raise MalformedReplyError("an empty line instead of a reply")
        kind, line = buffer[at], buffer[at + 1 : end]
        if kind == _BULK:
            return self._bulk(_length(line), end + 2)
        self._at = end + 2
        if kind == _ARRAY:
            return self._array(_length(line))
        if kind == _INTEGER:
            return _number(line)
        if kind == _STATUS:
            return line.decode("ascii", "replace")
        if kind == _ERROR:
            return self._error_of(line.decode("ascii", "replace"))
        raise MalformedReplyError(f"a reply of unknown type 0x{kind:02x}")

    def _bulk(self, size: int, start: int) -> Reply | Incomplete:
        if size < 0:
            self._at = start
            return None
        buffer, stop = self._buffer, start + size
        if self._bytes_before + stop > self._bounds.size_bytes:
            raise MalformedReplyError(f"a reply of more than {self._bounds.size_bytes} bytes")
        if len(buffer) < stop + 2:
            return self._wait_for(stop + 2)
        if self._open:
            start = self._run(size, start)
            stop = start + size
        if buffer[stop : stop + 2] != b"\r\n":
            raise MalformedReplyError("a value whose length is not the announced one")
        self._at = stop + 2
        return buffer[start:stop]

    def _run(self, size: int, start: int) -> int:
        """Read a run of equally long values of an array, except for the last; return where the last starts.

        The values of a feature group have the same length. Reading 256 of them in a run takes half the time.
        """
        elements, wanted = self._open[-1]
        buffer, separator = self._buffer, b"\r\n$%d\r\n" % size
        step = size + len(separator)
        count = min((len(buffer) - start - size - 2) // step, wanted - len(elements) - 1)
        last = start + step * count
        # Compare each byte of the separator for all values at once.
        if all(buffer[start + size + i : last : step] == separator[i : i + 1] * count for i in range(len(separator))):
            elements += [buffer[at : at + size] for at in range(start, last, step)]
            return last
        while buffer.startswith(separator, start + size):  # not all of them: one of another length ends it
            elements.append(buffer[start : start + size])
            start += step
        return start

    def _array(self, count: int) -> Reply:
        if count < 1:
            return [] if count == 0 else None
        self._elements += count
        if self._elements > self._bounds.elements:
            raise MalformedReplyError(f"a reply of more than {self._bounds.elements} elements")
        if len(self._open) == self._bounds.depth:
            raise MalformedReplyError(f"a reply with arrays nested more than {self._bounds.depth} deep")
        self._open.append(([], count))
        return _OPENED

    def _wait_for(self, size_bytes: int) -> Incomplete:
        if self._bytes_before + len(self._buffer) > self._bounds.size_bytes:
            raise MalformedReplyError(f"a reply of more than {self._bounds.size_bytes} bytes")
        self._bytes_needed = size_bytes
        return Incomplete.INCOMPLETE


#: The header of an array was read; its elements follow.
_OPENED = object()


def _length(digits: bytes) -> int:
    if (length := _number(digits)) < -1:
        raise MalformedReplyError(f"a length of {length}")
    return length


def _number(digits: bytes) -> int:
    bare = digits[1:] if digits[:1] == b"-" else digits
    if not bare.isdigit() or len(bare) > 19 or not -_INT64 <= (number := int(digits)) < _INT64:
        raise MalformedReplyError("a number was expected")
    return number
