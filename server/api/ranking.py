"""`pinrank.v1.RankingService`: answers Rank calls, and counts and times every outcome."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from feature_client.action_times import clock_ms
from server.access.callers import Permission
from server.access.gate import CALLER, Gate
from server.api.draining import Calls
from server.api.status import code_of
from server.api.wire import parse_request, to_query, to_response
from server.config import ServerConfig
from server.errors import RankError
from server.proving.recent_requests import RecentRequests
from server.request.pipeline import Pipeline, Ranking
from server.request.request_ids import RequestIds
from server.request.routing import ServedModels
from server.rollout.shadow import Shadow
from server.telemetry.metrics import RequestMetrics

if TYPE_CHECKING:
    from server.api.calls import Methods
    from server.request.answer_log import AnswerLog

SERVICE = "pinrank.v1.RankingService"

#: Outcomes that say something about the model; refusals, for example, do not.
_JUDGED_BY_GUARD = frozenset({grpc.StatusCode.OK, grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED})

_Context = grpc.aio.ServicerContext[bytes, bytes]


class RankingEdge:
    """Answers `pinrank.v1.RankingService/Rank` from raw bytes, so that parsing is timed and its errors are clear."""

    def __init__(
        self,
        pipeline: Pipeline,
        models: ServedModels,
        config: ServerConfig,
        metrics: RequestMetrics,
        recent: RecentRequests,
        shadow: Shadow,
        calls: Calls,
        log: AnswerLog | None,
        gate: Gate,
    ) -> None:
        self._log = log
        self._pipeline = pipeline
        self._recent = recent
        self._shadow = shadow
        self._models = models
        self._config = config
        self._metrics = metrics
        self._calls = calls
        self._ids = RequestIds()
        self._gate = gate

    def methods(self) -> Methods:
        return {"Rank": grpc.unary_unary_rpc_method_handler(self.rank)}

    async def rank(self, content: bytes, context: _Context) -> bytes:
        """Parse a request, rank its candidates and serialise the answer; count the outcome in any case.

        Raises:
            RankError: the call ends without an answer; the error says why.
        """
        start = time.perf_counter()
        ranking: Ranking | None = None
        surface, label, code = "unknown", "", grpc.StatusCode.INTERNAL
        try:
            self._calls.take(context)
            caller = CALLER.get()
            remaining_s, now_s = context.time_remaining(), time.monotonic()
            self._pipeline.check_queue(math.inf if remaining_s is None else now_s + remaining_s)
            request = parse_request(content)
            if request.message.WhichOneof("model"):  # a label's guard judges the calls that name it
                self._gate.require(caller, Permission.LABELS)
            query = to_query(request, self._models, self._config, now_s, remaining_s)
            self._gate.charge(caller, "rows", len(query.pin_ids))
            query.request_id, query.caller = self._ids.next(), caller.flow
            surface, label = query.surface, query.label
            self._metrics.candidates.observe(len(query.pin_ids))
            wire_end = time.perf_counter()
            ranking = await self._pipeline.rank(query)
            response_start = time.perf_counter()
            wire_us, total_us = round((wire_end - start) * 1e6), round((response_start - start) * 1e6)
            answer = to_response(query, ranking, wire_us, total_us)
            end = time.perf_counter()
            self._observe(surface, end - start, {"wire": wire_end - start, "response": end - response_start}, ranking)
            code = grpc.StatusCode.OK
            if self._log is not None:
                self._log.answered(query, ranking, clock_ms())
            if ranking.explored is None:  # new versions are compared with tuned answers
                self._recent.note(query, ranking, time.monotonic())
                self._shadow.offer(query, ranking)
        except RankError as error:
            code = code_of(error)
            if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
                self._metrics.refusal_seconds.observe(time.perf_counter() - start, surface)
            raise
        except asyncio.CancelledError:  # the caller hung up, or its deadline passed
            code = grpc.StatusCode.CANCELLED
            raise
        finally:
            self._metrics.count(surface, code.name)
            self._watch(surface, label, time.perf_counter() - start, code, ranking)
        return answer

    def _watch(self, surface: str, label: str, total_s: float, code: grpc.StatusCode, ranking: Ranking | None) -> None:
        """Record a request's outcome for the guard of its label, unless the outcome says nothing about the model."""
        window = self._models.windows.get(label)
        if window is None or code not in _JUDGED_BY_GUARD or (ranking and "cheaper_model" in ranking.degradation):
            return
        failed = ranking is None or "non_finite_scores" in ranking.degradation
        now_s = time.monotonic()
        window.note(now_s, total_s, failed=failed)
        if ranking is not None and code == grpc.StatusCode.OK:
            self._models.note_parties(now_s, label, surface, ranking.served, ranking.scores)

    def _observe(self, surface: str, total_s: float, edge_stages_s: dict[str, float], ranking: Ranking) -> None:
        self._metrics.request_seconds.observe(total_s, surface)
        self._metrics.stage_seconds.observe_each({**ranking.stage_s, **edge_stages_s})
        for kind in ranking.degradation:
            self._metrics.degraded[kind].inc()
