"""Deadlines, cancellation, overload and shutdown, against an engine that waits at a gate."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from tests.conftest import eventually


def request(rows=3):
    return ranking_pb2.RankRequest(user_id=1, pin_ids=range(1, rows + 1), surface="home")


@pytest.fixture
async def stub(gated):
    server, _ = gated
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield ranking_pb2_grpc.RankingServiceStub(channel)


def sample(server, name, **labels):
    return server.metrics.value(name, **labels) or 0


async def test_request_whose_deadline_passes_in_the_queue_is_never_scored(gated, stub):
    server, engine = gated
    engine.gate.clear()
    running = asyncio.ensure_future(stub.Rank(request(rows=3), timeout=30))
    await eventually(lambda: len(engine.runs) == 1)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Rank(request(rows=40), timeout=0.05)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    engine.gate.set()
    assert len((await running).pin_ids) == 3
    await eventually(lambda: server.status.idle_streams == 1)
    assert [batch.rows for batch in engine.runs] == [3]
    assert sample(server, "pinrank_expired_rows_total") + sample(server, "pinrank_cancelled_rows_total") == 40


async def test_cancelled_request_is_never_scored_and_frees_its_place(gated, stub):
    server, engine = gated
    engine.gate.clear()
    running = asyncio.ensure_future(stub.Rank(request(rows=3), timeout=30))
    await eventually(lambda: len(engine.runs) == 1)
    queued = stub.Rank(request(rows=40), timeout=30)
    await eventually(lambda: sample(server, "pinrank_rows_in_flight") == 43)
    queued.cancel()
    await eventually(lambda: sample(server, "pinrank_rows_in_flight") == 3)
    engine.gate.set()
    await running
    assert [batch.rows for batch in engine.runs] == [3]
    assert sample(server, "pinrank_cancelled_rows_total") == 40


async def test_caller_that_hangs_up_during_its_run_harms_nobody(gated, stub):
    server, engine = gated
    engine.gate.clear()
    running = stub.Rank(request(rows=3), timeout=30)
    await eventually(lambda: len(engine.runs) == 1)
    running.cancel()
    await eventually(lambda: sample(server, "pinrank_requests_in_flight") == 0)
    engine.gate.set()
    assert len((await stub.Rank(request(rows=5), timeout=30)).pin_ids) == 5


async def test_full_server_refuses_at_once_and_says_when_to_come_back(gated, stub):
    server, engine = gated
    engine.gate.clear()
    accepted = [asyncio.ensure_future(stub.Rank(request(rows=3), timeout=30)) for _ in range(4)]
    await eventually(lambda: sample(server, "pinrank_requests_in_flight") == 4)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Rank(request(rows=3), timeout=30)
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "4 requests are in flight, and the limit is 4" in raised.value.details()
    assert int(dict(raised.value.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as unread:
            await channel.unary_unary("/pinrank.v1.RankingService/Rank")(b"no message", timeout=30)
    assert unread.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, "refused before it is parsed"
    engine.gate.set()
    assert all(len(answer.pin_ids) == 3 for answer in await asyncio.gather(*accepted))


async def test_rows_in_flight_are_limited_but_a_large_request_alone_is_served(gated, stub):
    server, engine = gated
    assert len((await stub.Rank(request(rows=80), timeout=30)).pin_ids) == 80
    engine.gate.clear()
    accepted = asyncio.ensure_future(stub.Rank(request(rows=50), timeout=30))
    await eventually(lambda: sample(server, "pinrank_rows_in_flight") == 50)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Rank(request(rows=20), timeout=30)
    assert "50 rows are in flight and the request has 20, but the limit is 60" in raised.value.details()
    engine.gate.set()
    await accepted


async def test_failed_run_fails_its_own_requests_and_quotes_nothing_of_their_rows(gated, stub):
    _, engine = gated
    engine.failing = True
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Rank(request(), timeout=30)
    assert raised.value.code() == grpc.StatusCode.INTERNAL
    assert raised.value.details() == "the engine failed in a run of 3 rows; see the server's log for the cause"
    engine.failing = False
    assert len((await stub.Rank(request(), timeout=30)).pin_ids) == 3


async def test_small_requests_that_wait_share_a_run_and_get_their_own_rows(gated, stub):
    server, engine = gated
    alone = [list((await stub.Rank(request(rows=n), timeout=30)).pin_ids) for n in (3, 4, 5)]
    engine.gate.clear()
    engine.runs.clear()
    blocker = asyncio.ensure_future(stub.Rank(request(rows=2), timeout=30))
    await eventually(lambda: len(engine.runs) == 1)
    together = [asyncio.ensure_future(stub.Rank(request(rows=n), timeout=30)) for n in (3, 4, 5)]
    await eventually(lambda: sample(server, "pinrank_rows_in_flight") == 14)
    engine.gate.set()
    answers = [list(answer.pin_ids) for answer in await asyncio.gather(*together)]
    await blocker
    assert sum(batch.rows for batch in engine.runs) == 14
    assert len(engine.runs) < 4
    assert answers == alone


async def test_draining_server_says_not_serving_finishes_what_runs_and_refuses_the_rest(gated, stub):
    server, engine = gated
    engine.gate.clear()
    running = asyncio.ensure_future(stub.Rank(request(), timeout=30))
    await eventually(lambda: len(engine.runs) == 1)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="pinrank.v1.RankingService"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        draining = asyncio.ensure_future(server.drain_and_close())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Rank(request(), timeout=30)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in raised.value.details()
        assert not draining.done()
        engine.gate.set()
        assert len((await running).pin_ids) == 3
        watch.cancel()
        await draining


async def test_fault_of_our_own_is_logged_and_tells_the_caller_nothing(gated, stub, monkeypatch, capfd):
    def explode(*_):
        raise IndexError("secret")

    monkeypatch.setattr("server.request.pipeline._degradation", explode)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Rank(request(), timeout=30)
    assert raised.value.code() == grpc.StatusCode.INTERNAL
    assert raised.value.details() == "internal error; the server's log has the details"
    logged = capfd.readouterr()
    assert "request_failed" in logged.out + logged.err
    assert "IndexError" in logged.out + logged.err
    server, _ = gated
    assert sample(server, "pinrank_requests_total", surface="home", code="INTERNAL") == 1


async def test_batch_that_cannot_be_joined_fails_its_members_and_frees_its_stream(gated, stub, monkeypatch):
    server, engine = gated
    engine.gate.clear()
    blocker = asyncio.ensure_future(stub.Rank(request(rows=2), timeout=30))
    await eventually(lambda: len(engine.runs) == 1)
    together = [asyncio.ensure_future(stub.Rank(request(rows=n), timeout=30)) for n in (3, 4)]
    await eventually(lambda: sample(server, "pinrank_rows_in_flight") == 9)
    with monkeypatch.context() as patched:
        patched.setattr("kernels.engine.FeatureBatch.concat", lambda _: 1 / 0)
        engine.gate.set()
        await blocker
        for call in together:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert raised.value.code() == grpc.StatusCode.INTERNAL
    assert len((await stub.Rank(request(), timeout=30)).pin_ids) == 3


async def test_request_without_a_grpc_deadline_is_answered_by_its_surfaces_while_the_engine_is_stuck(gated, stub):
    server, engine = gated
    engine.gate.clear()
    stuck = asyncio.ensure_future(stub.Rank(request(rows=3), timeout=30))
    await eventually(lambda: len(engine.runs) == 1)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Rank(request(rows=40))  # the surface's 100 ms
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "no scores by the deadline; the request waited" in raised.value.details()
    assert not stuck.done()
    assert sample(server, "pinrank_expired_rows_total") == 40
    engine.gate.set()
    await stuck


async def test_store_that_fails_and_comes_back_is_logged_once_each(start_server, capfd):
    server = await start_server(feature_store="memory://")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        rank = ranking_pb2_grpc.RankingServiceStub(channel).Rank
        for failing in (False, True, True, True, False, False):
            server.store.failing = failing
            await rank(request())
    logged = capfd.readouterr()
    assert (logged.out + logged.err).count("feature_store_failed") == 1
    assert (logged.out + logged.err).count("feature_store_back") == 1
