"""The composition root: the only file that names concrete parts and puts them together."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Hashable
from contextlib import AsyncExitStack

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from feature_client.activity import ActivityWriter
from feature_client.groups import SequenceGroup
from feature_client.near_cache import near_caches
from feature_client.opening import open_store, redacted
from feature_client.store import Store
from kernels.opening import engine_factory
from model_store.live import LiveModel, load_live
from model_store.store import open_model_store
from model_store.utility import load_utility
from pinrank.v1 import activity_pb2, ranking_pb2  # noqa: F401 - reflection answers from the registered descriptors
from server import activity
from server.activity import ActivityEdge
from server.admission import Admission, Overload
from server.batching import EarliestDeadlineFirst, Lane
from server.config import ConfigError, ServerConfig
from server.edge import SERVICE, RankingEdge
from server.http import HttpEndpoint
from server.learned import CostModel
from server.metrics import Metrics
from server.pipeline import Pipeline
from server.runner import Runner
from server.served import Served, ServedModels

_log = structlog.get_logger(__name__)


_LAST_ANSWERS_S = 0.5


class StartError(Exception):
    """The server cannot start; the message says why."""


class Server:
    """A whole ranking server in one event loop."""

    def __init__(self, config: ServerConfig, *, shared_port: bool = False) -> None:
        """Remember.

        Args:
            config: the settings.
            shared_port: whether other servers of ours listen on the same gRPC port.
        """
        self._config = config
        self._shared_port = shared_port
        self._metrics = Metrics()
        self._streams = config.engine_streams or cores()
        self._store: Store = open_store(config.feature_store, read_only=not config.record_actions, create=False)
        self._health = health.aio.HealthServicer()
        #: Closes what was opened, last first.
        self._opened = AsyncExitStack()
        self.serving = False
        self.grpc_port = 0
        self.http_port = 0

    async def start(self) -> None:
        """Load and prove the models, open the store, then open the ports. What fails leaves nothing open.

        Raises:
            ConfigError, StoreError, ModelStoreError, BundleError, UtilityError, StartError: why it cannot serve.
        """
        try:
            await self._start()
        except BaseException:
            await self._opened.aclose()
            raise

    async def _start(self) -> None:
        config = self._config
        self._models = models = await asyncio.to_thread(_load_models, config, self._streams, self._opened)
        _check_surfaces(config, models)
        self._opened.push_async_callback(self._store.close)
        await self._store.start()
        self._runner = runner = self._new_runner(models)
        runner.start()
        self._opened.push_async_callback(asyncio.to_thread, runner.close)
        groups = tuple(group for served in models.by_label.values() for group in served.live.needs.pin_groups)
        near = (
            near_caches(groups, config.near_cache_bytes, config.near_cache_stale_s, config.near_cache_outage_s)
            if config.near_cache_bytes
            else {}
        )
        self._metrics.watch(runner.admission, near.values(), self._store)
        self._pipeline = pipeline = Pipeline(
            self._store, near, runner, config.fetch_budget_share, config.answer_margin_ms / 1e3
        )
        self._edge = RankingEdge(pipeline, models, config, self._metrics)
        self._activity = ActivityEdge(self._activity_writers(models), self._metrics)
        for label, served in models.by_label.items():
            live = served.live
            self._metrics.model_info.labels(live.manifest.name, live.manifest.version, label, live.digest).set(1)
        await self._open_ports()
        self.serving = True
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        _log.info(
            "serving",
            grpc=f"{config.host}:{self.grpc_port}",
            http=f"{config.host}:{self.http_port}",
            labels={label: served.live.manifest.ref for label, served in models.by_label.items()},
            engine=config.engine,
            streams=self._streams,
            feature_store=redacted(config.feature_store),
        )

    def _new_runner(self, models: ServedModels) -> Runner:
        """Put the policies together: what is learned of each model, who goes first, what is refused."""
        config = self._config
        lives = [served.live for served in models.by_label.values()]
        costs: dict[Hashable, CostModel] = {live.digest: CostModel(live.engine.cost_s) for live in lives}
        settings = {name: config.surface(name) for name in models.surfaces}
        lanes = {name: Lane(surface.priority, surface.share) for name, surface in settings.items()}
        overload = {name: Overload(s.overload, s.trim_candidates_min) for name, s in settings.items()}
        policy = EarliestDeadlineFirst(self._streams, costs.__getitem__, lanes)
        admission = Admission(
            policy, overload, config.requests_in_flight_max, config.rows_in_flight_max, config.bytes_in_flight_max
        )
        return Runner(policy, admission, self._streams, costs, self._metrics)

    def _activity_writers(self, models: ServedModels) -> list[tuple[SequenceGroup, ActivityWriter]]:
        """Return a writer for each distinct sequence that a served model reads; none when actions are not recorded."""
        if not self._config.record_actions:
            return []
        sequences = (served.live.manifest.sequence for served in models.by_label.values())
        distinct = {sequence.fingerprint: sequence for sequence in sequences if sequence is not None}
        return [(sequence, ActivityWriter(self._store, sequence)) for sequence in distinct.values()]

    async def drain_and_close(self) -> None:
        """Refuse new calls, let those in flight finish within `drain_s`, then close everything."""
        self.serving = False
        self._edge.draining = self._activity.draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        _log.info("draining", drain_s=self._config.drain_s)
        try:
            async with asyncio.timeout(self._config.drain_s):
                await self._pipeline.drained()
        except TimeoutError:
            _log.warning("drain_ended_early", requests_cut_off=self._pipeline.in_flight)
        # Answers on their way out still leave; health watchers and idle connections are not waited for.
        await self._grpc.stop(_LAST_ANSWERS_S)
        await self._opened.aclose()
        _log.info("stopped")

    async def _open_ports(self) -> None:
        config = self._config
        self._grpc = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", config.message_bytes_max),
                # With port sharing on, a second server on the port would silently take half of the calls.
                ("grpc.so_reuseport", int(self._shared_port)),
            )
        )
        self._opened.push_async_callback(self._grpc.stop, 0)
        self._grpc.add_generic_rpc_handlers((self._edge.handler(), self._activity.handler()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection(
            (SERVICE, activity.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc
        )
        try:
            self.grpc_port = self._grpc.add_insecure_port(f"{config.host}:{config.grpc_port}")
        except RuntimeError as error:
            raise StartError(
                f"cannot listen on {config.host}:{config.grpc_port}; is another server there? Set grpc_port to move"
            ) from error
        try:
            http = HttpEndpoint(config.host, config.http_port, self._metrics.registry, lambda: self.serving)
        except OSError as error:
            raise StartError(
                f"cannot listen on {config.host}:{config.http_port} ({error.strerror}); set http_port to move"
            ) from error
        self.http_port = http.port
        http.start()
        self._opened.callback(http.close)
        await self._grpc.start()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE, activity.SERVICE):
            await self._health.set(service, status)


async def serve(config: ServerConfig, *, shared_port: bool = False) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(config, shared_port=shared_port)
    await server.start()
    # What lives now lives as long as the server: the collector need not look at it again.
    gc.freeze()
    await stop.wait()
    await server.drain_and_close()


def cores() -> int:
    """Return the cores this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load_models(config: ServerConfig, streams: int, opened: AsyncExitStack) -> ServedModels:
    """Load each label's version once; two labels on one version share it. Engines close with `opened`."""
    store = open_model_store(config.model_store)
    factory = engine_factory(config.engine)
    override = config.utility.read_bytes() if config.utility else None
    loaded: dict[int, LiveModel] = {}
    by_label = {}
    for label in config.labels:
        version = store.resolve(config.model, label)
        live = loaded.get(version)
        if live is None:
            live = loaded[version] = load_live(store.read(config.model, version), factory, streams)
            opened.callback(live.engine.close)
            _log.info("model_loaded", model=live.manifest.ref, digest=live.digest, kernel=live.engine.kernel)
        by_label[label] = Served(live, load_utility(live.utility_toml if override is None else override, live.manifest))
    return ServedModels(by_label)


def _check_surfaces(config: ServerConfig, models: ServedModels) -> None:
    unknown = sorted(set(config.surfaces) - models.surfaces)
    if unknown:
        raise ConfigError(
            f"surfaces.{unknown[0]}: no served model ranks this surface; there are {sorted(models.surfaces)}"
        )
