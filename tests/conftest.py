from __future__ import annotations

import os

# Tests run in parallel, so PyTorch's threads must sleep while they wait. PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest
import structlog
from hypothesis import HealthCheck, settings
from pydantic import SecretStr

from feature_client.stores.lmdb_store import EmbeddedStore
from model_store.registry.store import open_model_store
from server.app import Server
from server.config import ServerConfig
from server.proving.prover import Prover
from tests import tiny
from tests.redis_servers import RedisServer, cluster, running

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

# `nohup` and shells that start a background job make processes ignore these, and their children as well: tests that
# end a process by a signal would wait for ever.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

#: Packages of the extra `train`. If PyTorch cannot be installed, `make test` skips the tests that need them.
TRAINING = ("torch", "sklearn", "scipy", "onnxscript", "triton")
WITHOUT_TRAINING = find_spec("torch") is None
_WHY = "is not installed: see TORCH in docs/install.md"
#: For tests that train in another process, or with a command that reports a missing package as its own error.
needs_training = pytest.mark.skipif(WITHOUT_TRAINING, reason=f"torch {_WHY}")

if not WITHOUT_TRAINING:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when kernels are defined

# The time of an example depends on the tests that run in parallel.
settings.register_profile("side by side", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Under a sanitizer (`tests/kernels/native`), the first example that reaches a fault is enough.
settings.register_profile("sanitized", settings.get_profile("side by side"), max_examples=25)
settings.load_profile("side by side")


class _TestModule(pytest.Module):
    """A test file; skipped with a reason if it imports a package that was left out on purpose."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            _skip_without_training(error.__cause__)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    module: pytest.Module = _TestModule.from_parent(parent, path=module_path)
    return module


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    return (yield from _skipping())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    return (yield from _skipping())


def _skipping() -> Generator[None, object, object]:
    try:
        return (yield)
    except Exception as error:
        _skip_without_training(error)
        raise


def _skip_without_training(error: BaseException | None) -> None:
    """Skip the test if its error, or a cause of it, is the import of a package that was left out on purpose."""
    while WITHOUT_TRAINING and error is not None:
        missing = (getattr(error, "name", None) or "") if isinstance(error, ModuleNotFoundError) else ""
        if missing.partition(".")[0] in TRAINING:
            pytest.skip(f"{missing} {_WHY}")
        error = error.__cause__


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Give the workers of pytest-xdist single tests, but a module with a module-scoped fixture to one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class ByTestOrModule(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if 'scope="module"' in (config.rootpath / file).read_text() else nodeid

    return ByTestOrModule(config, log)


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """Undo the logging setup of commands that a test runs in this process."""
    handlers = logging.root.handlers.copy()
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
        logging.root.handlers[:] = handlers
        threading.excepthook = threading.__excepthook__


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PINRANK_"):
            monkeypatch.delenv(name)
    # Test servers are on loopback and must not be reached through the machine's proxy.
    monkeypatch.setenv("no_proxy", f"{os.environ.get('no_proxy', '')},127.0.0.1,localhost,::1,[::1]")


@pytest.fixture(scope="session")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with tiny@1 labelled `stable` and tiny@2 labelled `canary`."""
    root = tmp_path_factory.mktemp("models")
    store = open_model_store(root)
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
        model_store=str(model_store),
        model="tiny",
        labels=("stable", "canary"),
        feature_store=SecretStr(feature_store_url),
        grpc_port=0,
        http_port=0,
        engine_streams=2,
        candidates_max=100,
    )


@pytest.fixture(scope="session")
def prover() -> Iterator[Prover]:
    """One prover for all servers, as it takes a second to start; at low priority, parallel tests would starve it."""
    with closing(Prover("openvino", nice=0)) as shared:
        yield shared


def changed(config: ServerConfig, changes: Mapping[str, object]) -> ServerConfig:
    """Return a validated copy of settings, with some of them changed."""
    return ServerConfig.model_validate(
        {**{name: getattr(config, name) for name in ServerConfig.model_fields}, **changes}
    )


StartServer = Callable[..., Awaitable[Server]]


@pytest.fixture
async def start_server(config: ServerConfig, prover: Prover) -> AsyncIterator[StartServer]:
    """Start servers in this process on free ports, with changed settings; drain all of them at the end."""
    running = []

    async def start(own_prover: Prover | None = None, **changes: object) -> Server:
        server = Server(changed(config, changes), prover=own_prover or prover)
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


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real redis-server on loopback that no test kills."""
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """A real cluster of three nodes that no test kills."""
    with cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


async def eventually(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait until `condition` holds, letting the event loop run; fail after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - plain state; nothing signals its changes
            # More than 0, so that other threads get the interpreter.
            await asyncio.sleep(0.002)
