"""The native edge against clients that grpcio's are not: broken, slow, silent or greedy ones."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import zlib

import grpc
import grpc.aio
import h2.connection
import h2.settings
import pytest

from server.edge import connection as edge_connection
from tests.conftest import eventually
from tests.server.edge.service import BYTES_MAX, answers, begin, raw_client
from tests.server.edges import needs_native_edge

pytestmark = needs_native_edge


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


async def test_a_deadline_ends_the_handler_of_a_client_that_does_not_give_up(endpoint, service):
    client = h2.connection.H2Connection()
    client.initiate_connection()
    begin(client, "/test/Hang", b"", **{"grpc-timeout": "20m"})
    with socket.create_connection(("127.0.0.1", int(endpoint.listens_on)), timeout=60) as own:
        own.sendall(client.data_to_send())
        (status,) = await asyncio.to_thread(answers, client, own, 1)
    assert status == f"{grpc.StatusCode.DEADLINE_EXCEEDED.value[0]} the call's deadline has passed"
    await eventually(lambda: service.cancelled == 1)


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
