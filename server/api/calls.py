"""Turns what a gRPC handler raises into the call's status, in one place for all services.

Rank, Record, ModelService, health and reflection all pass through here. It handles bytes that do not parse, our own
errors, bugs, and callers who hung up.
"""

from __future__ import annotations

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
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
    from server.access.gate import Door

    Handler = grpc.RpcMethodHandler[Any, Any]
    #: A service's handlers, by method name.
    Methods = Mapping[str, Handler]
    #: Services by name.
    Services = Mapping[str, Methods]
_Context = grpc.aio.ServicerContext[Any, Any]


class Deferred(ABC):
    """A request whose bytes cost something to have, such as a compressed one."""

    @abstractmethod
    async def content(self) -> bytes:
        """Return them. Raises grpc.aio.AbortError, if the call was ended."""


def guarded(handler: Handler, method: str, door: Door | None = None) -> Handler:
    """Return a method's handler that ends each call with the right status, whatever the given one raises.

    It takes raw bytes, so that it also handles parse errors, and so that nothing of a request is parsed or decompressed
    for a caller that is not let in.

    Args:
        handler: the handler.
        method: the method's path, for the log.
        door: lets callers in; None lets everybody in.
    """
    parse = handler.request_deserializer or _as_it_is
    kind = kind_of(handler)
    answer = getattr(handler, kind)

    async def let_in(request: Any, context: _Context) -> Any:
        if door is not None:
            door(method, context)
        content: Any = await request.content() if isinstance(request, Deferred) else request
        return _messages(content, parse) if handler.request_streaming else _message(content, parse)

    async def answered(request: Any, context: _Context) -> Any:
        try:
            return await answer(await let_in(request, context), context)
        except Exception as error:  # noqa: BLE001 - the boundary
            await _end(error, method, context)

    async def streamed(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            async with aclosing(answer(await let_in(request, context), context)) as messages:
                async for message in messages:
                    yield message
        except Exception as error:  # noqa: BLE001 - the boundary
            await _end(error, method, context)

    behaviour = streamed if inspect.isasyncgenfunction(answer) else answered
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    guarded_handler: Handler = make(behaviour, None, handler.response_serializer)
    return guarded_handler


def kind_of(handler: Handler) -> str:
    """Return the name of a handler's behaviour, for example `stream_unary`."""
    sides = handler.request_streaming, handler.response_streaming
    return "_".join("stream" if side else "unary" for side in sides)


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
        await context.abort(*status_of(known, context.time_remaining()))
    except grpc.aio.InternalError:
        raise _hung_up() from None


def _hung_up() -> asyncio.CancelledError:
    """Return the error for a caller who ended the call before its status was sent; gRPC treats it as a cancellation."""
    return asyncio.CancelledError("the caller hung up")
