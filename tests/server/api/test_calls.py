"""The boundary of calls, on a real gRPC server: whatever a handler raises, and whenever its caller goes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from google.protobuf.message import DecodeError

from server.api.calls import Deferred, guarded
from server.edge.endpoint import PortLimits
from server.errors import DrainingError, InvalidRequestError, OverloadedError, StatusError, StoreDownError
from server.telemetry.metrics import Metrics
from tests.server.edges import EDGES

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def parse(content: bytes) -> str:
    if content.startswith(b"\xff"):
        raise DecodeError("no message")
    return content.decode()


class Service:
    """Methods of every kind that do what a test says with what they are sent."""

    def __init__(self):
        self.act = str.encode

    async def unary_unary(self, request, context):
        return self.act(request)

    async def unary_stream(self, request, context):
        yield self.act(request)

    async def stream_unary(self, requests, context):
        return self.act("".join([request async for request in requests]))

    async def stream_stream(self, requests, context):
        async for request in requests:
            yield self.act(request)


@pytest.fixture(params=EDGES)
async def served(request) -> AsyncIterator[tuple[Service, grpc.aio.Channel]]:
    service = Service()
    methods = {kind: getattr(grpc, f"{kind}_rpc_method_handler")(getattr(service, kind), parse, None) for kind in KINDS}
    endpoint = request.param({"test": methods}, PortLimits(1 << 20), Metrics().connections, shared_port=False)
    await endpoint.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}") as channel:
        yield service, channel
    await endpoint.stop()


async def call(channel, kind, content=b"hello", **options):
    """Make one call; return its answer, or raise."""
    method = getattr(channel, kind)(f"/test/{kind}")
    made = method(iter([content]) if kind.startswith("stream") else content, **options)
    return await made if kind.endswith("unary") else b"".join([part async for part in made])


def raising(error):
    def act(_):
        raise error

    return act


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_method_answers_as_without_the_boundary(kind, served):
    assert await call(served[1], kind) == b"hello"


@pytest.mark.parametrize("kind", KINDS)
async def test_bytes_that_are_no_message_are_an_invalid_argument_for_every_method(kind, served, caplog):
    with pytest.raises(grpc.aio.AioRpcError, match="cannot parse the request as this method") as raised:
        await call(served[1], kind, b"\xff\xff")
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caplog.records == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DrainingError("going"), grpc.StatusCode.UNAVAILABLE, "going"),
        (OverloadedError("full", 0.25), grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
        (StatusError(grpc.StatusCode.ABORTED, "moved"), grpc.StatusCode.ABORTED, "moved"),
        (StoreDownError("x" * 100_000), grpc.StatusCode.UNAVAILABLE, "(100000 characters)"),
        (KeyError("planted-in-a-bug"), grpc.StatusCode.INTERNAL, "the server's log has the details"),
    ],
    ids=["draining", "overloaded", "moved", "endless", "bug"],
)
async def test_what_a_handler_raises_becomes_its_status(kind, error, code, text, served, caplog):
    served[0].act = raising(error)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(served[1], kind)
    assert raised.value.code() == code
    assert text in raised.value.details()
    assert "planted" not in repr(raised.value)
    pushback = dict(raised.value.trailing_metadata()).get("grpc-retry-pushback-ms")
    assert pushback == ("250" if isinstance(error, OverloadedError) else None)
    assert [record for record in caplog.records if record.name.startswith("grpc")] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [None, InvalidRequestError([]), DrainingError("going"), KeyError("a bug")], ids=type)
async def test_a_caller_that_has_gone_when_its_call_ends_is_no_error(kind, error, served, caplog):
    service, channel = served
    caplog.set_level(logging.WARNING)
    ended = asyncio.Event()

    def late(text):
        time.sleep(0.06)  # the event loop cannot hear of the caller's end before the call's
        asyncio.get_running_loop().call_soon(ended.set)
        if error is not None:
            raise error
        return text.encode()

    service.act = late
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(channel, kind, timeout=0.02)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(ended.wait(), 10)
    service.act = str.encode
    assert await call(channel, kind) == b"hello"
    told = [record for record in caplog.records if record.name.startswith("grpc")]
    if error is None:  # gRPC tells of an answer that it could not send; `server.telemetry.logs` knows that for no error
        told = [record for record in told if not isinstance(record.exc_info[1], grpc.aio.InternalError)]
    assert told == []


async def test_a_method_that_there_is_not_is_unimplemented(served):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await served[1].unary_unary("/test/other")(b"")
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


class ContextOfNobody:
    """A call whose caller gRPC found gone when its status was to be sent, before it told the handler."""

    def time_remaining(self):
        return None

    async def abort(self, code, details="", trailing_metadata=()):
        raise grpc.aio.InternalError("Failed execute_batch")


@pytest.mark.parametrize("error", [DrainingError("going"), grpc.aio.InternalError("Failed execute_batch")], ids=type)
async def test_a_status_that_nobody_takes_ends_its_call_as_a_cancelled_one(error):
    async def fail(request, context):
        raise error

    handler = guarded(grpc.unary_unary_rpc_method_handler(fail), "/test/one")
    with pytest.raises(asyncio.CancelledError):
        await handler.unary_unary(b"", ContextOfNobody())


class Costly(Deferred):
    """A request that must not be read."""

    async def content(self):
        raise AssertionError("it was read")


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
async def test_nothing_of_a_request_is_read_for_who_is_not_let_in(kind):
    parsed, ended = [], []

    def door(method, context):
        raise StatusError(grpc.StatusCode.UNAUTHENTICATED, f"not for {method}")

    class Context(ContextOfNobody):
        async def abort(self, code, details="", trailing_metadata=()):
            ended.append((code, details))
            raise grpc.aio.AbortError

    async def one(request, context):
        parsed.append(request)

    async def many(request, context):
        parsed.append(request)
        yield request

    answer = one if kind == "unary_unary" else many
    handler = guarded(getattr(grpc, f"{kind}_rpc_method_handler")(answer, parsed.append), "/test/one", door)
    behaviour = getattr(handler, kind)
    for request in (b"bytes", Costly()):
        made = behaviour(request, Context())
        with pytest.raises(grpc.aio.AbortError):
            await (made if kind == "unary_unary" else anext(made))
    assert parsed == []
    assert ended == [(grpc.StatusCode.UNAUTHENTICATED, "not for /test/one")] * 2
