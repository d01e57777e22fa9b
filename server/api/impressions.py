"""`pinrank.v1.ImpressionService`: writes into the impression log what frontends say that users looked at."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np

from feature_client.action_times import clock_ms
from feature_client.activity.limits import BURST_S, KeyedRates
from pinrank.v1 import impressions_pb2
from server.api.draining import Calls
from server.errors import FieldViolation, InvalidRequestError, LogFullError, NotLoggingError

if TYPE_CHECKING:
    from server.api.calls import Methods
    from server.request.answer_log import AnswerLog

SERVICE = "pinrank.v1.ImpressionService"
_POSITIONS_MAX = 10_000
#: How many reports of one answer the log takes; those of ten seconds may come at once.
_REPORTS_PER_S = 10.0

_Context = grpc.aio.ServicerContext[impressions_pb2.SeenRequest, impressions_pb2.SeenResponse]


class ImpressionEdge:
    """Answers Seen calls."""

    def __init__(self, calls: Calls, log: AnswerLog | None, candidates_max: int) -> None:
        """Create; no answer has more than `candidates_max` pins."""
        self._calls = calls
        self._log = log
        self._candidates_max = candidates_max
        self._reports = KeyedRates(_REPORTS_PER_S)

    def methods(self) -> Methods:
        parse, serialise = impressions_pb2.SeenRequest.FromString, impressions_pb2.SeenResponse.SerializeToString
        return {"Seen": grpc.unary_unary_rpc_method_handler(self.seen, parse, serialise)}

    async def seen(self, request: impressions_pb2.SeenRequest, context: _Context) -> impressions_pb2.SeenResponse:
        """Log one report.

        Raises:
            RankError: the report was not logged; the error says why.
        """
        self._calls.take(context)
        if self._log is None:
            raise NotLoggingError("this server keeps no impression log; set impressions.to")
        problems, positions = [], np.array(request.positions, np.uint32)
        beyond = np.flatnonzero(positions >= self._candidates_max)
        if not request.request_id:
            problems.append(FieldViolation("request_id", "0; send the request_id of the answer"))
        if not 0 < len(request.positions) <= _POSITIONS_MAX:
            problems.append(
                FieldViolation(
                    "positions", f"{len(request.positions)} positions; send at least one, at most {_POSITIONS_MAX:,}"
                )
            )
        elif len(beyond):
            problems.append(
                FieldViolation(
                    f"positions[{beyond[0]}]",
                    f"{positions[beyond[0]]}; answers have at most {self._candidates_max} pins (candidates_max), and "
                    "positions count from 0, in the order of the answer",
                )
            )
        if problems:
            raise InvalidRequestError(problems)
        of_answer, now_s = np.array([request.request_id], np.uint64), time.monotonic()
        if not self._reports.take(of_answer, np.ones(1, np.int64), now_s)[0]:
            raise LogFullError(
                f"more than {_REPORTS_PER_S * BURST_S:g} reports of this answer came in {BURST_S:g} s; the report was "
                "not logged. Report the positions that a user looks at together",
                1.0,
            )
        user_id = request.user_id if request.HasField("user_id") else None
        if not self._log.seen(request.request_id, clock_ms(), np.unique(positions), user_id):
            raise LogFullError("the queue of the impression log is full; the report was not logged", 1.0)
        return impressions_pb2.SeenResponse()
