"""Bytes of HTTP/2 as no library would write them: nothing here checks that they make sense."""

from __future__ import annotations

import struct
from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, END_HEADERS = 1, 4
CANCEL = 8
FRAME_HEADER_BYTES = 9


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame; its length is the payload's, modulo what fits into the field."""
    return struct.pack(">I", len(payload) & 0xFF_FFFF)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return headers as an HPACK block: literals without indexing (RFC 7541, section 6.2.2)."""
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in headers)


def call_headers(path: bytes, more: Iterable[tuple[bytes, bytes]] = ()) -> list[tuple[bytes, bytes]]:
    """Return the headers of a gRPC call."""
    return [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost"),
        (b"te", b"trailers"), (b"content-type", b"application/grpc"), *more,
    ]  # fmt: skip


def begun(streams: Iterable[int], block: bytes) -> bytes:
    """Return the beginnings of calls that have no body yet."""
    return b"".join(frame(HEADERS, END_HEADERS, stream, block) for stream in streams)


def given_up(streams: Iterable[int]) -> bytes:
    """Return the resets of calls."""
    return b"".join(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)) for stream in streams)


def frames_in(content: bytes) -> Iterable[tuple[int, bytes]]:
    """Yield the kind and payload of each whole frame."""
    at = 0
    while at + FRAME_HEADER_BYTES <= len(content):
        size = int.from_bytes(content[at : at + 3], "big")
        yield content[at + 3], content[at + FRAME_HEADER_BYTES : at + FRAME_HEADER_BYTES + size]
        at += FRAME_HEADER_BYTES + size


def _string(text: bytes) -> bytes:
    """Return a string literal without Huffman coding (RFC 7541, sections 5.1 and 5.2)."""
    size = len(text)
    if size < 0x7F:
        return bytes([size]) + text
    length, size = [0x7F], size - 0x7F
    while size >= 0x80:
        length.append(size % 0x80 + 0x80)
        size //= 0x80
    return bytes([*length, size]) + text
