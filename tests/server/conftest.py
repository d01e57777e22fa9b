from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest

from model_store.registry.store import ModelStore, open_model_store
from server.app import Server
from server.config_sections import ImpressionsConfig
from tests.conftest import StartServer
from tests.server.frontend import EXPLORE, Frontend
from tests.server.gated import GatedEngine
from tests.server.swapping import SWAP, TOKEN, Calls, publish


@pytest.fixture
async def gated(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Server, GatedEngine]]:
    """A server with one engine stream, and its gated engine; the gate opens at the end so that the server can drain."""
    monkeypatch.setattr("server.app.engine_factory", lambda *_: GatedEngine)
    server = await start_server(engine_streams=1, labels=("stable",), requests_in_flight_max=4, rows_in_flight_max=60)
    engine = server.status.default.model.engine
    assert isinstance(engine, GatedEngine)
    engine.runs.clear()
    yield server, engine
    engine.gate.set()


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """A store with tiny@1 as `stable`."""
    opened = open_model_store(tmp_path / "models")
    publish(opened, tmp_path, 1)
    opened.set_label("tiny", "stable", 1)
    return opened


@pytest.fixture
async def serve(start_server: StartServer, store: ModelStore, tmp_path: Path) -> StartServer:
    """Start servers that read the store, with changed settings."""
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")

    async def start(swap: dict[str, object] | None = None, **changes: object) -> Server:
        settings = {
            "model_store": store.where,
            "labels": ("stable", "canary", "shadow", "beta"),
            "admin_token_file": token,
            "swap": SWAP.model_copy(update=swap),
        }
        return await start_server(**settings | changes)

    return start


@pytest.fixture
async def calls() -> AsyncIterator[Callable[..., Calls]]:
    """Open channels to servers."""
    channels = []

    def to(server: Server, token: str = TOKEN) -> Calls:
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}"))
        return Calls(channels[-1], token)

    yield to
    for channel in channels:
        await channel.close()


@pytest.fixture
async def logging(start_server, store, tmp_path):
    """Start a server with a log whose model explores; return it, a frontend, and a function that stops and reads."""
    channels = []
    publish(store, tmp_path, 2, **{"explore.toml": EXPLORE})
    store.set_label("tiny", "stable", 2)

    async def start(**changes):
        log = ImpressionsConfig(to=f"file://{tmp_path / 'log'}", **changes.pop("impressions", {}))
        server = await start_server(model_store=store.where, record_actions=True, impressions=log, **changes)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}"))

        async def rows(table="impressions"):
            from impressions.reading import read_tables

            if server.serving:
                await server.drain_and_close()
            return [row for part in read_tables(str(tmp_path / "log"), table) for row in part.to_pylist()]

        return server, Frontend(channels[-1]), rows

    yield start
    for channel in channels:
        await channel.close()
