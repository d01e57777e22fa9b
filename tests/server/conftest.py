from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from server.app import Server
from tests.conftest import StartServer
from tests.server.gated import GatedEngine


@pytest.fixture
async def gated(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Server, GatedEngine]]:
    """A server with one engine stream, and its gate; the gate is opened at the end so that the server can drain."""
    monkeypatch.setattr("server.app.engine_factory", lambda _: GatedEngine)
    server = await start_server(engine_streams=1, labels=("stable",), requests_in_flight_max=4, rows_in_flight_max=60)
    engine = server._models.default.live.engine
    assert isinstance(engine, GatedEngine)
    engine.runs.clear()
    yield server, engine
    engine.gate.set()
