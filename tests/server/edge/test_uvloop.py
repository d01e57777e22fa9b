"""The native edge on the event loop that the server runs on."""

from __future__ import annotations

import inspect

import grpc
import grpc.aio
import pytest
import uvloop

from tests.server.edge import test_native_edge as calls
from tests.server.edge import test_raw_clients as raw
from tests.server.edge.service import Service, start
from tests.server.edges import needs_native_edge

pytestmark = needs_native_edge


@pytest.mark.parametrize(
    "test",
    [
        calls.test_many_calls_at_once_each_get_their_own_answer,
        calls.test_the_largest_message_passes_and_a_larger_one_is_refused,
        calls.test_a_caller_that_gives_up_ends_its_handler,
        raw.test_a_deadline_ends_the_handler_of_a_client_that_does_not_give_up,
        raw.test_what_is_not_http2_is_closed,
        raw.test_a_client_that_does_not_read_its_answers_is_not_read_either,
        calls.test_a_stream_is_answered_message_by_message,
    ],
    ids=lambda test: test.__name__,
)
def test_the_same_holds_on_uvloop(test):
    """The server runs on uvloop, and the tests on asyncio's own event loop."""

    async def run() -> None:
        service = Service()
        endpoint = await start(service)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoint.listens_on}") as channel:
            parts = {"service": service, "endpoint": endpoint, "channel": channel}
            await test(*(parts[name] for name in inspect.signature(test).parameters))
        await endpoint.hang_up()

    uvloop.run(run())
