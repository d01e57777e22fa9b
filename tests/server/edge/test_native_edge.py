"""The native edge on real sockets, with clients of grpcio."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import h2.connection
import h2.settings
import pytest
import uvloop

from server.edge import connection as edge_connection
from server.edge.native_endpoint import NativeEndpoint
from tests.conftest import eventually
from tests.server.edges import needs_native_edge

pytestmark = needs_native_edge
BYTES_MAX = 100_000


class Service:
    """Handlers that note what they saw of their call."""

    def __init__(self) -> None:
        self.running = 0
        self.cancelled = 0
        self.done = 0
        self.reading = 0
        self.read = 0
        self.contexts: list[tuple[tuple[tuple[str, str | bytes], ...], str, float | None]] = []
        self.gate = asyncio.Event()

    async def reverse(self, request, context):
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


@pytest.fixture
def service() -> Service:
    return Service()


async def start(service: Service, host: str = "127.0.0.1", age_s_max: float = 0) -> NativeEndpoint:
    methods: dict[str, Any] = {
        "Reverse": grpc.unary_unary_rpc_method_handler(service.reverse),
        "Hang": grpc.unary_unary_rpc_method_handler(service.hang),
        "Refuse": grpc.unary_unary_rpc_method_handler(service.refuse),
        "Sizes": grpc.stream_stream_rpc_method_handler(service.sizes),
    }
    endpoint = NativeEndpoint({"test": methods}, BYTES_MAX, age_s_max, shared_port=False)
    await endpoint.start(host, 0)
    return endpoint


@pytest.fixture
async def endpoint(service: Service) -> AsyncIterator[NativeEndpoint]:
    started = await start(service)
    yield started
    await started.stop()


@pytest.fixture
async def channel(endpoint: NativeEndpoint) -> AsyncIterator[grpc.aio.Channel]:
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}", own) as opened:
        yield opened


async def test_many_calls_at_once_each_get_their_own_answer(channel):
    reverse = channel.unary_unary("/test/Reverse")
    contents = [b"%d" % number * (number % 700) for number in range(500)]
    answers = await asyncio.gather(*(reverse(content) for content in contents))
    assert answers == [content[::-1] for content in contents]


async def test_the_largest_message_passes_and_a_larger_one_is_refused(channel):
    reverse = channel.unary_unary("/test/Reverse")
    assert await reverse(b"ab" * (BYTES_MAX // 2)) == b"ba" * (BYTES_MAX // 2)
    with pytest.raises(grpc.aio.AioRpcError, match=r"larger than max \(100001 vs. 100000\)") as raised:
        await reverse(bytes(BYTES_MAX + 1))
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await reverse(b"ab") == b"ba"


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_read(channel, compression):
    reverse = channel.unary_unary("/test/Reverse")
    content = b"ab" * 10_000
    assert await reverse(content, compression=compression) == content[::-1]


@pytest.mark.parametrize(
    ("encoding", "content", "code", "text"),
    [
        ("gzip", b"no gzip", grpc.StatusCode.INTERNAL, "cannot decompress"),
        ("gzip", gzip.compress(b"cut off" * 99)[:-9], grpc.StatusCode.INTERNAL, "cut off"),
        ("gzip", gzip.compress(bytes(BYTES_MAX + 1)), grpc.StatusCode.RESOURCE_EXHAUSTED, "more than 100000 bytes"),
        ("deflate", zlib.compress(bytes(50 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED, "more than 100000 bytes"),
        ("snappy", b"a", grpc.StatusCode.UNIMPLEMENTED, "'snappy' cannot be read; use gzip, deflate or none"),
    ],
    # Compressed bytes hold the time.
    ids=["no gzip", "cut off", "gzip bomb", "deflate bomb", "unknown"],
)
async def test_a_compressed_message_that_cannot_be_read_says_why(endpoint, encoding, content, code, text):
    client = h2.connection.H2Connection()
    client.initiate_connection()
    begin(client, "/test/Reverse", content, **{"grpc-encoding": encoding})
    with socket.create_connection(("127.0.0.1", int(endpoint.listens_on)), timeout=60) as own:
        own.sendall(client.data_to_send())
        (status,) = await asyncio.to_thread(answers, client, own, 1)
    assert status.startswith(str(code.value[0]))
    assert text in status


async def test_a_handler_sees_its_callers_metadata_address_and_time(channel, service):
    reverse = channel.unary_unary("/test/Reverse")
    await reverse(b"", metadata=(("authorization", "Bearer "), ("key-bin", b"\0\1\xff")), timeout=30)
    await reverse(b"")
    (metadata, peer, remaining_s), (_, _, unlimited) = service.contexts
    assert dict(metadata)["authorization"] == "Bearer "
    assert dict(metadata)["key-bin"] == b"\0\1\xff"
    assert peer.startswith("ipv4:127.0.0.1:")
    assert 20 < remaining_s < 31  # the client rounds it up
    assert unlimited is None


async def test_a_caller_that_gives_up_ends_its_handler(channel, service):
    calls = [channel.unary_unary("/test/Hang")(b"") for _ in range(3)]
    await eventually(lambda: service.running == 3)
    calls[0].cancel()
    await eventually(lambda: service.cancelled == 1)
    assert service.done == 1
    service.gate.set()
    assert await asyncio.gather(*calls[1:]) == [b"at last"] * 2
    assert (service.cancelled, service.done) == (1, 3)


async def test_a_deadline_ends_the_handler_of_a_client_that_does_not_give_up(endpoint, service):
    client = h2.connection.H2Connection()
    client.initiate_connection()
    begin(client, "/test/Hang", b"", **{"grpc-timeout": "20m"})
    with socket.create_connection(("127.0.0.1", int(endpoint.listens_on)), timeout=60) as own:
        own.sendall(client.data_to_send())
        (status,) = await asyncio.to_thread(answers, client, own, 1)
    assert status == f"{grpc.StatusCode.DEADLINE_EXCEEDED.value[0]} the call's deadline has passed"
    await eventually(lambda: service.cancelled == 1)


async def test_a_client_that_is_killed_ends_its_calls(endpoint, service):
    script = (
        "import grpc, sys\n"
        f"channel = grpc.insecure_channel('127.0.0.1:{endpoint.listens_on}')\n"
        "call = channel.unary_unary('/test/Hang').future(b'')\n"
        "call.result()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])  # noqa: ASYNC220
    await eventually(lambda: service.running == 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    await eventually(lambda: service.cancelled == 1)
    assert service.done == 1


async def test_what_is_not_http2_is_closed(endpoint, channel):
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.listens_on)
    writer.write(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
    while await reader.read(1_000):
        pass
    writer.close()
    assert await channel.unary_unary("/test/Reverse")(b"ab") == b"ba"


async def test_a_silent_connection_is_closed(endpoint, monkeypatch):
    monkeypatch.setattr(edge_connection, "_GREETING_S_MAX", 0.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.listens_on)
    while await reader.read(1_000):
        pass
    writer.close()


async def test_no_call_fails_when_its_connection_comes_of_age(service, monkeypatch):
    monkeypatch.setattr(edge_connection, "_RETIREMENT_S", 0.05)
    endpoint = await start(service, age_s_max=0.1)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}") as channel:
        reverse = channel.unary_unary("/test/Reverse")

        def peers() -> set[str]:
            return {peer for _, peer, _ in service.contexts}

        while len(peers()) < 4:
            assert await asyncio.gather(*(reverse(b"ab") for _ in range(20))) == [b"ba"] * 20
        await eventually(lambda: len(endpoint.connections) <= 1)
    await endpoint.stop()


async def test_a_client_that_does_not_read_its_answers_is_not_read_either(endpoint, channel):
    count, content = 300, bytes(60_000)
    client = h2.connection.H2Connection()
    client.initiate_connection()
    client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 24})
    client.increment_flow_control_window(1 << 30)
    with socket.create_connection(("127.0.0.1", int(endpoint.listens_on)), timeout=60) as own:
        own.sendall(client.data_to_send())
        while client.outbound_flow_control_window < count * len(content):
            client.receive_data(await asyncio.to_thread(own.recv, 65_536))
        for _ in range(count):
            begin(client, "/test/Reverse", content)
        requests = client.data_to_send()
        sending = asyncio.ensure_future(asyncio.to_thread(own.sendall, requests))
        (connection,) = endpoint.connections
        await eventually(lambda: not connection.is_reading)
        assert await channel.unary_unary("/test/Reverse")(b"ab") == b"ba"
        assert await asyncio.to_thread(answers, client, own, count) == ["0"] * count
        await sending


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


async def test_a_client_that_keeps_its_connection_open_does_not_hold_up_the_end_of_others(endpoint, channel, service):
    async with raw_client(endpoint) as (client, own):
        client.close_connection()
        own.sendall(client.data_to_send())
        await eventually(lambda: any(one.has_ended for one in endpoint.connections))
        stuck = asyncio.ensure_future(channel.unary_unary("/test/Hang")(b""))
        await eventually(lambda: service.running == 1)
        hanging_up = asyncio.ensure_future(endpoint.hang_up())
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stuck
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        own.sendall(struct.pack(">I", 8)[1:] + b"\6\0" + bytes(4) + bytes(8))  # a PING that nobody answers
        await hanging_up
    assert endpoint.connections == set()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not list open descriptors there")
async def test_a_killed_server_closes_its_listeners_before_its_connections(service, tmp_path):
    for host in ("127.0.0.1", f"unix:{tmp_path}/socket"):
        endpoint = await start(service, host)
        assert is_listener(highest_descriptor())
        await endpoint.stop()


def highest_descriptor() -> int:
    return max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())


def is_listener(number: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(number)) as own:
            return bool(own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:  # it is no socket
        return False


async def test_what_fails_at_once_leaves_no_handler_behind(endpoint, service):
    service.gate.set()
    async with raw_client(endpoint) as (client, own):
        for _ in range(5):
            begin(client, "/test/Reverse", b"no gzip", **{"grpc-encoding": "gzip"})
            begin(client, "/test/Sizes", b"", prefix=2)
        own.sendall(client.data_to_send())
        statuses = await asyncio.to_thread(answers, client, own, 10)
        assert {status.split()[0] for status in statuses} == {str(grpc.StatusCode.INTERNAL.value[0])}
        await eventually(lambda: not any(one.calls for one in endpoint.connections))
    assert service.reading == 0


@pytest.mark.parametrize("path", ["/test/Reverse", "/test/Sizes"])
async def test_an_answer_that_the_client_does_not_take_is_given_up_at_the_deadline(endpoint, service, path):
    service.gate.set()
    async with raw_client(endpoint, window=0) as (client, own):
        begin(client, path, b"ab", **{"grpc-timeout": "50m"})
        own.sendall(client.data_to_send())
        await eventually(lambda: any(one.calls for one in endpoint.connections))
        await eventually(lambda: not any(one.calls for one in endpoint.connections))
    assert service.reading == 0


async def test_a_request_that_does_not_come_whole_ends_at_its_deadline_or_with_the_server(endpoint, service):
    async with raw_client(endpoint) as (client, own):
        for headers in ({"grpc-timeout": "50m"}, {}):
            begin(client, "/test/Reverse", b"half", end=False, **headers)
        own.sendall(client.data_to_send())
        (late,) = await asyncio.to_thread(answers, client, own, 1)
        assert late.startswith(str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0]))
        hanging_up = asyncio.ensure_future(endpoint.hang_up())
        (cut_off,) = await asyncio.to_thread(answers, client, own, 1)
        assert cut_off.startswith(str(grpc.StatusCode.UNAVAILABLE.value[0]))
        await hanging_up


async def test_a_stream_that_is_not_read_waits_in_its_handler(endpoint, service):
    service.gate.set()
    async with raw_client(endpoint, window=8) as (client, own):
        begin(client, "/test/Sizes", b"", *[b""] * 99)
        own.sendall(client.data_to_send())
        await eventually(lambda: service.reading == 1)
        await eventually(lambda: service.read == 2)  # one answer of 6 bytes passed, the second waits
        client.increment_flow_control_window(600, 1)
        own.sendall(client.data_to_send())
        assert await asyncio.to_thread(answers, client, own, 1) == ["0"]
    assert service.read == 100


async def test_a_status_of_any_length_ends_its_call(channel):
    with pytest.raises(grpc.aio.AioRpcError, match=r"\(100000 characters\)") as raised:
        await channel.unary_unary("/test/Refuse")(b"")
    assert raised.value.code() == grpc.StatusCode.ABORTED


@pytest.mark.parametrize("form", ["127.0.0.1", "unix"])
async def test_hanging_up_answers_unavailable_and_frees_the_address(service, tmp_path, form, caplog):
    caplog.set_level(logging.WARNING)
    host = f"unix:{tmp_path}/socket" if form == "unix" else form
    endpoint = await start(service, host)
    target = host if form == "unix" else f"{form}:{endpoint.listens_on}"
    async with grpc.aio.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stuck = asyncio.ensure_future(channel.unary_unary("/test/Hang")(b""))
        await eventually(lambda: service.running == 1)
        await endpoint.hang_up()
        with pytest.raises(grpc.aio.AioRpcError, match="the server is shutting down") as raised:
            await stuck
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    assert service.cancelled == service.done == 1
    assert not (tmp_path / "socket").exists()
    second = NativeEndpoint({}, BYTES_MAX, 0, shared_port=False)
    await second.start(host, 0 if form == "unix" else int(endpoint.listens_on))
    assert second.listens_on == endpoint.listens_on
    await second.stop()
    assert caplog.records == []


async def test_a_stream_is_answered_message_by_message(channel, service):
    call = channel.stream_stream("/test/Sizes")()
    service.gate.set()
    for size in (1, 2, 3):
        await call.write(bytes(size))
        assert int(await call.read()) == size
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize(
    "test",
    [
        test_many_calls_at_once_each_get_their_own_answer,
        test_the_largest_message_passes_and_a_larger_one_is_refused,
        test_a_caller_that_gives_up_ends_its_handler,
        test_a_deadline_ends_the_handler_of_a_client_that_does_not_give_up,
        test_what_is_not_http2_is_closed,
        test_a_client_that_does_not_read_its_answers_is_not_read_either,
        test_a_stream_is_answered_message_by_message,
    ],
    ids=lambda test: test.__name__,
)
def test_the_same_holds_on_uvloop(test):
    """The server runs on uvloop, and the tests on asyncio's own event loop."""

    async def run() -> None:
        service = Service()
        endpoint = await start(service)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}") as channel:
            parts = {"service": service, "endpoint": endpoint, "channel": channel}
            await test(*(parts[name] for name in inspect.signature(test).parameters))
        await endpoint.hang_up()

    uvloop.run(run())
