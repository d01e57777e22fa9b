"""The composition root: creates the parts of a ranking server, connects them, and starts and drains the whole."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Hashable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

import structlog

from feature_client.redaction import redacted
from feature_client.stores.open_store import open_store
from feature_client.stores.store import Store
from kernels.cores import compute_behind_others, cores, keep_to, own_cores
from kernels.engine import EngineFactory
from kernels.engines import ON_GPU, default_streams, engine_factory
from model_store.registry.store import ModelStore, open_model_store
from server.access.gate import Gate
from server.access.tokens import read_token
from server.api import activity, impressions, ranking
from server.api import models as model_service
from server.api.activity import ActivityEdge
from server.api.draining import Calls
from server.api.impressions import ImpressionEdge
from server.api.models import ModelEdge
from server.api.ranking import RankingEdge
from server.config import ConfigError, ServerConfig
from server.edge.certificate_watch import CertificateWatch
from server.edge.connection import RETIREMENT_S
from server.edge.endpoints import new_endpoint
from server.edge.tls import TlsPort, load_certificates
from server.proving.admit_version import VersionAdmitter
from server.proving.prover import Prover
from server.proving.recent_requests import RecentRequests
from server.proving.refusals import Refusals
from server.request.feature_metrics import NearCacheCollector, SweepCollector, store_collectors
from server.request.features import FeatureReader
from server.request.pipeline import Pipeline
from server.request.recording import Recording, RecordingRules
from server.request.routing import ServedModels
from server.request.store_watch import StoreWatch
from server.rollout.hot_swap import HotSwap
from server.rollout.installed_models import InstalledModels
from server.rollout.model_metrics import ModelCollector
from server.rollout.shadow import SHADOW_LANE, Shadow
from server.rollout.status import ServerStatus
from server.runtime.listening import ListenError, http_shown, shown
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
from server.web.open_site import open_site
from server.web.probes import Heartbeat, Probes, ProcessState

if TYPE_CHECKING:
    from server.request.answer_log import AnswerLog
    from server.runtime.tls import Certificates

_log = structlog.get_logger(__name__)


class StartError(Exception):
    """The server cannot start; the message says why."""


class Server:
    """A complete ranking server in one event loop.

    Attributes:
        store: the feature store.
        metrics: all metrics.
        recording: the activity sequences that users' actions are written into.
        calls: counts the calls in flight.
        state: what the probes report: whether the server has started, answers Rank calls, and can read features.
        http_port: port of `/metrics` and the probes.
        status: a read-only view of the server's models and their health. Like `model_store`, `admitter` and `swap`, it
            exists only once `start` has been called.
    """

    model_store: ModelStore
    admitter: VersionAdmitter
    swap: HotSwap
    status: ServerStatus

    def __init__(
        self, config: ServerConfig, *, channel: socket.socket | None = None, prover: Prover | None = None
    ) -> None:
        """Create a server without starting it.

        Args:
            config: the settings.
            channel: of one of several processes on one gRPC port: brings the HTTP requests of their parent, which
                listens on the HTTP port for all of them.
            prover: proves new versions; without one, the server starts a prover of its own.
        """
        self._shared_prover = prover
        self._config = config
        self._channel = channel
        self._supervisor = Supervisor()
        self.metrics = Metrics(self._supervisor)
        #: Maximum number of concurrent engine runs, on each device and in total.
        self._streams_each = config.engine_streams or default_streams(config.engine, cores())
        self._streams = self._streams_each * len(config.devices)
        # The time limit is that of writes and counts; requests give their reads less.
        self.store: Store = open_store(
            config.feature_store.get_secret_value(), read_only=not config.record_actions, create=False, timeout_s=1.0
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
        self.state = ProcessState()
        self.http_port = 0

    @property
    def serving(self) -> bool:
        """Whether the server answers Rank calls."""
        return self.state.serving

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
        try:
            config.check_transport()
        except ListenError as error:
            raise StartError(str(error)) from error
        certificates = load_certificates(config)
        opened.push_async_callback(self.store.close)
        await self.store.start()
        self.model_store = open_model_store(config.model_store)
        prover = self._shared_prover or Prover(config.engine)
        factory = self._engine_factory()
        await asyncio.to_thread(prover.start)  # it imports its libraries while we go on
        log = self._open_log()
        models = self._build(factory, prover, log, certificates)
        try:
            self._open_http(certificates)  # before the models are loaded, so that /healthz shows the start's progress
            await self.swap.start()
            self._watch_recording()
            _check_surfaces(config, models)
            opened.push_async_callback(self._endpoint.stop)
            await self._endpoint.start(config.host, config.grpc_port)
            self._watch(certificates)
        except ListenError as error:
            raise StartError(str(error)) from error
        self.state.started = self.state.serving = True
        await self._show_readiness()
        self._keep("store-watch", StoreWatch(self.store, self._outage).run)  # shows outages of the feature store
        _log.info(
            "serving",
            grpc=shown(config.host, self.listens_on),
            edge=self._endpoint.kind,
            http=http_shown(config.host, self.http_port),
            tls=certificates is not None,
            **({"client_certificates": config.tls.clients} if certificates else {}),
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
        if self.recording.sweeper is not None:
            self.metrics.register(SweepCollector(self.recording.sweeper))
            self._keep("recorded-sequences", self.recording.sweeper.run)
        if self.recording.rules.values_max:
            self._keep("store-size", self.recording.watch_size)

    def _engine_factory(self) -> EngineFactory:
        try:
            return engine_factory(self._config.engine, self._config.devices, self._config.engine_products)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _watch(self, certificates: Certificates | None) -> None:
        """Serve new certificates from now on when their files change."""
        if certificates is None:
            return
        watch = CertificateWatch(certificates, self.metrics.tls, self._supervisor, self._config.tls.reload_s)
        watch.start()
        self._opened.push_async_callback(watch.close)

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

    def _build(
        self, factory: EngineFactory, prover: Prover, log: AnswerLog | None, certificates: Certificates | None
    ) -> ServedModels:
        """Create the parts, each after the parts that it uses, and register their metrics."""
        config, opened, metrics, supervisor = self._config, self._opened, self.metrics, self._supervisor
        models, recent = ServedModels(config.labels[0]), RecentRequests()
        features = FeatureReader(
            self.store, config.near_cache_bytes, config.near_cache_stale_s, config.near_cache_outage_s
        )
        gate = self._open_gate()
        costs: dict[Hashable, CostModel] = {}
        admission, runner = self._new_runner(costs, prover.pace, gate)
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
                pipeline, models, config, metrics.requests, recent, shadow, self.calls, log, gate
            ).methods(),
            activity.SERVICE: ActivityEdge(metrics.actions, self.calls, self.recording, log, gate, config).methods(),
            impressions.SERVICE: ImpressionEdge(self.calls, log, config.candidates_max).methods(),
            model_service.SERVICE: ModelEdge(self.swap, self.status, config).methods(),
        }
        tls = None if certificates is None else TlsPort(certificates, metrics.tls)
        self._endpoint = new_endpoint(
            services, config, gate, metrics.connections, shared_port=self._channel is not None, tls=tls
        )
        return models

    def _open_gate(self) -> Gate:
        config = self._config
        gate = Gate(config.callers_file, read_token(config.admin_token_file), self.metrics.callers)
        if config.callers_file is not None:
            self._keep("callers", partial(gate.follow, config.callers_reload_s))
        return gate

    def _keep(self, name: str, work: Callable[[], Coroutine[object, object, None]]) -> None:
        """Run a loop until the server ends."""
        tasks = BackgroundTasks()
        tasks.start(self._supervisor.loop(name, work))
        self._opened.push_async_callback(tasks.cancel)

    def _open_http(self, certificates: Certificates | None) -> None:
        config, state = self._config, self.state
        probes = Probes(
            state, self.status.loading_lines, self.status.lines,
            without_features=config.ready_without_features, silence_s_max=config.http.loop_silence_s_max,
        )  # fmt: skip
        port, self.http_port = open_site(
            config, self.metrics.registry, probes, self._channel, self._supervisor, certificates
        )
        self._opened.callback(Heartbeat(state).close)
        port.start()
        self._opened.callback(port.close)

    async def _outage(self, reason: str) -> None:
        self.state.outage = reason
        if reason:
            _log.warning("feature_store_outage", reason=reason)
        else:
            _log.info("feature_store_outage_over")
        await self._show_readiness()

    async def _show_readiness(self) -> None:
        """Set the status that gRPC's health service reports."""
        ready = self.state.ready(without_features=self._config.ready_without_features)
        await self._endpoint.set_serving(serving=ready)

    def _new_runner(self, costs: dict[Hashable, CostModel], pace: Pace, gate: Gate) -> tuple[Admission, Runner]:
        """Create the scheduling policies (costs, order of requests, admission) and the engine streams they control."""
        config = self._config
        lanes = {name: Lane(surface.priority, surface.share) for name, surface in config.surfaces.items()}
        lanes[SHADOW_LANE] = Lane(priority=-100, share=0.01)
        overload = {name: Overload(s.overload, s.trim_candidates_min) for name, s in config.surfaces.items()}
        policy = EarliestDeadlineFirst(self._streams, costs.__getitem__, lanes, gate.claim_of)
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
        """Be a lame duck for a while, then refuse new calls, let those in flight finish, and close everything.

        Every caller gets its answer or UNAVAILABLE. Towards the end of `lame_duck_s` clients are told to connect again,
        so that those behind a load balancer reach another server without a failed call.

        Args:
            hurry: ends the waits early when it is set.
        """
        self.state.serving = False
        await self._show_readiness()
        _log.info("draining", lame_duck_s=self._config.lame_duck_s, drain_s=self._config.drain_s)
        if lame_s := self._config.lame_duck_s:
            retiring_s = min(lame_s, RETIREMENT_S)
            await _waited(lame_s - retiring_s, hurry)
            self._endpoint.retire()
            await _waited(retiring_s, hurry)
        await self.calls.drain(self._config.drain_s, hurry)
        if self.calls.in_flight:
            _log.warning("drain_ended_early", calls_cut_off=self.calls.in_flight)
        await self._endpoint.hang_up()
        await self._opened.aclose()
        _log.info("stopped")


async def _waited(seconds: float, hurry: asyncio.Event | None) -> None:
    """Wait, or until `hurry` is set."""
    with suppress(TimeoutError):
        await asyncio.wait_for((hurry or asyncio.Event()).wait(), seconds)


def _check_surfaces(config: ServerConfig, models: ServedModels) -> None:
    unknown = sorted(set(config.surfaces) - models.surfaces)
    if unknown:
        raise ConfigError(
            f"surfaces.{unknown[0]}: no served model ranks this surface; the served models rank "
            f"{', '.join(sorted(models.surfaces))}"
        )
