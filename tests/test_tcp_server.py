"""A server of the tests leaves no connection open: a leaked one fails whichever test runs when it is collected."""

from __future__ import annotations

import asyncio
import gc
import socket
import warnings

import pytest

from tests.tcp_server import TcpServer


@pytest.mark.parametrize("turns", range(6))
def test_a_connection_is_closed_however_shortly_before_the_end_it_came(turns):
    begun = []

    async def handle(reader, _writer):
        begun.append(await reader.read())

    async def connect_and_end():
        server = TcpServer(handle)
        await server.start()
        with socket.create_connection(("127.0.0.1", server.port)):
            for _ in range(turns):
                await asyncio.sleep(0)
            await server.stop()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(connect_and_end())
        gc.collect()
    assert not [str(warning.message) for warning in caught]


async def test_what_a_handler_raised_is_raised_when_the_server_stops():
    handled = asyncio.Event()

    async def handle(_reader, _writer):
        handled.set()
        raise ValueError("of the handler")

    server = TcpServer(handle)
    await server.start()
    with socket.create_connection(("127.0.0.1", server.port)):
        await handled.wait()
        with pytest.raises(ValueError, match="of the handler"):
            await server.stop()
