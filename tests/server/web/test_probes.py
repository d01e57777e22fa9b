"""The probes of a real server: alive while its loop turns, started once, ready while it answers Rank calls."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model_store.registry.folder_objects import FolderObjects
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from server.app import Server
from server.config_sections import HttpConfig
from tests.conftest import changed, eventually
from tests.redis_servers import RedisServer
from tests.server.web.exchange import lines


async def probe(server, path):
    return await asyncio.to_thread(lines, server.http_port, path)


async def until(server, path, status):
    """Ask until a probe has this status; return its lines."""
    async with asyncio.timeout(30):
        while True:
            found, said = await probe(server, path)
            if found == status:
                return said


async def test_a_server_whose_event_loop_is_blocked_does_not_live_and_does_again_afterwards(start_server):
    server = await start_server(http=HttpConfig(loop_silence_s_max=0.6))
    assert await probe(server, "/livez") == (200, ["alive"])
    ends_s = time.monotonic() + 30
    while (found := lines(server.http_port, "/livez"))[0] == 200:  # on the event loop, and so it makes no turns
        assert time.monotonic() < ends_s
    status, (first, reason) = found
    assert (status, first) == (503, "not alive")
    assert reason.startswith("event loop: no turn for ")
    assert lines(server.http_port, "/metrics")[0] == 200
    assert await until(server, "/livez", 200) == ["alive"]


async def test_a_start_from_a_slow_model_store_is_alive_and_neither_started_nor_ready_until_it_ends(
    config, prover, monkeypatch
):
    asked, answer = threading.Event(), threading.Event()
    listed = FolderObjects.listed

    def slow(self, *arguments):
        asked.set()
        assert answer.wait(60)
        return listed(self, *arguments)

    monkeypatch.setattr(FolderObjects, "listed", slow)
    server = Server(changed(config, {}), prover=prover)
    starting = asyncio.create_task(server.start())
    try:
        await eventually(lambda: asked.is_set() and bool(server.http_port), 30)
        assert await probe(server, "/livez") == (200, ["alive"])
        assert await probe(server, "/startupz") == (503, ["starting"])
        assert await probe(server, "/readyz") == (503, ["not ready", "starting"])
    finally:
        answer.set()
    await starting
    assert await probe(server, "/startupz") == (200, ["started"])
    assert await probe(server, "/readyz") == (200, ["ready"])
    await server.drain_and_close()


async def test_a_server_that_drains_is_alive_and_started_but_not_ready(gated):
    server, engine = gated
    engine.gate.clear()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        request = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")
        call = asyncio.ensure_future(ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=30))
        await eventually(lambda: bool(engine.runs), 30)
        draining = asyncio.create_task(server.drain_and_close())
        assert await until(server, "/readyz", 503) == ["not ready", "draining"]
        assert await probe(server, "/livez") == (200, ["alive"])
        assert await probe(server, "/startupz") == (200, ["started"])
        engine.gate.set()
        assert sorted((await call).pin_ids) == [1, 2, 3]
        await draining


@pytest.mark.parametrize("without_features", [True, False])
async def test_a_server_without_its_feature_store_is_ready_or_not_as_the_setting_says(
    start_server, tmp_path, without_features
):
    redis = RedisServer(tmp_path)
    redis.start()
    server = await start_server(feature_store=redis.url, ready_without_features=without_features)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        serving, out = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

        async def reported():
            return (await check(health_pb2.HealthCheckRequest(), timeout=30)).status

        assert await probe(server, "/readyz") == (200, ["ready"])
        redis.kill()
        await eventually(lambda: bool(server.state.outage), 30)
        status, (first, reason) = await probe(server, "/readyz")
        assert (status, first) == ((200, "ready") if without_features else (503, "not ready"))
        assert reason.startswith(f"feature store: Redis at 127.0.0.1:{redis.port} ")
        assert reason.endswith("; answers are degraded")
        assert (await probe(server, "/healthz"))[0] == status
        assert await reported() == (serving if without_features else out)
        assert await probe(server, "/livez") == (200, ["alive"])
        # No request has to come for the server to notice that the store is back.
        redis.start()
        await eventually(lambda: not server.state.outage, 30)
        assert await probe(server, "/readyz") == (200, ["ready"])
        assert await reported() == serving
    redis.kill()
