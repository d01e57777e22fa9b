from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinrank.v1 import ranking_pb2, ranking_pb2_grpc

Query, Embedding = ranking_pb2.Query, ranking_pb2.QueryEmbedding
GOOD = {"user_id": 1, "pin_ids": [1, 2, 3], "surface": "home"}

#: What is changed of a good request, the field that is blamed, and what the error must say.
BAD = {
    "unknown surface": ({"surface": "shop"}, "surface", "unknown surface 'shop'; tiny@1 ranks home, related"),
    "endless surface": ({"surface": "x" * 100_000}, "surface", "... (100000 characters); tiny@1 ranks home, related"),
    "no surface": ({"surface": ""}, "surface", "unknown surface ''"),
    "unknown label": ({"label": "beta"}, "label", "unknown label 'beta'; this server serves stable, canary"),
    "unknown version": ({"version": 9}, "version", "version 9 is not served; there are 1, 2"),
    "no candidates": ({"pin_ids": []}, "pin_ids", "no candidates"),
    "duplicate ids": ({"pin_ids": [5, 6, 5, 6, 7]}, "pin_ids", "2 duplicate ids, for example [5, 6]"),
    "too many candidates": ({"pin_ids": range(101)}, "pin_ids", "101 candidates; this server takes at most 100"),
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
    assert "no pinrank.v1.RankRequest" in raised.value.details()


async def test_refusals_are_counted_under_their_status(channel, server):
    await refusal(channel, surface="shop")
    labels = {"surface": "unknown", "code": "INVALID_ARGUMENT"}
    assert server._metrics.registry.get_sample_value("pinrank_requests_total", labels) == 1


ids = st.integers(0, 2**64 - 1)
floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
queries = st.builds(Query, pin_id=ids) | st.builds(
    lambda space, values: Query(embedding=Embedding(space=space, values=values)),
    st.sampled_from(["tiny@1", "", "other@1"]),
    st.lists(floats, max_size=6) | st.lists(floats, min_size=4, max_size=4),
)
requests = st.builds(
    ranking_pb2.RankRequest,
    user_id=ids,
    pin_ids=st.lists(ids, max_size=120) | st.lists(ids, min_size=1, max_size=50, unique=True),
    surface=st.sampled_from(["home", "related"]) | st.text(max_size=8),
    query=st.none() | queries,
    top_k=st.integers(0, 2**32 - 1),
    explain=st.booleans(),
)
sent = requests.map(lambda request: request.SerializeToString()) | st.binary(max_size=400)


async def test_arbitrary_bytes_and_requests_leave_the_server_healthy(channel):
    rank = channel.unary_unary("/pinrank.v1.RankingService/Rank")
    codes = set()
    examples = []

    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(sent)
    def collect(content):
        examples.append(content)

    collect()
    for content in examples:
        try:
            answer = ranking_pb2.RankResponse.FromString(await rank(content))
        except grpc.aio.AioRpcError as error:
            codes.add(error.code())
        else:
            codes.add(grpc.StatusCode.OK)
            wanted = ranking_pb2.RankRequest.FromString(content)
            returned = wanted.top_k or len(wanted.pin_ids)
            assert set(answer.pin_ids) <= set(wanted.pin_ids)
            assert len(answer.pin_ids) == min(returned, len(wanted.pin_ids))
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    answer = await ranking_pb2_grpc.RankingServiceStub(channel).Rank(ranking_pb2.RankRequest(**GOOD))
    assert sorted(answer.pin_ids) == [1, 2, 3]
