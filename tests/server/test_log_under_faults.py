"""The impression log of a server whose disk or feature store fails."""

from __future__ import annotations

import errno
import gc
import os
from functools import partial

import grpc.aio
import numpy as np

from feature_client.stores.open_store import open_store
from impressions.reading import read_tables
from impressions.segments import Segment
from model_store.bundle.golden import decode_golden
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from server.config_sections import ImpressionsConfig
from server.request.routing import ServedModel
from server.runtime.supervisor import Backoff, RestartAt
from tests import tiny
from tests.conftest import eventually
from tests.redis_servers import RedisServer
from tests.server.swapping import held, publish


def logged(folder):
    return {row["request_id"]: row for part in read_tables(str(folder), "impressions") for row in part.to_pylist()}


async def rank(server, **fields):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        request = ranking_pb2.RankRequest(**{"user_id": 1, "pin_ids": range(1, 21), "surface": "home", **fields})
        return await ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=20)


async def test_a_server_that_stops_before_the_next_try_writes_what_waited(start_server, tmp_path, monkeypatch):
    """The disk has room again, and the writer would wait for half a minute to find out."""
    monkeypatch.setattr(Backoff, "after_failure", lambda _, row, started_s, now_s: (row + 1, RestartAt(now_s + 3_600)))
    log = ImpressionsConfig(to=f"file://{tmp_path / 'log'}", flush_s=0.01)
    server = await start_server(impressions=log)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Segment, "append", full)
        answers = [await rank(server) for _ in range(3)]
        await eventually(partial(waiting, server))
        answers.append(await rank(server))
    await server.drain_and_close()
    assert set(logged(tmp_path / "log")) == {answer.request_id for answer in answers}
    assert not list((tmp_path / "log" / "spool").iterdir())


def waiting(server):
    return any(line.startswith("impressions: waiting") for line in server.status.lines())


async def test_answers_without_a_store_are_logged_with_what_was_missing(start_server, tmp_path):
    redis = RedisServer(tmp_path)
    redis.start()
    try:
        store = open_store(redis.url)
        await store.start()
        await store.multi_put(tiny.features().items())
        await store.close()
        log = ImpressionsConfig(to=f"file://{tmp_path / 'log'}", features_share=1.0)
        server = await start_server(feature_store=redis.url, impressions=log, near_cache_stale_s=0.0)
        whole = await rank(server)
    finally:
        redis.kill()
    without = await rank(server, pin_ids=range(30, 45))
    await server.drain_and_close()
    rows = logged(tmp_path / "log")
    assert set(rows) == {whole.request_id, without.request_id}
    assert rows[whole.request_id]["degradation"] == []
    degradation = dict(rows[without.request_id]["degradation"])
    assert degradation["store_unavailable"] == without.degradation.store_unavailable == 1
    assert degradation["pins_missing"] == 15
    assert rows[without.request_id]["pin_ids"] == list(without.pin_ids)
    (kept,) = decode_golden(rows[without.request_id]["features"])
    assert kept.fetched.missing().candidates == 15


async def test_a_query_by_vector_is_logged_with_its_vector(start_server, tmp_path):
    server = await start_server(impressions=ImpressionsConfig(to=f"file://{tmp_path / 'log'}"))
    vector = tiny.pin_rows(np.array([9]))["embedding"][0].astype(np.float32).tolist()
    query = ranking_pb2.Query(embedding=ranking_pb2.QueryEmbedding(space="tiny@1", values=vector))
    answer = await rank(server, surface="related", query=query)
    await server.drain_and_close()
    row = logged(tmp_path / "log")[answer.request_id]
    assert (row["query_vector"], row["query_pin_id"]) == (vector, None)


async def test_the_log_does_not_keep_models_that_were_swapped_out(serve, store, tmp_path):
    server = await serve(impressions=ImpressionsConfig(to=f"file://{tmp_path / 'log'}"))
    first = await rank(server)
    assert served_versions() >= {1}
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: held(server, 1) == "gone", 30)
    second = await rank(server, user_id=2)
    await eventually(lambda: 1 not in served_versions(), 30)
    await server.drain_and_close()
    rows = logged(tmp_path / "log")
    assert [rows[answer.request_id]["model"] for answer in (first, second)] == ["tiny@1", "tiny@2"]


def served_versions():
    gc.collect()
    return {one.version for one in gc.get_objects() if type(one) is ServedModel}
