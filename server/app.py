"""The composition root: the only file that names concrete parts and puts them together."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Collection, Hashable, Mapping
from contextlib import AsyncExitStack

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from feature_client.fetch import FeatureNeeds, FetchedFeatures, fetch
from feature_client.near_cache import NearCache, near_caches
from feature_client.redaction import redacted
from feature_client.stores.open_store import open_store
from feature_client.stores.store import Store
from kernels.cores import cores
from kernels.engines import ON_GPU, default_streams, engine_factory
from model_store.registry.store import open_model_store
from pinrank.v1 import activity_pb2, models_pb2, ranking_pb2  # noqa: F401 - reflection answers from the registered descriptors
from server.api import activity
from server.api import models as model_service
from server.api.activity import ActivityEdge
from server.api.calls import CallBoundary
from server.api.draining import Calls, hang_up
from server.api.http import HttpEndpoint
from server.api.models import ModelEdge
from server.api.ranking import SERVICE, RankingEdge
from server.config import ConfigError, ServerConfig
from server.proving.admit_version import Intake
from server.proving.prover import Prover
from server.proving.recent_requests import RecentRequest, RecentRequests
from server.request.pipeline import Pipeline
from server.request.routing import ServedModel, ServedModels
from server.rollout.hot_swap import HotSwap
from server.rollout.refusals import Refusals
from server.rollout.shadow import SHADOW_LANE, Shadow
from server.runtime.listening import ListenError, http_interfaces, http_shown, open_grpc_port, shown
from server.runtime.memory import set_up_allocator
from server.runtime.signals import Ending, heed_signals
from server.runtime.supervisor import Supervisor
from server.scheduling.admission import Admission, Overload
from server.scheduling.cost import CostModel
from server.scheduling.earliest_deadline import EarliestDeadlineFirst
from server.scheduling.engine_streams import Runner
from server.scheduling.lanes import Lane
from server.scheduling.pace import Pace
from server.telemetry.metrics import Metrics

_log = structlog.get_logger(__name__)


#: For clients to close their side of what was hung up.
_HANG_UP_S = 0.5
#: What a server that stops may take beyond `drain_s`.
_EXIT_GRACE_S = 15.0
#: For reading what a new version needs of one recent request.
_SWAP_READ_S = 1.0


class StartError(Exception):
    """The server cannot start; the message says why."""


class Server:
    """A whole ranking server in one event loop."""

    def __init__(self, config: ServerConfig, *, shared_port: bool = False, prover: Prover | None = None) -> None:
        """Remember.

        Args:
            config: the settings.
            shared_port: whether other servers of ours listen on the same gRPC port.
            prover: of new versions; its own without.
        """
        self._shared_prover = prover
        self._config = config
        self._shared_port = shared_port
        self._supervisor = Supervisor()
        self._metrics = Metrics(self._supervisor)
        #: Runs in flight on each of the devices, and on all of them.
        self._streams_each = config.engine_streams or default_streams(config.engine, cores())
        self._streams = self._streams_each * len(config.devices)
        self._store: Store = open_store(
            config.feature_store.get_secret_value(), read_only=not config.record_actions, create=False
        )
        self._near: dict[bytes, NearCache] = {}
        self._calls = Calls()
        self._activity = ActivityEdge(self._metrics, self._calls)
        #: Versions in memory, by digest.
        self._installed: dict[str, ServedModel] = {}
        self._health = health.aio.HealthServicer()
        #: Closes what was opened, last first.
        self._opened = AsyncExitStack()
        self.serving = False
        #: The gRPC port, or the path of a Unix socket.
        self.listens_on: int | str = 0
        self.http_port = 0

    @property
    def grpc_port(self) -> int:
        return self.listens_on if isinstance(self.listens_on, int) else 0

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
        self._models = models = ServedModels(config.labels[0])
        self._opened.push_async_callback(self._store.close)
        await self._store.start()
        recent = RecentRequests()
        models_store = open_model_store(config.model_store)
        try:
            factory = engine_factory(config.engine, config.devices)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        prover = self._shared_prover or Prover(config.engine)
        await asyncio.to_thread(prover.start)  # it imports what it needs meanwhile
        refusals = Refusals(config.state_folder, config.model)
        self._runner = runner = self._new_runner(prover.pace)
        own_prover = self._shared_prover is None
        intake = Intake(
            models_store, config, factory, self._streams_each, recent, self, prover, self._supervisor, refusals,
            own_prover=own_prover,
        )  # fmt: skip
        self._swap = swap = HotSwap(
            models_store, config, models, intake, self, self._metrics, self._supervisor, refusals
        )
        self._opened.push_async_callback(swap.close)
        runner.start()
        self._opened.push_async_callback(asyncio.to_thread, runner.close)
        self._metrics.watch(runner.admission, self._near, self._store)
        self._pipeline = pipeline = Pipeline(
            self._store, self._near, runner, config.fetch_budget_share, config.answer_margin_ms / 1e3
        )
        shadow = Shadow(models, pipeline, config.shadow.label, config.shadow.share, self._supervisor)
        self._opened.push_async_callback(shadow.close)
        self._opened.callback(self._supervisor.close)
        self._metrics.watch_models(
            models, lambda: {v: str(held.phase) for v, held in swap.versions.copy().items()}, shadow, swap.behind,
            swap.warm_ups,
        )  # fmt: skip
        self._edge = RankingEdge(pipeline, models, config, self._metrics, recent, shadow, self._calls)
        self._model_edge = ModelEdge(swap, models, shadow, config)
        self._open_http()  # before the models are there: it says what the start is at
        await swap.start()
        _check_surfaces(config, models)
        await self._open_grpc()
        self.serving = True
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        _log.info(
            "serving",
            grpc=shown(config.host, self.listens_on),
            http=http_shown(config.host, self.http_port),
            labels={label: served.model.manifest.ref for label, served in models.by_label.items()},
            engine=config.engine,
            **({"devices": config.devices} if config.engine in ON_GPU else {}),
            streams=self._streams,
            feature_store=redacted(config.feature_store.get_secret_value()),
        )

    def _new_runner(self, pace: Pace) -> Runner:
        """Put the policies together: what is learned of each model, who goes first, what is refused."""
        config = self._config
        costs: dict[Hashable, CostModel] = {}
        lanes = {name: Lane(surface.priority, surface.share) for name, surface in config.surfaces.items()}
        lanes[SHADOW_LANE] = Lane(priority=-100, share=0.01)
        overload = {name: Overload(s.overload, s.trim_candidates_min) for name, s in config.surfaces.items()}
        policy = EarliestDeadlineFirst(self._streams, costs.__getitem__, lanes)
        admission = Admission(
            policy, overload, config.requests_in_flight_max, config.rows_in_flight_max, config.bytes_in_flight_max
        )
        return Runner(policy, admission, self._streams, costs, self._metrics, pace, self._supervisor)

    # What taking versions in and letting them go asks of the rest of the server (`intake.Features`, `hot_swap.Host`).

    async def features(self, needs: FeatureNeeds, request: RecentRequest) -> FetchedFeatures:
        return await fetch(
            self._store, needs, request.user_id, request.pin_ids, request.query_pin_id, _SWAP_READ_S, self._near
        )

    def new_caches(self, needs: FeatureNeeds) -> Mapping[bytes, NearCache]:
        config = self._config
        if not config.near_cache_bytes:
            return {}
        lacking = tuple(group for group in needs.pin_groups if group.fingerprint not in self._near)
        # A model's groups share the memory; while two models read different groups, each model's do.
        share = config.near_cache_bytes * len(lacking) // max(1, len(needs.pin_groups))
        return near_caches(lacking, share, config.near_cache_stale_s, config.near_cache_outage_s) if lacking else {}

    def add_caches(self, caches: Mapping[bytes, NearCache]) -> None:
        self._near.update(caches)

    def drop_caches(self, needed: Collection[FeatureNeeds]) -> None:
        read = {group.fingerprint for needs in needed for group in needs.pin_groups}
        for fingerprint in self._near.keys() - read:
            del self._near[fingerprint]

    def install(self, served: ServedModel) -> None:
        self._runner.learn(served.model)
        self._installed[served.model.digest] = served
        self._record_actions()

    def dismiss(self, served: ServedModel) -> None:
        self._runner.forget(served.model)
        del self._installed[served.model.digest]
        self._record_actions()

    def runs(self, served: ServedModel) -> int:
        return self._runner.runs(served.model)

    def _record_actions(self) -> None:
        """Record into every sequence that a model in memory reads; into none when actions are not recorded."""
        if self._config.record_actions:
            sequences = (served.model.manifest.sequence for served in self._installed.values())
            self._activity.write_into([sequence for sequence in sequences if sequence is not None], self._store)

    def catch_strays(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count and log what fails on an event loop and is nobody's."""
        self._supervisor.catch_strays(loop)

    async def drain_and_close(self, hurry: asyncio.Event | None = None) -> None:
        """Refuse new calls, let those in flight finish within `drain_s`, then close everything.

        Every caller gets its answer or UNAVAILABLE.

        Args:
            hurry: ends the wait for those in flight.
        """
        self.serving = False
        self._calls.draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        _log.info("draining", drain_s=self._config.drain_s)
        ended = asyncio.ensure_future(self._calls.ended())
        hurried = asyncio.ensure_future((hurry or asyncio.Event()).wait())
        await asyncio.wait({ended, hurried}, timeout=self._config.drain_s, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        hurried.cancel()
        if self._calls.in_flight:
            _log.warning("drain_ended_early", calls_cut_off=self._calls.in_flight)
        try:
            hang_up(self.listens_on)
        except OSError as error:  # without /dev/fd; gRPC's own way remains
            _log.warning("not_hung_up", reason=f"{error}; callers may see CANCELLED")
        await self._grpc.stop(_HANG_UP_S)
        await self._opened.aclose()
        _log.info("stopped")

    def _open_http(self) -> None:
        config = self._config
        try:
            for interface in http_interfaces(config.host):
                port = self.http_port or config.http_port
                try:
                    http = HttpEndpoint(
                        interface, port, self._metrics.registry, lambda: self.serving, self._details, self._supervisor
                    )
                except OSError as error:
                    raise ListenError(
                        f"cannot listen on {interface.at(port)} ({error.strerror}); set http_port to move"
                    ) from error
                self.http_port = http.port
                http.start()
                self._opened.callback(http.close)
        except ListenError as error:
            raise StartError(str(error)) from error

    async def _open_grpc(self) -> None:
        config = self._config
        self._grpc = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", config.message_bytes_max),
                # With port sharing on, a second server on the port would silently take half of the calls.
                ("grpc.so_reuseport", int(self._shared_port)),
            ),
            interceptors=(CallBoundary(),),
        )
        self._opened.push_async_callback(self._grpc.stop, 0)
        self._grpc.add_generic_rpc_handlers(
            (self._edge.handler(), self._activity.handler(), self._model_edge.handler())
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection(
            (SERVICE, activity.SERVICE, model_service.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc
        )
        try:
            self.listens_on = open_grpc_port(self._grpc, config.host, config.grpc_port)
        except ListenError as error:
            raise StartError(str(error)) from error
        await self._grpc.start()

    def _details(self) -> list[str]:
        """Say what is not as it should be, and how background work does."""
        behind = [
            f"{label}: answers with version {answers}, the model store names {named}"
            for label, (answers, named) in self._swap.behind().items()
        ]
        return [*self._swap.coming(), *behind, *self._supervisor.lines()]

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE, activity.SERVICE, model_service.SERVICE):
            await self._health.set(service, status)


async def serve(config: ServerConfig, *, shared_port: bool = False) -> None:
    """Run a server until a signal asks for its end, then drain it; one that comes during the start ends that."""
    set_up_allocator()
    loop = asyncio.get_running_loop()
    ending = heed_signals(loop, config.drain_s + _EXIT_GRACE_S)
    server = Server(config, shared_port=shared_port)
    server.catch_strays(loop)
    if not await _started(server, ending):
        _log.info("stopped_during_start")
        return
    # What lives now lives as long as the server: the collector need not look at it again.
    gc.freeze()
    await ending.asked.wait()
    await server.drain_and_close(ending.hurried)


async def _started(server: Server, ending: Ending) -> bool:
    """Start a server; False when its end was asked for before it served."""
    start, asked = asyncio.ensure_future(server.start()), asyncio.ensure_future(ending.asked.wait())
    await asyncio.wait({start, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    start.cancel()  # nothing to one that is done
    try:
        await start
    except asyncio.CancelledError:
        return False
    return True


def _check_surfaces(config: ServerConfig, models: ServedModels) -> None:
    unknown = sorted(set(config.surfaces) - models.surfaces)
    if unknown:
        raise ConfigError(
            f"surfaces.{unknown[0]}: no served model ranks this surface; there are {sorted(models.surfaces)}"
        )
