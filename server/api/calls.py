"""Turns what a gRPC handler raises into the call's status, in one place for all services.

Rank, Record, ModelService, health and reflection all pass through here. It handles bytes that do not parse, our own
errors, bugs, and callers who hung up.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from server.api.status import code_of, status_of
from server.errors import FieldViolation, InternalError, InvalidRequestError, RankError

_log = structlog.get_logger(__name__)

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
_Context = grpc.aio.ServicerContext[Any, Any]


class CallBoundary(grpc.aio.ServerInterceptor):
    """A gRPC interceptor that wraps every method of a server."""

    def __init__(self) -> None:
        #: Handlers by method; methods that do not exist are never added.
        self._guarded: dict[str, _Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        method = handler_call_details.method
        known = self._guarded.get(method)
        if known is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # gRPC answers UNIMPLEMENTED
            known = self._guarded[method] = _guarded(handler, method)
        return known


def _guarded(handler: Any, method: str) -> _Handler:
    """Wrap a method's handler. The wrapper takes raw bytes, so that it also handles parse errors."""
    parse = handler.request_deserializer or _as_it_is
    kind = "stream" if handler.request_streaming else "unary"
    kind += "_stream" if handler.response_streaming else "_unary"
    answer = getattr(handler, kind)

    def parsed(request: Any) -> Any:
        return _messages(request, parse) if handler.request_streaming else _message(request, parse)

    async def answered(request: Any, context: _Context) -> Any:
        try:
            return await answer(parsed(request), context)
        except Exception as error:  # noqa: BLE001 - the boundary
            await _end(error, method, context)

    async def streamed(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            async with aclosing(answer(parsed(request), context)) as messages:
                async for message in messages:
                    yield message
        except Exception as error:  # noqa: BLE001 - the boundary
            await _end(error, method, context)

    behaviour = streamed if inspect.isasyncgenfunction(answer) else answered
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    guarded: _Handler = make(behaviour, None, handler.response_serializer)
    return guarded


def _as_it_is(content: bytes) -> bytes:
    return content


def _message(content: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(content)
    except DecodeError as error:
        raise InvalidRequestError(
            [FieldViolation("", f"cannot parse the request as this method's message type: {error}")]
        ) from error


async def _messages(contents: AsyncIterator[bytes], parse: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for content in contents:
        yield _message(content, parse)


async def _end(error: Exception, method: str, context: _Context) -> NoReturn:
    """End a call with the status of the error that its handler raised."""
    match error:
        case grpc.aio.InternalError():
            raise _hung_up() from None
        case grpc.aio.BaseError():  # the handler or the server has already ended the call
            raise error
        case RankError():
            known = error
        case _:  # a bug; its message may hold data that the caller must not see
            known = InternalError("internal error; the server's log has the details")
            known.__cause__ = error
    if code_of(known) == grpc.StatusCode.INTERNAL:
        _log.error("request_failed", method=method, error=str(known), exc_info=known.__cause__ or known)
    try:
        await context.abort(*status_of(known))
    except grpc.aio.InternalError:
        raise _hung_up() from None


def _hung_up() -> asyncio.CancelledError:
    """Return the error for a caller who ended the call before its status was sent; gRPC treats it as a cancellation."""
    return asyncio.CancelledError("the caller hung up")
