"""Floods of HTTP/2 frames that are no calls, on the native gRPC port (CVE-2019-9511 to 9518, CVE-2024-27316)."""

from __future__ import annotations

import asyncio
import resource
import socket
import struct

import grpc.aio
import pytest

from bench.attacks.frames import HEADERS, PREFACE, SETTINGS, call_headers, frame, header_block
from server.edge.native_endpoint import NativeEndpoint
from tests.server.edge.service import Service, start

DATA, PRIORITY, PING, WINDOW_UPDATE, CONTINUATION = 0, 2, 6, 8, 9
BLOCK = header_block(call_headers(b"/test/Reverse"))
#: What is sent before the flood, a part of it, and whether the server ends the connection for it.
FLOODS = {
    "CONTINUATION": (
        frame(HEADERS, 0, 1, BLOCK),
        frame(CONTINUATION, 0, 1, header_block([(b"a", b"b" * 16_000)])),
        True,
    ),
    "empty CONTINUATION": (frame(HEADERS, 0, 1, BLOCK), frame(CONTINUATION, 0, 1), True),
    "PING": (b"", frame(PING, 0, 0, bytes(8)), True),
    "SETTINGS": (b"", frame(SETTINGS, 0, 0, struct.pack(">HI", 3, 100)), True),
    "WINDOW_UPDATE": (b"", frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)), False),
    "PRIORITY": (b"", frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 1)), False),
    "empty DATA": (frame(HEADERS, 4, 1, BLOCK), frame(DATA, 0, 1), False),
}
_FLOOD_BYTES = 64 << 20


def flood(port: int, before: bytes, part: bytes) -> bool:
    """Send 64 MB of frames without reading; return whether the server ended the connection."""
    block = part * max(1, (1 << 16) // len(part))
    with socket.create_connection(("127.0.0.1", port), timeout=60) as own:
        try:
            own.sendall(PREFACE + frame(SETTINGS, 0, 0) + before)
            for _ in range(_FLOOD_BYTES // len(block)):
                own.sendall(block)
        except (ConnectionError, TimeoutError):
            return True
        return False


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_of_frames_keeps_nobody_out_and_takes_no_memory(kind):
    before, part, ends = FLOODS[kind]
    endpoint: NativeEndpoint = await start(Service())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}") as channel:
        reverse = channel.unary_unary("/test/Reverse")
        assert await reverse(b"ab") == b"ba"
        peak = peak_bytes()
        attack = asyncio.create_task(asyncio.to_thread(flood, int(endpoint.listens_on), before, part))
        calls = 0
        while not attack.done() or not calls:
            assert await reverse(b"ab", timeout=10) == b"ba"
            calls += 1
        assert await attack is ends
        assert peak_bytes() - peak < 32 << 20
        assert await reverse(b"ab", timeout=10) == b"ba"
    await endpoint.stop()
