"""A server whose Redis misbehaves goes on answering: degraded, flagged, counted, and well again by itself."""

from __future__ import annotations

import asyncio
import shutil
import time

import grpc.aio
import pytest

from feature_client.stores.open_store import open_store
from pinrank.v1 import activity_pb2, activity_pb2_grpc, ranking_pb2, ranking_pb2_grpc
from tests import tiny
from tests.faulty_proxy import FaultyProxy
from tests.moving_name import MovingName
from tests.redis_servers import RedisServer, running, wait_until
from tests.scripted_redis import ScriptedRedis

REQUEST = ranking_pb2.RankRequest(user_id=1, pin_ids=range(1, 21), surface="home")


@pytest.fixture
async def scene(tmp_path, start_server):
    """A server on a Redis of its own behind a proxy; the Redis holds the tiny features."""
    redis = RedisServer(tmp_path)
    redis.start()
    async with FaultyProxy(redis.port).running() as proxy:
        await refill(redis)
        server = await start_server(feature_store=proxy.url, near_cache_stale_s=0.0, fetch_budget_share=0.2)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            rank = ranking_pb2_grpc.RankingServiceStub(channel).Rank
            assert not (await rank(REQUEST, timeout=10)).HasField("degradation")
            yield redis, proxy, rank, server
    redis.kill()


async def refill(redis):
    store = open_store(redis.url)
    await store.start()
    await store.multi_put(tiny.features().items())
    await store.close()


async def well_again(rank):
    async with asyncio.timeout(15):
        while (await rank(REQUEST, timeout=10)).HasField("degradation"):  # noqa: ASYNC110 - the server recovers by itself
            await asyncio.sleep(0.01)


def hang(_, proxy):
    proxy.silent = True


def slow_down(_, proxy):
    proxy.delay_s = 1.0


def cut(_, proxy):
    proxy.refusing = True


def kill(redis, _):
    redis.kill()


@pytest.mark.parametrize("fault", [hang, slow_down, cut, kill])
async def test_every_call_is_answered_from_aged_rows_and_defaults_until_redis_is_back(scene, fault):
    redis, proxy, rank, server = scene
    fault(redis, proxy)
    answers = await asyncio.gather(*(rank(REQUEST, timeout=3) for _ in range(40)))
    for answer in answers:
        assert sorted(answer.pin_ids) == list(range(1, 21))
        assert answer.degradation.store_unavailable
        assert answer.degradation.user_missing
        assert answer.degradation.sequence_missing
        assert answer.degradation.stale_rows == 20
        assert answer.degradation.pins_missing == 0
    sample = server.metrics.registry.get_sample_value
    assert sample("pinrank_degraded_total", {"kind": "stale_rows"}) >= 40
    node = f"127.0.0.1:{proxy.port}"
    assert sample("pinrank_redis_circuit_open", {"node": node}) == 1
    assert sample("pinrank_redis_calls_total", {"node": node, "kind": "failures"}) >= 3
    proxy.silent, proxy.delay_s = False, 0.0
    proxy.refusing = True  # half-open connections are cut
    proxy.refusing = False
    if fault is kill:
        redis.start()
        await refill(redis)
    await well_again(rank)


async def test_a_redis_that_comes_back_empty_is_read_as_missing_and_a_refill_mends_it(scene):
    redis, _, rank, _ = scene
    redis.kill()
    redis.start()
    async with asyncio.timeout(15):
        while (await rank(REQUEST, timeout=10)).degradation.store_unavailable:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
    answer = await rank(REQUEST, timeout=10)
    assert (answer.degradation.pins_missing, answer.degradation.stale_rows) == (20, 0)
    await refill(redis)
    await well_again(rank)


async def test_thirty_percent_missing_pins_and_a_missing_user_are_counted_one_by_one(scene):
    _, _, rank, _ = scene
    answer = await rank(
        ranking_pb2.RankRequest(user_id=999, pin_ids=[*range(1, 15), *range(901, 907)], surface="home"), timeout=10
    )
    assert answer.degradation.pins_missing == 6
    assert answer.degradation.user_missing
    assert not answer.degradation.store_unavailable


async def test_recording_and_ranking_outlive_a_planned_failover(tmp_path, start_server, monkeypatch):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    name = MovingName(monkeypatch)
    with running(tmp_path / "one", "--repl-diskless-sync-delay", "0") as old, running(tmp_path / "two") as new:
        await refill(old)
        new.client().replicaof("127.0.0.1", old.port)
        wait_until(lambda: new.client().info("replication")["master_link_status"] == "up")
        name.port = old.port
        server = await start_server(feature_store=name.url, record_actions=True, near_cache_stale_s=0.0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            rank = ranking_pb2_grpc.RankingServiceStub(channel).Rank
            record = activity_pb2_grpc.ActivityServiceStub(channel).Record
            assert (await record(action(1), timeout=10)).added == 1
            old.client().wait(1, 10_000)
            new.client().replicaof("NO", "ONE")
            old.client().replicaof("127.0.0.1", new.port)
            name.port = new.port
            assert (await record(action(2), timeout=10)).added == 1, "the first after the failover, without a restart"
            assert not (await rank(REQUEST, timeout=10)).HasField("degradation")
            assert new.client().get(tiny.ACTIONS.key(1)) is not None


def action(event_id):
    return activity_pb2.RecordRequest(
        actions=[
            activity_pb2.Action(
                event_id=event_id,
                user_id=1,
                pin_id=event_id,
                action=tiny.ACTIONS.actions[0],
                surface=tiny.ACTIONS.surfaces[0],
                time_ms=int(time.time() * 1e3) + event_id,
            )
        ]
    )


@pytest.mark.parametrize("nonsense", [b"*2147483647\r\n", b":7\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_redis_that_answers_nonsense_degrades_answers_and_is_counted(start_server, nonsense):
    async with ScriptedRedis() as redis:
        server = await start_server(feature_store=redis.url, record_actions=True)
        redis.answer = lambda command: nonsense if command[0] in {b"MGET", b"EVAL"} else None
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            rank = ranking_pb2_grpc.RankingServiceStub(channel).Rank
            record = activity_pb2_grpc.ActivityServiceStub(channel).Record
            for answer in [await rank(REQUEST, timeout=10) for _ in range(5)]:
                assert answer.degradation.store_unavailable
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await record(action(1), timeout=10)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            sample, node = server.metrics.registry.get_sample_value, f"127.0.0.1:{redis.port}"
            assert sample("pinrank_redis_calls_total", {"node": node, "kind": "malformed"}) >= 3
            assert sample("pinrank_redis_circuit_open", {"node": node}) == 1
            redis.answer = lambda _: None
            async with asyncio.timeout(15):
                while (await rank(REQUEST, timeout=10)).degradation.store_unavailable:  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.01)


async def test_a_deleted_lmdb_store_is_flagged_and_the_one_moved_into_its_place_is_read(start_server, tmp_path):
    server = await start_server(near_cache_bytes=0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        rank = ranking_pb2_grpc.RankingServiceStub(channel).Rank
        assert not (await rank(REQUEST, timeout=10)).HasField("degradation")
        (tmp_path / "features").rename(tmp_path / "aside")
        assert (await rank(REQUEST, timeout=10)).degradation.store_unavailable
        shutil.copytree(tmp_path / "aside", tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "features")
        await well_again(rank)
    assert server.metrics.registry.get_sample_value("pinrank_feature_store_reopened") == 1
