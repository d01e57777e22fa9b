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


def pytest_asyncio_loop_factories(
    item: pytest.Function,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run the tests on asyncio's event loop; those of modules that say ON_BOTH_LOOPS on uvloop, too."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    return loops | {"uvloop": uvloop.new_event_loop} if getattr(item.module, "ON_BOTH_LOOPS", False) else loops


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
