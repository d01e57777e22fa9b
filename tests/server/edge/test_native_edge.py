"""The native edge on real sockets, with clients of grpcio."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from server.edge import connection as edge_connection
from server.edge.endpoint import PortLimits
from server.edge.native_endpoint import NativeEndpoint
from server.telemetry.metrics import ConnectionMetrics
from tests.conftest import eventually
from tests.server.edge.service import BYTES_MAX, start
from tests.server.edges import needs_native_edge

pytestmark = needs_native_edge


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


async def test_no_call_fails_when_its_connection_comes_of_age(service, monkeypatch):
    monkeypatch.setattr(edge_connection, "RETIREMENT_S", 0.05)
    endpoint = await start(service, connection_age_s_max=0.1)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}") as channel:
        reverse = channel.unary_unary("/test/Reverse")

        def peers() -> set[str]:
            return {peer for _, peer, _ in service.contexts}

        while len(peers()) < 4:
            assert await asyncio.gather(*(reverse(b"ab") for _ in range(20))) == [b"ba"] * 20
        await eventually(lambda: len(endpoint.connections) <= 1)
    await endpoint.stop()


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
    second = NativeEndpoint({}, PortLimits(BYTES_MAX), ConnectionMetrics(CollectorRegistry()), shared_port=False)
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
