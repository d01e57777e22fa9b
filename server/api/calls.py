"""The boundary of every call of every service: handlers raise, and a call ends here, the same way for all.

Bytes that are no request, errors of ours, faults, and callers who have gone meanwhile: one place for Rank, Record,
ModelService, health and reflection.
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
    """Puts the boundary around every method that a server has."""

    def __init__(self) -> None:
        #: By method; only those that there are.
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
    """Return a method's handler with the boundary around it. It takes raw bytes, so that parsing is inside too."""
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
        raise InvalidRequestError([FieldViolation("", f"the bytes are no message of this method: {error}")]) from error


async def _messages(contents: AsyncIterator[bytes], parse: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for content in contents:
        yield _message(content, parse)


async def _end(error: Exception, method: str, context: _Context) -> NoReturn:
    """End a call by what its handler raised."""
    match error:
        case grpc.aio.InternalError():
            raise _gone() from None
        case grpc.aio.BaseError():  # the handler has ended the call itself, or the server has
            raise error
        case RankError():
            known = error
        case _:  # strangers need not know what a bug in here saw
            known = InternalError("the server failed this request; its log says why")
            known.__cause__ = error
    if code_of(known) == grpc.StatusCode.INTERNAL:
        _log.error("request_failed", method=method, error=str(known), exc_info=known.__cause__ or known)
    try:
        await context.abort(*status_of(known))
    except grpc.aio.InternalError:
        raise _gone() from None


def _gone() -> asyncio.CancelledError:
    """Say that the caller had ended the call before its status could be sent: to gRPC, the same as a cancelled one."""
    return asyncio.CancelledError("the caller has gone")
