"""The errors that end a call, and the gRPC status of each.

RankError
├── InvalidRequestError      the request is invalid; lists every invalid field
├── OverloadedError          the server refused the request on arrival; says when to retry
├── DeadlineError            no scores before the deadline; the server never answers late
├── QuotaError               the caller has used its quota
├── RecordingFullError       too many actions are waiting to be stored, or limits refused all of a call
├── NotRecordingError        this server does not record actions
├── LogFullError             the queue of the impression log is full, or an answer has too many reports
├── NotLoggingError          this server keeps no impression log
├── StoreDownError           the feature store did not accept the actions
├── DrainingError            the server is shutting down
├── ScoringError             the engine failed to score this request's batch
├── StatusError              ends the call with the status that it carries (ModelService)
└── InternalError            a bug in the server; only the server's log has the details
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc


class RankError(Exception):
    """A call ends without an answer."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A problem with one field of a request, as in google.rpc.BadRequest."""

    field: str
    description: str


class InvalidRequestError(RankError):
    """The request is invalid.

    Attributes:
        violations: the problems found.
        more: number of further problems that `violations` does not contain.
    """

    def __init__(self, violations: list[FieldViolation], more: int = 0) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations
        self.more = more


class OverloadedError(RankError):
    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class QuotaError(OverloadedError):
    pass


class RecordingFullError(OverloadedError):
    pass


class NotRecordingError(RankError):
    pass


class LogFullError(OverloadedError):
    pass


class NotLoggingError(RankError):
    pass


class StoreDownError(RankError):
    pass


class DeadlineError(RankError):
    pass


class DrainingError(RankError):
    pass


class ScoringError(RankError):
    pass


class StatusError(RankError):
    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class InternalError(RankError):
    pass


STATUS: dict[type[RankError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QuotaError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RecordingFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotRecordingError: grpc.StatusCode.FAILED_PRECONDITION,
    LogFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotLoggingError: grpc.StatusCode.FAILED_PRECONDITION,
    StoreDownError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    DrainingError: grpc.StatusCode.UNAVAILABLE,
    ScoringError: grpc.StatusCode.INTERNAL,
    InternalError: grpc.StatusCode.INTERNAL,
}
