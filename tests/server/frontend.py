"""Calls of a frontend to a server whose answers are logged, and exploration of both kinds for its model."""

from __future__ import annotations

from pinrank.v1 import activity_pb2_grpc, impressions_pb2_grpc, ranking_pb2, ranking_pb2_grpc

EXPLORE = b"""
seed = 7
[surfaces.home]
kind = "weights"
share = 0.5
regret_max = 1.0
[surfaces.home.arms.more_creator]
weights = { creator = 5.0 }
[surfaces.home.arms.less_creator]
weights = { creator = -5.0 }
[surfaces.related]
kind = "order"
share = 0.5
regret_max = 1.0
best = 5
temperature = 0.5
floor = 0.1
"""


class Frontend:
    """Calls of one frontend to one server."""

    def __init__(self, channel):
        self._ranking = ranking_pb2_grpc.RankingServiceStub(channel)
        self.activity = activity_pb2_grpc.ActivityServiceStub(channel)
        self.impressions = impressions_pb2_grpc.ImpressionServiceStub(channel)

    async def rank(self, pins=range(1, 21), surface="home", user_id=1, **fields):
        if surface == "related":
            fields.setdefault("query", ranking_pb2.Query(pin_id=30))
        request = ranking_pb2.RankRequest(user_id=user_id, pin_ids=pins, surface=surface, explain=True, **fields)
        return await self._ranking.Rank(request, timeout=20)
