"""Connections that are too many, idle, silent, or begin calls only to end them, on the native gRPC port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

import grpc.aio
import h2.connection
import h2.errors
import h2.events
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from server.edge.native_endpoint import NativeEndpoint
from tests.conftest import eventually
from tests.server.edge.service import Service, answers, begin, raw_client, start


@pytest.fixture
def service():
    return Service()


def idle(endpoint: NativeEndpoint) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(endpoint.listens_on)), timeout=60)


def closed(endpoint: NativeEndpoint, reason: str) -> int:
    return endpoint._served.crowd.metrics._closed.counts[reason,]


def is_closed(own: socket.socket) -> Callable[[], bool]:
    """Return a function that tells whether the server has closed a connection, after reading what it said."""
    own.settimeout(0)

    def ended() -> bool:
        try:
            while own.recv(1 << 16):
                pass
        except BlockingIOError:
            return False
        except ConnectionResetError:
            pass
        return True

    return ended


async def test_a_newcomer_takes_the_place_of_the_oldest_that_never_had_a_call(service):
    endpoint = await start(service, connections_max=3)
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}", own) as channel:
        reverse = channel.unary_unary("/test/Reverse")
        assert await reverse(b"ab") == b"ba"
        (good,) = endpoint.connections
        flood = []
        for count in range(2, 60):
            flood.append(idle(endpoint))
            await eventually(lambda count=count: closed(endpoint, "crowded") == max(0, count - 3))
            await eventually(lambda count=count: len(endpoint.connections) == min(count, 3))
        await eventually(is_closed(flood[0]))
        assert not is_closed(flood[-1])()
        assert endpoint.connections > {good}
        assert await reverse(b"ab") == b"ba"
        assert {peer for _, peer, _ in service.contexts} == {good._peer}, "it is the same connection"
    for one in flood:
        one.close()
    await endpoint.stop()


async def test_a_newcomer_waits_outside_while_all_others_have_calls(service):
    endpoint = await start(service, connections_max=2)
    async with raw_client(endpoint) as (one, own), raw_client(endpoint) as (two, other):
        for client, connection in ((one, own), (two, other)):
            begin(client, "/test/Hang", b"")
            connection.sendall(client.data_to_send())
        await eventually(lambda: service.running == 2)
        newcomer = idle(endpoint)
        await eventually(is_closed(newcomer))
        assert len(endpoint.connections) == 2
        service.gate.set()
        await eventually(lambda: service.done == 2)
        # Both rest now, and the one that rests for longer goes.
        third = idle(endpoint)
        await eventually(lambda: closed(endpoint, "crowded") == 2)
        assert not is_closed(third)()
        newcomer.close()
        third.close()
    await endpoint.stop()


async def test_calls_begun_only_to_be_ended_end_the_connection_and_no_other(service):
    endpoint = await start(service)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}") as channel:
        reverse = channel.unary_unary("/test/Reverse")
        async with raw_client(endpoint) as (client, own):
            own.settimeout(0)
            loop, told = asyncio.get_running_loop(), list[h2.events.Event]()
            for number in range(4_000):
                begin(client, "/test/Hang", b"", end=False)
                client.reset_stream(2 * number + 1, h2.errors.ErrorCodes.CANCEL)
                if number % 100 == 99:
                    try:
                        await loop.sock_sendall(own, client.data_to_send())
                    except (BrokenPipeError, ConnectionResetError):
                        break
                    assert await reverse(b"ab") == b"ba"
            try:
                while content := await asyncio.wait_for(loop.sock_recv(own, 1 << 16), 20):
                    told += client.receive_data(content)
            except ConnectionResetError:
                pass
        assert await reverse(b"ab") == b"ba"
    ended = [event.error_code for event in told if isinstance(event, h2.events.ConnectionTerminated)]
    assert ended in ([h2.errors.ErrorCodes.ENHANCE_YOUR_CALM], [])
    assert closed(endpoint, "resets") == 1
    assert service.running == 0
    await endpoint.stop()


async def test_a_client_may_give_up_all_its_calls_at_once(service):
    endpoint = await start(service)
    async with raw_client(endpoint) as (client, own):
        own.settimeout(0)
        loop = asyncio.get_running_loop()
        for _ in range(1_000):
            begin(client, "/test/Hang", b"")
        await loop.sock_sendall(own, client.data_to_send())
        await eventually(lambda: service.running == 1_000)
        for number in range(1_000):
            client.reset_stream(2 * number + 1, h2.errors.ErrorCodes.CANCEL)
        await loop.sock_sendall(own, client.data_to_send())
        await eventually(lambda: service.cancelled == 1_000)
        assert len(endpoint.connections) == 1
    await endpoint.stop()


async def test_a_connection_without_calls_is_closed_after_its_time_and_no_call_fails(service, monkeypatch):
    monkeypatch.setattr("server.edge.connection.RETIREMENT_S", 0.05)
    endpoint = await start(service, connection_idle_s_max=0.1)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}") as channel:
        reverse, hang = channel.unary_unary("/test/Reverse"), channel.unary_unary("/test/Hang")
        for count in range(1, 4):
            assert await reverse(b"ab") == b"ba"
            await eventually(lambda count=count: closed(endpoint, "idle") == count)
            await eventually(lambda: not endpoint.connections)
        pending = hang(b"")
        await eventually(lambda: service.running == 1)
        (busy,) = endpoint.connections
        silent = idle(endpoint)
        await eventually(lambda: closed(endpoint, "idle") == 4)  # the silent one is as old, and idle
        assert busy in endpoint.connections
        service.gate.set()
        assert await pending == b"at last"
        silent.close()
    await endpoint.stop()


async def test_what_is_no_http2_is_counted(service):
    endpoint = await start(service)
    other = idle(endpoint)
    other.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await eventually(lambda: closed(endpoint, "broken") == 1)
    await eventually(is_closed(other))
    other.close()
    await endpoint.stop()


async def test_calls_that_are_begun_and_not_made_keep_nobody_out_and_end(service, monkeypatch):
    monkeypatch.setattr("server.edge.connection._ASKING_S", 0.3)
    endpoint = await start(service, connections_max=2)
    async with raw_client(endpoint) as (one, own), raw_client(endpoint) as (two, other):
        for client, connection in ((one, own), (two, other)):
            begin(client, "/test/Hang", b"ab", end=False, **{"grpc-timeout": "99999999H"})
            connection.sendall(client.data_to_send())
        await eventually(lambda: sum(connection.calls for connection in endpoint.connections) == 2)
        newcomer = idle(endpoint)
        await eventually(lambda: closed(endpoint, "crowded") == 1)
        assert not is_closed(newcomer)()
        assert service.running == 0
        newcomer.close()
        (status,) = await asyncio.to_thread(answers, two, other, 1)
        assert status.startswith(("4 no%20whole%20request", "4 no whole request"))
    await endpoint.stop()


async def test_an_answer_that_is_not_taken_is_given_up_whatever_the_deadline(service, monkeypatch):
    monkeypatch.setattr("server.edge.connection._TAKING_S", 0.2)
    endpoint = await start(service)
    async with raw_client(endpoint, window=10) as (client, own):
        begin(client, "/test/Reverse", bytes(1_000), **{"grpc-timeout": "99999999H"})
        own.sendall(client.data_to_send())
        await eventually(lambda: service.done == 1)
        (connection,) = endpoint.connections
        await eventually(lambda: connection.calls == 0)
    await endpoint.stop()


async def test_streams_that_say_nothing_keep_nobody_out(service):
    endpoint = await start(service, connections_max=2)
    service.gate.set()
    async with raw_client(endpoint) as (one, own), raw_client(endpoint) as (two, other):
        for client, connection in ((one, own), (two, other)):
            begin(client, "/test/Sizes", b"ab", end=False)  # all of a message but its last byte
            connection.sendall(client.data_to_send())
        await eventually(lambda: service.reading == 2)
        newcomer = idle(endpoint)
        await eventually(lambda: closed(endpoint, "crowded") == 1)
        assert not is_closed(newcomer)()
        newcomer.close()
    await endpoint.stop()


async def test_a_stream_whose_message_is_being_handled_keeps_its_place(service):
    endpoint = await start(service, connections_max=1)
    async with raw_client(endpoint) as (client, own):
        begin(client, "/test/Sizes", b"abc")
        own.sendall(client.data_to_send())
        await eventually(lambda: sum(len(connection._working) for connection in endpoint.connections) == 1)
        newcomer = idle(endpoint)
        await eventually(is_closed(newcomer))
        service.gate.set()
        assert await asyncio.to_thread(answers, client, own, 1) == ["0"]
        newcomer.close()
    await endpoint.stop()


async def test_an_old_connection_whose_streams_say_nothing_is_closed(service, monkeypatch):
    monkeypatch.setattr("server.edge.connection.RETIREMENT_S", 0.05)
    monkeypatch.setattr("server.edge.connection._TAKING_S", 0.2)
    endpoint = await start(service, connection_age_s_max=0.1)
    service.gate.set()
    async with raw_client(endpoint) as (client, own):
        begin(client, "/test/Sizes", b"abc", end=False)
        own.sendall(client.data_to_send())
        await eventually(lambda: service.reading == 1)
        await eventually(lambda: not endpoint.connections)
        assert service.reading == 0
    await endpoint.stop()


async def test_a_client_that_reads_nothing_loses_its_connection(service, monkeypatch):
    monkeypatch.setattr("server.edge.connection._TAKING_S", 0.2)
    endpoint = await start(service)
    async with raw_client(endpoint, window=1 << 30) as (client, own):
        own.settimeout(0)

        async def call() -> None:
            loop = asyncio.get_running_loop()
            while client.outbound_flow_control_window < 1 << 30:  # what the server says at first
                client.receive_data(await loop.sock_recv(own, 1 << 16))
            client.increment_flow_control_window(1 << 30)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(200):
                    begin(client, "/test/Reverse", bytes(60_000))
                    await loop.sock_sendall(own, client.data_to_send())

        calling = asyncio.create_task(call())
        await eventually(lambda: closed(endpoint, "unread") == 1)
        await eventually(lambda: not endpoint.connections)
        await calling
    await endpoint.stop()


async def test_a_clients_many_calls_leave_others_their_turn(service, monkeypatch):
    monkeypatch.setattr("server.edge.connection._BEGUN_A_TURN", 10)
    endpoint = await start(service)
    async with raw_client(endpoint) as (many, own), raw_client(endpoint) as (few, other):
        await eventually(lambda: len(endpoint.connections) == 2)
        for _ in range(300):
            begin(many, "/test/Hang", b"")
        begin(few, "/test/Reverse", b"ab")
        # Both have sent all before the server, which runs in this thread, reads anything.
        own.sendall(many.data_to_send())
        other.sendall(few.data_to_send())
        service.gate.set()
        assert len(await asyncio.to_thread(answers, many, own, 300)) == 300
        assert await asyncio.to_thread(answers, few, other, 1) == ["0"]
        (running,) = service.running_beside
        assert running <= 50
    await endpoint.stop()


@pytest.mark.parametrize(("content", "answered"), [(b"", 20), (b"by a proxy", 300)])
async def test_refused_calls_wait_beyond_a_rate_unless_a_proxy_passes_them_on(service, monkeypatch, content, answered):
    monkeypatch.setattr("server.edge.crowd._FREE_CALLS_AT_ONCE", 20)
    monkeypatch.setattr("server.edge.crowd._FREE_CALLS_PER_S", 0.001)
    monkeypatch.setattr("server.edge.connection._BEGUN_A_TURN", 1)
    endpoint = await start(service)
    async with raw_client(endpoint) as (client, own):
        own.settimeout(0)
        loop = asyncio.get_running_loop()
        await eventually(lambda: endpoint.connections)
        (connection,) = endpoint.connections
        for number in range(300):
            if not connection.is_reading:
                break
            begin(client, "/test/Deny", content)
            await loop.sock_sendall(own, client.data_to_send())
            await eventually(lambda number=number: service.denied > number)
        assert service.denied == answered
        assert connection.is_reading == (content == b"by a proxy")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}") as channel:
            assert await channel.unary_unary("/test/Reverse")(b"ab") == b"ba"
    await endpoint.stop()


@pytest.mark.parametrize("method", ["Deny", "Reverse"])
async def test_a_connection_has_few_calls_that_only_wait_unless_it_is_a_proxys(service, method):
    endpoint = await start(service)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}") as channel:
        watch = HealthStub(channel).Watch
        watching = [watch(HealthCheckRequest()) for _ in range(8)]
        for one in watching:
            assert (await one.read()).status == HealthCheckResponse.SERVING
        more = watch(HealthCheckRequest())
        assert await more.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        watching[0].cancel()
        (connection,) = endpoint.connections
        await eventually(lambda: connection.calls == 7)
        assert (await watch(HealthCheckRequest()).read()).status == HealthCheckResponse.SERVING
        # Behind a proxy, they are many clients'.
        with contextlib.suppress(grpc.aio.AioRpcError):
            await channel.unary_unary(f"/test/{method}")(b"by a proxy")
        for _ in range(4):
            assert (await watch(HealthCheckRequest()).read()).status == HealthCheckResponse.SERVING
    await endpoint.stop()
