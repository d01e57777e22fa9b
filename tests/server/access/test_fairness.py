"""One caller of many large calls with long deadlines beside callers of small ones, on one surface."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from tests.conftest import eventually
from tests.server.access.test_gate import FEED, WRITER, section
from tests.server.gated import GatedEngine


@pytest.fixture
async def contested(start_server, monkeypatch, tmp_path):
    """A server with one engine stream that waits at a gate, and calls of two named callers."""
    monkeypatch.setattr("server.app.engine_factory", lambda *_: GatedEngine)
    named = section("greedy", FEED, ["rank"]) + section("modest", WRITER, ["rank"])
    (tmp_path / "callers.toml").write_text(named)
    server = await start_server(
        engine_streams=1, labels=("stable",), requests_in_flight_max=20, callers_file=tmp_path / "callers.toml"
    )
    engine = server.status.default.model.engine
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        rank = ranking_pb2_grpc.RankingServiceStub(channel).Rank

        def call(token, pins, timeout_s):
            request = ranking_pb2.RankRequest(user_id=1, pin_ids=range(1, pins + 1), surface="home")
            return rank(request, timeout=timeout_s, metadata=(("authorization", f"Bearer {token}"),))

        yield server, engine, call
        engine.gate.set()


async def test_a_greedy_caller_leaves_room_for_the_others(contested):
    server, engine, call = contested
    await call(WRITER, 5, 20)
    engine.runs.clear()
    engine.gate.clear()
    greedy = [call(FEED, 30, 30) for _ in range(20)]

    def refused():
        return server.metrics.value("pinrank_requests_total", surface="home", code="RESOURCE_EXHAUSTED") or 0

    await eventually(lambda: refused() + server.metrics.value("pinrank_requests_in_flight") == 20)
    assert refused() == 10, "half of the limit is its own, as long as others call"
    modest = [call(WRITER, 5, 30) for _ in range(5)]
    await eventually(lambda: server.metrics.value("pinrank_requests_in_flight") == 15)
    assert refused() == 10
    engine.gate.set()
    for one in modest:
        assert len((await one).pin_ids) == 5
    codes = [await one.code() for one in greedy]
    assert codes.count(grpc.StatusCode.OK) == 10
    (told,) = {await one.details() for one in greedy if await one.code() != grpc.StatusCode.OK}
    assert "this caller would have 11 requests in flight, but others call too, and only 10 of 20 are free" in told


async def test_small_calls_run_before_the_rest_of_a_large_one(contested):
    server, engine, call = contested
    await call(WRITER, 2, 20)
    engine.runs.clear()
    engine.gate.clear()
    large = [call(FEED, 30, 30) for _ in range(4)]
    await eventually(lambda: server.metrics.value("pinrank_requests_in_flight") == 4)
    small = call(WRITER, 2, 25)
    await eventually(lambda: server.metrics.value("pinrank_requests_in_flight") == 5)
    engine.gate.set()
    assert len((await small).pin_ids) == 2
    await asyncio.gather(*large)
    assert [batch.rows for batch in engine.runs].index(2) == 1, "only what ran already goes before it"
