"""A server that stops, as its callers see it: an answer or UNAVAILABLE, whatever they are at."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections import Counter

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pinrank.v1 import activity_pb2, activity_pb2_grpc, ranking_pb2, ranking_pb2_grpc
from server.edge.connection import RETIREMENT_S
from server.edge.hang_up import hang_up
from server.runtime.signals import Ending, ending_signals
from tests.conftest import eventually

REQUEST = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")


class SlowCall:
    """A call in flight, until `end`."""

    def add_done_callback(self, callback):
        self._callback = callback

    def end(self):
        self._callback(self)


@pytest.mark.parametrize("form", ["127.0.0.1", "unix"])
async def test_calls_under_load_end_with_an_answer_or_unavailable(start_server, tmp_path, form):
    server = await start_server(host=f"unix:{tmp_path}/socket" if form == "unix" else form)
    target = f"unix:{server.listens_on}" if form == "unix" else f"127.0.0.1:{server.grpc_port}"
    ended: Counter[str] = Counter()

    async def caller(rank):
        # A refusal to connect is UNAVAILABLE too: the caller is done.
        while not ended["UNAVAILABLE: connect"]:
            try:
                await rank(REQUEST, timeout=20)
                ended["OK"] += 1
            except grpc.aio.AioRpcError as error:
                connecting = ": connect" if "connect" in error.details() else ""
                ended[error.code().name + connecting] += 1

    async with contextlib.AsyncExitStack() as channels:
        own = [("grpc.use_local_subchannel_pool", 1)]
        opened = [await channels.enter_async_context(grpc.aio.insecure_channel(target, own)) for _ in range(4)]
        ranks = [ranking_pb2_grpc.RankingServiceStub(opened[i % 4]).Rank for i in range(64)]
        calling = asyncio.gather(*map(caller, ranks))
        await eventually(lambda: ended["OK"] > 300)
        slow = SlowCall()
        server.calls.take(slow)  # so that the drain lasts until callers have met it
        draining = asyncio.ensure_future(server.drain_and_close())
        await eventually(lambda: ended["UNAVAILABLE"] > 0)
        slow.end()
        await draining
        await calling
    assert set(ended) <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNAVAILABLE: connect"}
    assert ended["UNAVAILABLE"] > 0
    # What was ranked has arrived.
    ranked = server.metrics.registry.get_sample_value("pinrank_requests_total", {"surface": "home", "code": "OK"})
    assert ended["OK"] == ranked


async def test_impatience_cuts_off_what_is_in_flight_with_unavailable(gated, capfd):
    server, engine = gated
    engine.gate.clear()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stuck = asyncio.ensure_future(ranking_pb2_grpc.RankingServiceStub(channel).Rank(REQUEST, timeout=30))
        await eventually(lambda: len(engine.runs) == 1)
        ending = Ending()
        ending.heard(signal.SIGTERM)
        ending.heard(signal.SIGTERM)
        draining = asyncio.ensure_future(server.drain_and_close(ending.hurried))
        await eventually(lambda: server.calls.draining)
        assert not ending.hurried.is_set()
        ending.heard(signal.SIGINT)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stuck
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        engine.gate.set()
        await draining
    assert "drain_ended_early" in capfd.readouterr().out


@pytest.mark.parametrize("grpc_edge", ["native", "grpcio"])
async def test_a_lame_duck_says_so_and_answers_everybody(start_server, grpc_edge):
    server = await start_server(lame_duck_s=600, grpc_edge=grpc_edge)
    hurry = asyncio.Event()
    draining = asyncio.ensure_future(server.drain_and_close(hurry))
    for _ in range(2):
        own = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", own) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answered = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert answered.status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert len((await ranking_pb2_grpc.RankingServiceStub(channel).Rank(REQUEST, timeout=20)).pin_ids) == 3
    hurry.set()
    await draining


async def test_a_lame_duck_sends_its_clients_to_another_connection_without_a_failed_call(start_server):
    server = await start_server(lame_duck_s=RETIREMENT_S, grpc_edge="native")
    hurry = asyncio.Event()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        rank = ranking_pb2_grpc.RankingServiceStub(channel).Rank
        await rank(REQUEST, timeout=20)
        (first,) = server._endpoint.connections
        draining = asyncio.ensure_future(server.drain_and_close(hurry))
        while first in server._endpoint.connections or not server._endpoint.connections:
            if server.calls.draining:
                break
            await rank(REQUEST, timeout=20)
        assert first not in server._endpoint.connections
        hurry.set()
        await draining


@pytest.mark.parametrize(("before", "heeded"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_the_end_of_a_terminal_is_heeded_unless_it_was_to_be_ignored(before, heeded):
    own = signal.signal(signal.SIGHUP, before)
    try:
        assert (signal.SIGHUP in ending_signals()) == heeded
    finally:
        signal.signal(signal.SIGHUP, own)


async def test_actions_that_are_being_stored_are_waited_for(start_server, monkeypatch):
    server = await start_server(record_actions=True)
    storing, stored = asyncio.Event(), asyncio.Event()

    writer = server.status.recorded[0].writer
    record = writer.record

    async def slow_record(*arguments):
        storing.set()
        await stored.wait()
        return await record(*arguments)

    monkeypatch.setattr(writer, "record", slow_record)
    action = activity_pb2.Action(
        user_id=1, pin_id=2, time_ms=int(time.time() * 1e3), event_id=3, action="save", surface="home"
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        record_call = activity_pb2_grpc.ActivityServiceStub(channel).Record
        call = asyncio.ensure_future(record_call(activity_pb2.RecordRequest(actions=[action]), timeout=30))
        await storing.wait()
        draining = asyncio.ensure_future(server.drain_and_close())
        await eventually(lambda: server.calls.draining)
        stored.set()
        assert (await call).added == 1
        await draining


def test_hang_up_leaves_other_sockets_alone_and_what_was_written_arrives():
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.create_server(("127.0.0.1", 0)) as others:
        clients = [socket.create_connection(listener.getsockname()) for listener in (ours, others)]
        accepted = [listener.accept()[0] for listener in (ours, others)]
        port = ours.getsockname()[1]
        accepted[0].sendall(b"last words")
        hang_up(port)
        assert clients[0].recv(100) == b"last words"
        assert clients[0].recv(100) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        accepted[1].sendall(b"on we go")
        assert clients[1].recv(100) == b"on we go"
        socket.create_connection(others.getsockname()).close()
        for one in (*clients, *accepted):
            one.close()
