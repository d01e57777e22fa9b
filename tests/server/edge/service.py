"""A service behind the native edge, and clients of h2, which send whatever they are told."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import h2.connection
import h2.settings
from prometheus_client import CollectorRegistry

from server.access.callers import NOBODY
from server.access.gate import CALLER
from server.edge.endpoint import PortLimits
from server.edge.native_endpoint import NativeEndpoint
from server.telemetry.metrics import ConnectionMetrics

BYTES_MAX = 100_000


class Service:
    """Handlers that note what they saw of their call."""

    def __init__(self) -> None:
        self.running = 0
        self.cancelled = 0
        self.done = 0
        self.reading = 0
        self.read = 0
        self.denied = 0
        #: How many calls hung when each call of `reverse` began.
        self.running_beside: list[int] = []
        self.contexts: list[tuple[tuple[tuple[str, str | bytes], ...], str, float | None]] = []
        self.gate = asyncio.Event()

    async def reverse(self, request, context):
        self.running_beside.append(self.running)
        _note_proxy(request)
        self.contexts.append((context.invocation_metadata(), context.peer(), context.time_remaining()))
        context.add_done_callback(lambda _: setattr(self, "done", self.done + 1))
        return request[::-1]

    async def hang(self, _, context):
        context.add_done_callback(lambda _: setattr(self, "done", self.done + 1))
        self.running += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return b"at last"

    async def sizes(self, requests, _):
        await self.gate.wait()
        self.reading += 1
        try:
            async for request in requests:
                self.read += 1
                yield str(len(request)).encode()
        finally:
            self.reading -= 1

    async def refuse(self, _, context):
        await context.abort(grpc.StatusCode.ABORTED, "\xe9" * 100_000)

    async def deny(self, request, context):
        _note_proxy(request)
        self.denied += 1
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")


def _note_proxy(request: bytes) -> None:
    """Do as a gate does for a call that a proxy passes on."""
    if request == b"by a proxy":
        CALLER.set(replace(NOBODY, via="proxy"))


async def start(service: Service, host: str = "127.0.0.1", **limits: Any) -> NativeEndpoint:
    methods: dict[str, Any] = {
        "Reverse": grpc.unary_unary_rpc_method_handler(service.reverse),
        "Hang": grpc.unary_unary_rpc_method_handler(service.hang),
        "Deny": grpc.unary_unary_rpc_method_handler(service.deny),
        "Refuse": grpc.unary_unary_rpc_method_handler(service.refuse),
        "Sizes": grpc.stream_stream_rpc_method_handler(service.sizes),
    }
    endpoint = NativeEndpoint(
        {"test": methods}, PortLimits(BYTES_MAX, **limits), ConnectionMetrics(CollectorRegistry()), shared_port=False
    )
    await endpoint.start(host, 0)
    return endpoint


def begin(
    client: h2.connection.H2Connection,
    path: str,
    *contents: bytes,
    prefix: int | None = None,
    end: bool = True,
    **headers: str,
) -> None:
    """Send a call, with each content as one message; or all but the end of the last one."""
    stream = client.get_next_available_stream_id()
    every = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "test", "te": "trailers",
             "content-type": "application/grpc"} | headers  # fmt: skip
    client.send_headers(stream, list(every.items()))
    first = int("grpc-encoding" in headers) if prefix is None else prefix
    sent = b"".join(struct.pack(">BI", first, len(content)) + content for content in contents)
    for start in range(0, len(sent), 16_384):
        client.send_data(stream, sent[start : start + 16_384] if end else sent[start : start + 16_384][:-1])
    if end:
        client.end_stream(stream)


def answers(client: h2.connection.H2Connection, own: socket.socket, count: int) -> list[str]:
    """Read until so many calls have ended, and return their statuses and, for those that failed, messages."""
    found: list[str] = []
    while len(found) < count:
        for event in client.receive_data(own.recv(1 << 20)):
            headers = {name.decode(): value.decode() for name, value in getattr(event, "headers", None) or ()}
            if "grpc-status" in headers:
                found.append(" ".join(headers[name] for name in ("grpc-status", "grpc-message") if name in headers))
    return found


@asynccontextmanager
async def raw_client(endpoint: NativeEndpoint, window: int = 65_535) -> AsyncIterator[tuple[Any, socket.socket]]:
    """Connect with h2, which does what it is told, and with a window for answers of so many bytes."""
    client = h2.connection.H2Connection()
    client.initiate_connection()
    client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
    with socket.create_connection(("127.0.0.1", int(endpoint.listens_on)), timeout=60) as own:
        own.sendall(client.data_to_send())
        yield client, own
