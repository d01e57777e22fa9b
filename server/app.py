"""The composition root: creates the parts of a ranking server, connects them, and starts and drains the whole."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Hashable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog

from feature_client.redaction import redacted
from feature_client.stores.open_store import open_store
from feature_client.stores.store import Store
from kernels.cores import answer_at_once, compute_behind_others, cores, keep_to, own_cores
from kernels.engine import EngineFactory
from kernels.engines import ON_GPU, default_streams, engine_factory
from model_store.registry.store import ModelStore, open_model_store
from server.api import activity, impressions, ranking
from server.api import models as model_service
from server.api.activity import ActivityEdge
from server.api.draining import Calls
from server.api.http import open_endpoints
from server.api.impressions import ImpressionEdge
from server.api.models import ModelEdge
from server.api.ranking import RankingEdge
from server.config import ConfigError, ServerConfig
from server.edge.endpoints import new_endpoint
from server.proving.admit_version import VersionAdmitter
from server.proving.prover import Prover
from server.proving.recent_requests import RecentRequests
from server.proving.refusals import Refusals
from server.request.feature_metrics import NearCacheCollector, SweepCollector, store_collectors
from server.request.features import FeatureReader
from server.request.pipeline import Pipeline
from server.request.recording import Recording, RecordingRules
from server.request.routing import ServedModels
from server.rollout.hot_swap import HotSwap
from server.rollout.installed_models import InstalledModels
from server.rollout.model_metrics import ModelCollector
from server.rollout.shadow import SHADOW_LANE, Shadow
from server.rollout.status import ServerStatus
from server.runtime.listening import ListenError, http_shown, shown
from server.runtime.memory import set_up_allocator
from server.runtime.signals import Ending, heed_signals
from server.runtime.supervisor import Supervisor
from server.runtime.tasks import BackgroundTasks
from server.scheduling.admission import Admission, Overload
from server.scheduling.cost import CostModel
from server.scheduling.earliest_deadline import EarliestDeadlineFirst
from server.scheduling.engine_streams import Runner
from server.scheduling.in_flight_metrics import InFlightCollector
from server.scheduling.lanes import Lane
from server.scheduling.pace import Pace
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from server.request.answer_log import AnswerLog

_log = structlog.get_logger(__name__)

#: Time that a stopping server may take beyond `drain_s`.
_EXIT_GRACE_S = 15.0


class StartError(Exception):
    """The server cannot start; the message says why."""


class Server:
    """A complete ranking server in one event loop.

    Attributes:
        store: the feature store.
        metrics: all metrics.
        recording: the activity sequences that users' actions are written into.
        calls: counts the calls in flight.
        serving: whether the server answers Rank calls.
        http_port: port of `/metrics` and `/healthz`.
        status: a read-only view of the server's models and their health. Like `model_store`, `admitter` and `swap`, it
            exists only once `start` has been called.
    """

    model_store: ModelStore
    admitter: VersionAdmitter
    swap: HotSwap
    status: ServerStatus

    def __init__(self, config: ServerConfig, *, shared_port: bool = False, prover: Prover | None = None) -> None:
        """Create a server without starting it.

        Args:
            config: the settings.
            shared_port: whether other processes of this server listen on the same gRPC port.
            prover: proves new versions; without one, the server starts a prover of its own.
        """
        self._shared_prover = prover
        self._config = config
        self._shared_port = shared_port
        self._supervisor = Supervisor()
        self.metrics = Metrics(self._supervisor)
        #: Maximum number of concurrent engine runs, on each device and in total.
        self._streams_each = config.engine_streams or default_streams(config.engine, cores())
        self._streams = self._streams_each * len(config.devices)
        self.store: Store = open_store(
            config.feature_store.get_secret_value(), read_only=not config.record_actions, create=False
        )
        self.recording = Recording(
            self.store,
            self.metrics.actions.future_actions.inc,
            RecordingRules(
                config.record_lasts_s, config.record_new_users_per_s, config.record_user_actions_per_s,
                config.record_values_max,
            ),
        )  # fmt: skip
        self.calls = Calls()
        #: Closes the opened parts, in reverse order.
        self._opened = AsyncExitStack()
        self.serving = False
        self.http_port = 0

    @property
    def listens_on(self) -> int | str:
        """The gRPC port, or the path of a Unix socket."""
        return self._endpoint.listens_on

    @property
    def grpc_port(self) -> int:
        return self.listens_on if isinstance(self.listens_on, int) else 0

    async def start(self) -> None:
        """Open the store and the HTTP port, prove and load the models, then open the gRPC port.

        If a step fails, everything opened so far is closed.

        Raises:
            ConfigError, StoreError, ModelStoreError, BundleError, UtilityError, StartError: the server cannot serve;
                the message says why.
        """
        try:
            await self._start()
        except BaseException:
            await self._opened.aclose()
            raise

    async def _start(self) -> None:
        config, opened = self._config, self._opened
        opened.push_async_callback(self.store.close)
        await self.store.start()
        self.model_store = open_model_store(config.model_store)
        prover = self._shared_prover or Prover(config.engine)
        factory = self._engine_factory()
        await asyncio.to_thread(prover.start)  # it imports its libraries while we go on
        log = self._open_log()
        models = self._build(factory, prover, log)
        try:
            self._open_http()  # before the models are loaded, so that /healthz shows the start's progress
            await self.swap.start()
            self._watch_recording()
            _check_surfaces(config, models)
            opened.push_async_callback(self._endpoint.stop)
            await self._endpoint.start(config.host, config.grpc_port)
        except ListenError as error:
            raise StartError(str(error)) from error
        self.serving = True
        await self._endpoint.set_serving(serving=True)
        _log.info(
            "serving",
            grpc=shown(config.host, self.listens_on),
            edge=self._endpoint.kind,
            http=http_shown(config.host, self.http_port),
            labels={label: served.model.manifest.ref for label, served in models.by_label.items()},
            engine=config.engine,
            **({"devices": config.devices} if config.engine in ON_GPU else {}),
            streams=self._streams,
            feature_store=redacted(config.feature_store.get_secret_value()),
        )

    def _watch_recording(self) -> None:
        """Start what keeps the recorded sequences within their bounds."""
        if not self._config.record_actions:
            return
        tasks = BackgroundTasks()
        if self.recording.sweeper is not None:
            self.metrics.register(SweepCollector(self.recording.sweeper))
            tasks.start(self._supervisor.loop("recorded-sequences", self.recording.sweeper.run))
        if self.recording.rules.values_max:
            tasks.start(self._supervisor.loop("store-size", self.recording.watch_size))
        self._opened.push_async_callback(tasks.cancel)

    def _engine_factory(self) -> EngineFactory:
        try:
            return engine_factory(self._config.engine, self._config.devices, self._config.engine_products)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _open_log(self) -> AnswerLog | None:
        config = self._config.impressions
        if config.to is None:
            return None
        # Only here: it imports pyarrow, which a server without a log does not need.
        from impressions.errors import LogError  # noqa: PLC0415
        from server.request.running_log import RunningLog  # noqa: PLC0415

        try:
            running = RunningLog(config, config.to, self._supervisor)
        except LogError as error:
            raise ConfigError(f"impressions.to: {error}") from error
        self._opened.push_async_callback(running.close)
        self.metrics.register(running.collector)
        return running.answers

    def _build(self, factory: EngineFactory, prover: Prover, log: AnswerLog | None) -> ServedModels:
        """Create the parts, each after the parts that it uses, and register their metrics."""
        config, opened, metrics, supervisor = self._config, self._opened, self.metrics, self._supervisor
        models, recent = ServedModels(config.labels[0]), RecentRequests()
        features = FeatureReader(
            self.store, config.near_cache_bytes, config.near_cache_stale_s, config.near_cache_outage_s
        )
        costs: dict[Hashable, CostModel] = {}
        admission, runner = self._new_runner(costs, prover.pace)
        installed = InstalledModels(runner, features, self.recording if config.record_actions else None)
        refusals = Refusals(config.state_folder, config.model)
        self.admitter = VersionAdmitter(
            self.model_store, config, factory, self._streams_each, recent, features, prover, supervisor, refusals,
            own_prover=self._shared_prover is None,
        )  # fmt: skip
        self.swap = HotSwap(
            self.model_store, config, models, self.admitter, installed, metrics.models, supervisor, refusals
        )
        opened.push_async_callback(self.swap.close)
        runner.start()
        opened.push_async_callback(asyncio.to_thread, runner.close)
        pipeline = Pipeline(
            features, runner, config.fetch_budget_share, config.answer_margin_ms / 1e3, metrics.exploration,
            explore=config.explore,
        )  # fmt: skip
        shadow = Shadow(models, pipeline, config.shadow.label, config.shadow.share, supervisor)
        opened.push_async_callback(shadow.close)
        opened.callback(supervisor.close)
        self.status = ServerStatus(
            config.labels, models, self.swap, shadow, installed, features, self.recording, runner, costs, supervisor
        )
        metrics.register(
            InFlightCollector(admission), NearCacheCollector(features.caches), *store_collectors(self.store),
            ModelCollector(self.status),
        )  # fmt: skip
        services = {
            ranking.SERVICE: RankingEdge(
                pipeline, models, config, metrics.requests, recent, shadow, self.calls, log
            ).methods(),
            activity.SERVICE: ActivityEdge(metrics.actions, self.calls, self.recording, log).methods(),
            impressions.SERVICE: ImpressionEdge(self.calls, log, config.candidates_max).methods(),
            model_service.SERVICE: ModelEdge(self.swap, self.status, config).methods(),
        }
        self._endpoint = new_endpoint(services, config, shared_port=self._shared_port)
        return models

    def _open_http(self) -> None:
        config, registry = self._config, self.metrics.registry
        for endpoint in open_endpoints(
            config.host, config.http_port, registry, lambda: self.serving, self.status.lines, self._supervisor
        ):
            self.http_port = endpoint.port
            self._opened.callback(endpoint.close)

    def _new_runner(self, costs: dict[Hashable, CostModel], pace: Pace) -> tuple[Admission, Runner]:
        """Create the scheduling policies (costs, order of requests, admission) and the engine streams they control."""
        config = self._config
        lanes = {name: Lane(surface.priority, surface.share) for name, surface in config.surfaces.items()}
        lanes[SHADOW_LANE] = Lane(priority=-100, share=0.01)
        overload = {name: Overload(s.overload, s.trim_candidates_min) for name, s in config.surfaces.items()}
        policy = EarliestDeadlineFirst(self._streams, costs.__getitem__, lanes)
        admission = Admission(
            policy, overload, config.requests_in_flight_max, config.rows_in_flight_max, config.bytes_in_flight_max
        )
        own = own_cores(self._streams)

        def settle(stream: int) -> None:
            """Place a stream's thread; one that only waits for its GPU may run anywhere, and at once."""
            if config.engine in ON_GPU:
                return
            if own:
                keep_to(own[stream])
            compute_behind_others()

        runner = Runner(
            policy, admission, self._streams, costs, self.metrics.engine, pace, self._supervisor, settle=settle
        )
        return admission, runner

    def catch_strays(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count and log exceptions on an event loop that nothing else handles."""
        self._supervisor.catch_strays(loop)

    async def drain_and_close(self, hurry: asyncio.Event | None = None) -> None:
        """Refuse new calls, let calls in flight finish within `drain_s`, then close everything.

        Every caller gets its answer or UNAVAILABLE.

        Args:
            hurry: ends the wait for the calls in flight early when it is set.
        """
        self.serving = False
        await self._endpoint.set_serving(serving=False)
        _log.info("draining", drain_s=self._config.drain_s)
        await self.calls.drain(self._config.drain_s, hurry)
        if self.calls.in_flight:
            _log.warning("drain_ended_early", calls_cut_off=self.calls.in_flight)
        await self._endpoint.hang_up()
        await self._opened.aclose()
        _log.info("stopped")


async def serve(config: ServerConfig, *, shared_port: bool = False) -> None:
    """Run a server until a signal arrives, then drain it; a signal during the start cancels the start."""
    set_up_allocator()
    loop = asyncio.get_running_loop()
    ending = heed_signals(loop, config.drain_s + _EXIT_GRACE_S)
    server = Server(config, shared_port=shared_port)
    server.catch_strays(loop)
    if not await _started(server, ending):
        _log.info("stopped_during_start")
        return
    if not answer_at_once():
        _log.info("event_loop_without_priority")
    # Objects that exist now live as long as the server, so the garbage collector need not scan them again.
    gc.freeze()
    await ending.asked.wait()
    await server.drain_and_close(ending.hurried)


async def _started(server: Server, ending: Ending) -> bool:
    """Start a server; return False if a signal arrived before it was serving."""
    start, asked = asyncio.ensure_future(server.start()), asyncio.ensure_future(ending.asked.wait())
    await asyncio.wait({start, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    start.cancel()  # has no effect if the start is done
    try:
        await start
    except asyncio.CancelledError:
        return False
    return True


def _check_surfaces(config: ServerConfig, models: ServedModels) -> None:
    unknown = sorted(set(config.surfaces) - models.surfaces)
    if unknown:
        raise ConfigError(
            f"surfaces.{unknown[0]}: no served model ranks this surface; the served models rank "
            f"{', '.join(sorted(models.surfaces))}"
        )
