from __future__ import annotations

import grpc
import numpy as np
import pytest

from feature_client.embedded import EmbeddedStore
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from tests import tiny


@pytest.fixture
def stub(channel):
    return ranking_pb2_grpc.RankingServiceStub(channel)


async def test_answer_is_the_candidates_ordered_by_utility(stub):
    pins = list(range(1, 31))
    answer = await stub.Rank(ranking_pb2.RankRequest(user_id=1, pin_ids=pins, surface="home"))
    assert sorted(answer.pin_ids) == pins
    assert list(answer.utilities) == sorted(answer.utilities, reverse=True)
    assert not answer.HasField("explanation")
    assert answer.degradation == ranking_pb2.Degradation()
