"""Arbitrary bytes and arbitrary requests against a real server process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from pinrank.v1 import ranking_pb2

PINRANK = str(Path(sys.executable).with_name("pinrank"))
Query, Embedding = ranking_pb2.Query, ranking_pb2.QueryEmbedding

ids = st.integers(0, 2**64 - 1)
floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
queries = st.builds(Query, pin_id=ids) | st.builds(
    lambda space, values: Query(embedding=Embedding(space=space, values=values)),
    st.sampled_from(["tiny@1", "", "other@1"]),
    st.lists(floats, max_size=6) | st.lists(floats, min_size=4, max_size=4),
)
models = st.sampled_from([{}, {"label": "stable"}, {"version": 1}]) | st.one_of(
    st.text(max_size=8).map(lambda label: {"label": label}), ids.map(lambda version: {"version": version})
)
requests = st.builds(
    lambda model, **fields: ranking_pb2.RankRequest(**fields, **model),
    models,
    user_id=ids,
    pin_ids=st.lists(ids, max_size=120) | st.lists(ids, min_size=1, max_size=50, unique=True),
    surface=st.sampled_from(["home", "related"]) | st.text(max_size=8),
    query=st.none() | queries,
    top_k=st.integers(0, 2**32 - 1),
    explain=st.booleans(),
)
good_requests = st.builds(
    ranking_pb2.RankRequest,
    user_id=ids,
    pin_ids=st.lists(ids, min_size=1, max_size=50, unique=True),
    surface=st.just("home"),
    top_k=st.integers(0, 60),
    explain=st.booleans(),
)
sent = (good_requests | requests).map(lambda request: request.SerializeToString()) | st.binary(max_size=400)


@pytest.fixture(scope="module")
def channel(model_store):
    command = [
        PINRANK, "serve", "--model-store", str(model_store), "--model", "tiny", "--feature-store", "memory://",
        "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = next(e["grpc"] for e in map(json.loads, process.stderr) if e["event"] == "serving")
        with grpc.insecure_channel(address) as opened:
            yield opened
        process.terminate()
        rest = [json.loads(line)["event"] for line in process.stderr]
        assert process.wait() == 0
        assert rest == ["draining", "stopped"]  # nothing went wrong inside


def test_arbitrary_input_is_answered_or_refused_and_the_server_stays_healthy(channel):
    rank = channel.unary_unary("/pinrank.v1.RankingService/Rank")
    health = health_pb2_grpc.HealthStub(channel)
    codes = Counter()

    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(sent)
    def try_one(content):
        answer, call = b"", None
        try:
            answer, call = rank.with_call(content, timeout=30)
        except grpc.RpcError as error:
            call = error
        codes[call.code()] += 1
        if call.code() == grpc.StatusCode.OK:
            wanted, ranked = ranking_pb2.RankRequest.FromString(content), ranking_pb2.RankResponse.FromString(answer)
            assert set(ranked.pin_ids) <= set(wanted.pin_ids)
            assert len(ranked.pin_ids) == min(wanted.top_k or len(wanted.pin_ids), len(wanted.pin_ids))
        serving = health.Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert serving.status == health_pb2.HealthCheckResponse.SERVING

    try_one()
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    assert min(codes.values()) >= 25  # neither kind is a rarity
