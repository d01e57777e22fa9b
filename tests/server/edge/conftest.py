"""The native edge on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import grpc
import grpc.aio
import pytest
import uvloop

from server.edge.native_endpoint import NativeEndpoint
from tests.server.edge.service import Service, start

_LOOPS: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_asyncio_loop_factories(item: pytest.Function) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run the tests on asyncio's event loop, or on those that their module names as EVENT_LOOPS."""
    return {name: _LOOPS[name] for name in getattr(item.module, "EVENT_LOOPS", ("asyncio",))}


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def endpoint(service: Service) -> AsyncIterator[NativeEndpoint]:
    started = await start(service)
    yield started
    await started.stop()


@pytest.fixture
async def channel(endpoint: NativeEndpoint) -> AsyncIterator[grpc.aio.Channel]:
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}", own) as opened:
        yield opened
