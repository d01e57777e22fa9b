from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from pinrank.v1 import ranking_pb2, ranking_pb2_grpc

Query, Embedding = ranking_pb2.Query, ranking_pb2.QueryEmbedding
GOOD = {"user_id": 1, "pin_ids": [1, 2, 3], "surface": "home"}

#: What is changed of a good request, the field that is blamed, and what the error must say.
BAD = {
    "unknown surface": ({"surface": "shop"}, "surface", "unknown surface 'shop'; tiny@1 ranks home, related"),
    "endless surface": ({"surface": "x" * 100_000}, "surface", "... (100000 characters); tiny@1 ranks home, related"),
    "no surface": ({"surface": ""}, "surface", "unknown surface ''"),
    "unknown label": ({"label": "beta"}, "label", "unknown label 'beta'; this server serves stable, canary"),
    "unknown version": ({"version": 9}, "version", "version 9 is not served; this server serves 1, 2"),
    "no candidates": ({"pin_ids": []}, "pin_ids", "no candidates"),
    "duplicate ids": ({"pin_ids": [5, 6, 5, 6, 7]}, "pin_ids", "2 duplicate ids, for example [5, 6]"),
    "too many candidates": ({"pin_ids": range(101)}, "pin_ids", "101 candidates; this server accepts at most 100"),
    "query left out": ({"surface": "related"}, "query", "surface 'related' ranks against a query"),
    "empty query": ({"query": Query()}, "query", "the query is empty"),
    "wrong space": (
        {"query": Query(embedding=Embedding(space="tiny@2", values=[0.0] * 4))},
        "query.embedding.space",
        "space 'tiny@2'; tiny@1 reads 'tiny@1'",
    ),
    "wrong dimension": (
        {"query": Query(embedding=Embedding(space="tiny@1", values=[0.0] * 3))},
        "query.embedding.values",
        "3 values; tiny@1 has 4 dimensions",
    ),
    "nan in the query": (
        {"query": Query(embedding=Embedding(space="tiny@1", values=[0.0, 0.0, float("nan"), 0.0]))},
        "query.embedding.values[2]",
        "nan is not finite",
    ),
    "infinity in the query": (
        {"query": Query(embedding=Embedding(space="tiny@1", values=[float("-inf"), 0.0, 0.0, 0.0]))},
        "query.embedding.values[0]",
        "-inf is not finite",
    ),
    "a query far longer than the space's vectors": (
        {"query": Query(embedding=Embedding(space="tiny@1", values=[1e5] * 4))},
        "query.embedding.values",
        "the vector's Euclidean norm is 200000; tiny@1 takes at most",
    ),
}


def violations(error):
    status = rpc_status.from_call(error)
    details = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(details)
    return {violation.field: violation.description for violation in details.field_violations}


class Call:
    """What `rpc_status.from_call` reads of a call, taken from an aio error."""

    def __init__(self, error):
        self.code, self.details, self.trailing_metadata = error.code, error.details, error.trailing_metadata


async def refusal(channel, **fields):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ranking_pb2_grpc.RankingServiceStub(channel).Rank(ranking_pb2.RankRequest(**GOOD | fields))
    return raised.value


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_names_its_field_and_the_fix(name, channel):
    changes, field, description = BAD[name]
    error = await refusal(channel, **changes)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    found = violations(Call(error))
    assert list(found) == [field]
    assert description in found[field]
    assert description in error.details()


async def test_everything_wrong_is_named_at_once(channel):
    error = await refusal(channel, pin_ids=[], surface="shop", label="beta")
    assert set(violations(Call(error))) == {"pin_ids", "surface", "label"}


async def test_oversized_message_is_refused_with_its_size_and_the_limit(start_server):
    server = await start_server(message_bytes_max=2_000, candidates_max=100_000)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        error = await refusal(channel, pin_ids=range(1, 1_000))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2000" in error.details()


async def test_bytes_that_are_no_request_are_refused(channel):
    rank = channel.unary_unary("/pinrank.v1.RankingService/Rank")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await rank(b"\xff\xff\xff")
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot parse the request as pinrank.v1.RankRequest" in raised.value.details()


async def test_refusals_are_counted_under_their_status(channel, server):
    await refusal(channel, surface="shop")
    labels = {"surface": "unknown", "code": "INVALID_ARGUMENT"}
    assert server.metrics.registry.get_sample_value("pinrank_requests_total", labels) == 1
