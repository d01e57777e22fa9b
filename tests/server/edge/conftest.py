"""The native edge on real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from server.edge.native_endpoint import NativeEndpoint
from tests.server.edge.service import Service, start


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
