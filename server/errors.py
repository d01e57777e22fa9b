"""What can go wrong with a call, and the gRPC status of each.

RankError
├── InvalidRequestError      the request itself is wrong; names every field at fault
├── OverloadedError          refused on arrival, before any work; says when to try again
├── DeadlineError            no scores in time; nothing is answered late
├── RecordingFullError       more actions wait to be stored than the server holds
├── NotRecordingError        this server records no actions
├── StoreDownError           the feature store took no actions
├── DrainingError            the server is shutting down
├── ScoringError             the engine failed this request's batch
├── StatusError              ends with the status that it names (ModelService)
└── InternalError            a fault of the server's own: its log has it, the caller only hears of it
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc


class RankError(Exception):
    """A call that ends without what was asked for."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One thing wrong with one field, as in google.rpc.BadRequest."""

    field: str
    description: str


class InvalidRequestError(RankError):
    """Attributes: `violations`, and `more`, how many were found beyond them."""

    def __init__(self, violations: list[FieldViolation], more: int = 0) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations
        self.more = more


class OverloadedError(RankError):
    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class RecordingFullError(OverloadedError):
    pass


class NotRecordingError(RankError):
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
    RecordingFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotRecordingError: grpc.StatusCode.FAILED_PRECONDITION,
    StoreDownError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    DrainingError: grpc.StatusCode.UNAVAILABLE,
    ScoringError: grpc.StatusCode.INTERNAL,
    InternalError: grpc.StatusCode.INTERNAL,
}
