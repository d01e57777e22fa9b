"""`pinrank.v1.ModelService`: operators with the server's token list, load and unload versions, and move labels."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
import structlog
from google.protobuf.message import Message

from model_store.bundle.files import BundleError
from model_store.registry.history import share_of
from model_store.registry.objects import ModelStoreError, MovedError, NoVersionError, RefusedError
from pinrank.v1 import models_pb2
from server.access.gate import CALLER
from server.api.status import code_of, within
from server.config import ServerConfig
from server.errors import RankError, StatusError
from server.rollout.guard import Breach, Healthy, TooEarly
from server.rollout.hot_swap import HotSwap
from server.rollout.lifecycle import Phase
from server.rollout.status import ServerStatus
from server.rollout.versions import VersionRecord

if TYPE_CHECKING:
    from server.api.calls import Methods

SERVICE = "pinrank.v1.ModelService"
#: The gRPC status of each error; the first class that matches decides.
_STATUS: dict[type[Exception], grpc.StatusCode] = {
    NoVersionError: grpc.StatusCode.NOT_FOUND,
    MovedError: grpc.StatusCode.ABORTED,
    RefusedError: grpc.StatusCode.INVALID_ARGUMENT,
    BundleError: grpc.StatusCode.FAILED_PRECONDITION,
    ModelStoreError: grpc.StatusCode.UNAVAILABLE,
}
_CALLER_MAX = 80
#: An error about a network can name thousands of tensors.
_REASON_BYTES_MAX = 4_000

_audit = structlog.get_logger("audit")

_Context = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)


class ModelEdge:
    """Answers ModelService calls of callers that may manage models, and writes each into the log."""

    def __init__(self, swap: HotSwap, status: ServerStatus, config: ServerConfig) -> None:
        self._swap = swap
        self._server = status
        self._config = config

    def methods(self) -> Methods:
        pb = models_pb2
        return {
            "Load": self._method("Load", self.load, pb.LoadRequest, pb.ModelVersion),
            "Unload": self._method("Unload", self.unload, pb.UnloadRequest, pb.UnloadResponse),
            "SetLabel": self._method("SetLabel", self.set_label, pb.SetLabelRequest, pb.SetLabelResponse),
            "Status": self._method("Status", self.status, pb.StatusRequest, pb.StatusResponse),
        }

    def _method(
        self,
        name: str,
        answer: Callable[[_Request, _Context], Awaitable[_Response]],
        request: type[_Request],
        response: type[_Response],
    ) -> grpc.RpcMethodHandler[_Request, _Response]:
        async def checked(message: _Request, context: _Context) -> _Response:
            outcome = "failed"
            try:
                answered = await answer(message, context)
                outcome = "done"
            except (ModelStoreError, BundleError) as error:
                code = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
                outcome = code.name
                raise StatusError(code, str(error)) from error
            except RankError as error:
                outcome = code_of(error).name
                raise
            finally:
                _audit.log(
                    logging.DEBUG if name == "Status" else logging.INFO, "model_call", method=name,
                    caller=CALLER.get().route, peer=context.peer(), outcome=outcome, request=_shown(message),
                )  # fmt: skip
            return answered

        return grpc.unary_unary_rpc_method_handler(checked, request.FromString, response.SerializeToString)

    async def load(self, request: models_pb2.LoadRequest, context: _Context) -> models_pb2.ModelVersion:  # noqa: ARG002
        self._check_alone()
        held = await self._swap.load(request.version)
        return self._version(request.version, held)

    async def unload(self, request: models_pb2.UnloadRequest, context: _Context) -> models_pb2.UnloadResponse:  # noqa: ARG002
        self._check_alone()
        self._swap.unload(request.version)
        return models_pb2.UnloadResponse()

    def _check_alone(self) -> None:
        if self._config.processes > 1:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{self._config.processes} processes share this port and a call reaches only one; move a label instead",
            )

    async def set_label(self, request: models_pb2.SetLabelRequest, context: _Context) -> models_pb2.SetLabelResponse:
        by = (request.by or f"a caller from {context.peer()}")[:_CALLER_MAX]
        entry = await self._swap.set_label(
            request.label, request.version, by, request.why, request.expected_version or None
        )
        return models_pb2.SetLabelResponse(entry=entry.number if entry else 0)

    async def status(self, request: models_pb2.StatusRequest, context: _Context) -> models_pb2.StatusResponse:  # noqa: ARG002
        server, now_s = self._server, time.monotonic()
        entry = server.entry
        found = models_pb2.StatusResponse(
            model=self._config.model,
            entry=entry.number if entry else 0,
            looked_s_ago=now_s - server.entry_read_s,
            store_failure=within(server.store_failure, _REASON_BYTES_MAX),
            versions=[self._version(version, record) for version, record in sorted(server.versions.items())],
            shadow=server.shadow,
        )
        named = entry.state.labels if entry else {}
        for label in dict.fromkeys((*server.by_label, *server.wanted)):
            served = server.by_label.get(label)
            seen = server.window(label, now_s)
            found.labels.add(
                label=label,
                version=served.version if served else 0,
                wanted_version=named.get(label, 0),
                requests=seen.requests if seen else 0,
                errors=seen.errors if seen else 0,
                p99_ms=seen.p99_s * 1e3 if seen else 0,
                guard=_verdict(server.verdicts.get(label)),
            )
        if entry is not None:
            for surface in entry.state.traffic:
                for label, share in share_of(entry.state, surface).items():
                    found.traffic.add(surface=surface, label=label, share=share)
        for at_s, text in server.events:
            found.events.add(s_ago=now_s - at_s, text=within(text, _REASON_BYTES_MAX))
        return found

    def _version(self, version: int, held: VersionRecord) -> models_pb2.ModelVersion:
        checks, warm_up = held.report.checks, held.report.warm_up
        if held.phase is Phase.WARMING and warm_up is not None:
            checks = [*checks, f"warm-up: {warm_up}"]
        return models_pb2.ModelVersion(
            version=version,
            digest=held.report.digest,
            phase=str(held.phase),
            reason=within(held.reason, _REASON_BYTES_MAX),
            phase_s=time.monotonic() - held.since_s,
            in_flight=held.served.in_flight if held.served else 0,
            memory_bytes=held.report.memory_bytes,
            checks=checks,
        )


def _shown(message: Message) -> str:
    """Return a request's fields for the log, each cut before it is quoted, as it may be a megabyte."""
    return ", ".join(f"{field.name}={str(value)[:_CALLER_MAX]!r}" for field, value in message.ListFields())


def _verdict(verdict: Healthy | TooEarly | Breach | None) -> str:
    match verdict:
        case Healthy(note):
            return f"healthy: {note}"
        case TooEarly(note):
            return f"not enough data yet: {note}"
        case Breach(reason):
            return f"limit exceeded: {reason}"
        case None:
            return ""
