"""Prepares a new model version while others serve: tests it in its own process, compiles it and warms it up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from kernels.engine import EngineFactory, FeatureBatch, UnavailableError
from model_store.bundle.files import UTILITY, Bundle, BundleError
from model_store.bundle.manifest import Manifest
from model_store.bundle.statistics import read_statistics
from model_store.exploration.table import read_exploration
from model_store.model.assembly import Assembler
from model_store.model.compatibility import breaks_callers
from model_store.model.loaded import LoadedModel, load_model
from model_store.model.utility import UtilityTable, load_utility
from model_store.network.check import RunLimits
from model_store.registry.objects import ModelStoreError
from model_store.registry.signing import TrustedKeys
from model_store.registry.store import ModelStore
from server.config import ServerConfig
from server.proving.loader import Loader
from server.proving.prover import HelperEndedError, Proof, ProofLimits, Prover
from server.proving.recent_requests import RecentRequests
from server.proving.refusals import Refusals
from server.proving.replay import NotReadyError, Sample, check_features, check_scores
from server.proving.warm_up import WarmUp
from server.request.features import FeatureReader
from server.request.routing import ServedModel
from server.runtime.memory import available_bytes, give_back_freed
from server.runtime.supervisor import Supervisor

_log = structlog.get_logger(__name__)

#: How many recent requests a version is tested on.
_SAMPLES = 16
#: Pause between reads of their features, because the event loop also answers requests.
_BETWEEN_SAMPLES_S = 0.03
#: Time limit for reading the features of one recent request.
_READ_S = 1.0


@dataclass(slots=True)
class Report:
    """The results of a version's checks, for operators.

    Attributes:
        unconfined: why its proof was not wholly confined; empty if it was, None before the proof.
    """

    digest: str = ""
    memory_bytes: int = 0
    unconfined: str | None = None
    checks: list[str] = field(default_factory=list)
    warm_up: WarmUp | None = None


class VersionAdmitter:
    """Prepares versions to serve, one at a time. Belongs to one event loop.

    Attributes:
        closed: whether `close` was called, which cancels the version in progress.
    """

    def __init__(
        self,
        store: ModelStore,
        config: ServerConfig,
        factory: EngineFactory,
        streams: int,
        recent: RecentRequests,
        features: FeatureReader,
        prover: Prover,
        supervisor: Supervisor,
        refusals: Refusals,
        *,
        own_prover: bool,
    ) -> None:
        """Store the parts, and read the utility table and trusted keys that the settings name.

        Args:
            store: the model store.
            config: the server's settings.
            factory: creates engines.
            streams: engine runs in flight at once, on each device.
            recent: recent requests to test versions on.
            features: reads the features of these requests.
            prover: proves versions; its pace also limits the work done here.
            supervisor: watches the thread that loads.
            refusals: which versions were refused before a restart.
            own_prover: whether `close` also closes the prover.
        """
        self._store = store
        self._config = config
        self._factory = factory
        self._streams = streams
        self._recent = recent
        self._features = features
        self._prover = prover
        self._refusals = refusals
        self._supervisor = supervisor
        self.closed = False
        self._told_unconfined = False
        self._own_prover = own_prover
        self._utility = config.utility.read_bytes() if config.utility else None
        self._trust = TrustedKeys.read(config.swap.trusted_keys) if config.swap.trusted_keys else None
        self._loader = Loader(prover.pace, config.swap.cpu_share, recent, supervisor)

    async def close(self) -> None:
        """Cancel the version in progress."""
        self.closed = True
        if self._own_prover:
            await asyncio.to_thread(self._prover.close)
        await self._loader.close()

    async def admit(
        self,
        version: int,
        replaced: Mapping[str, Manifest],
        report: Report,
        warming: Callable[[], None],
        *,
        starting: bool = False,
    ) -> ServedModel:
        """Prove a version, test it on recent requests, compile it in this process and warm it up.

        Args:
            version: its number.
            replaced: for each label that names the version, the manifest that answers there now.
            report: receives the results of the checks.
            warming: called when the version is proven and its warm-up begins.
            starting: whether the server is starting, with no other version to compare with or to leave memory for.

        Raises:
            BundleError, SigningError, UtilityError: the bundle is at fault.
            ModelStoreError, NotReadyError, ProvingError: something else failed; a retry may succeed.
        """
        config, swap = self._config, self._config.swap
        digest = await self._released(version, report)
        manifest = await self._loader.ask(swap.store_timeout_s, self._store.manifest, config.model, version)
        self._check_abi(manifest, replaced)
        if self._utility is not None:
            load_utility(self._utility, manifest)
        report.checks.append("ABI: compatible with existing callers")
        self._features.add_caches(await self._loader.do(self._features.new_caches, manifest.needs))
        samples = await self._samples(manifest)
        if not samples and not starting and (reason := self._refusals.reason(digest)):
            raise NotReadyError(
                f"{reason} (refused before a restart; retried once there are recent requests to test it on)"
            )
        if samples:
            report.checks.append(check_features(manifest, samples, swap.pins_missing_max))
        else:
            report.checks.append("features and scores: not checked, because there are no recent requests")
        bundle = await self._loader.ask(swap.proof_timeout_s, self._read, version)
        if bundle.digest != digest or bundle.manifest != manifest:
            raise ModelStoreError(
                f"{manifest.ref} changed in the store while it was loaded: the digest was {digest}, and is now "
                f"{bundle.digest}; find out who wrote to {self._store.where}"
            )
        limits = ProofLimits(
            engine=config.engine,
            utility=self._utility.decode() if self._utility else None,
            memory_bytes_max=swap.proof_memory_bytes_max,
            timeout_s=swap.proof_timeout_s,
            trusted=self._trust is not None,
            rows_max=config.candidates_max,
            requests_max=config.requests_in_flight_max,
            run_bytes_max=swap.run_bytes_max,
            run_s_max=swap.run_s_max,
            share=self._loader.share,
            device=config.devices[0],  # a version that is correct on one device is correct on all
        )
        sample = FeatureBatch.concat([sample.batch for sample in samples]) if samples else None
        proof = await self._proven(bundle, limits, sample)
        report.checks.append("digests, network, utility table, golden scores: correct (the network in another process)")
        self._note_confinement(proof, report)
        report.memory_bytes = proof.memory_bytes
        utility = await self._loader.do(load_utility, self._utility or bundle.files[UTILITY], manifest)
        if samples:
            report.checks += await self._loader.do(
                check_scores, manifest, utility, samples, proof.logits, swap.rank_correlation_min
            )
        if not starting:
            report.checks.append(self._check_memory(manifest, proof.memory_bytes * self._streams * len(config.devices)))
        report.warm_up = WarmUp(manifest.ref, swap.warm_up_s_max)
        warming()
        return await self._loader.do(self._compiled, bundle, utility, sample, proof.plan, report)

    async def _proven(self, bundle: Bundle, limits: ProofLimits, sample: FeatureBatch | None) -> Proof:
        try:
            return await self._loader.do(self._prover.prove, bundle, limits, sample)
        except HelperEndedError as error:
            if not self.closed:
                self._supervisor.note("prover", error)
            raise

    def _note_confinement(self, proof: Proof, report: Report) -> None:
        report.unconfined = proof.unconfined
        if proof.unconfined:
            report.checks.append(f"the proof's process was not confined: {proof.unconfined}")
            if not self._told_unconfined:
                self._told_unconfined = True
                _log.warning("prover_not_confined", why=proof.unconfined)

    async def free(self, model: LoadedModel) -> None:
        """Free a version that no request uses any more."""
        await self._loader.do(_free, model)

    async def give_back(self) -> None:
        """Return the memory of a version that failed to the operating system."""
        await self._loader.do(give_back_freed)

    async def _released(self, version: int, report: Report) -> str:
        """Check a version's signature, if keys are configured, and return its digest."""
        limit_s = self._config.swap.store_timeout_s
        release = await self._loader.ask(limit_s, self._store.release, self._config.model, version)
        report.digest = release.digest
        if self._trust:
            self._trust.check(f"{self._config.model}@{version}", release.digest, release.signature)
            report.checks.append("signature: made by a trusted publisher")
        return release.digest

    def _check_abi(self, manifest: Manifest, replaced: Mapping[str, Manifest]) -> None:
        """Refuse a version that exceeds this server's limits, or changes what callers of a label rely on."""
        config = self._config
        needed = manifest.request_bytes + config.candidates_max * manifest.row_bytes
        if needed > config.bytes_in_flight_max:
            raise BundleError(
                f"{manifest.ref}: a request of {config.candidates_max} candidates takes {needed:,} bytes, but at most "
                f"{config.bytes_in_flight_max:,} are allowed; lower sequence_length or candidates_max, or raise "
                "bytes_in_flight_max"
            )
        accepted = config.swap.accept_changes
        for label, before in replaced.items():
            for finding in breaks_callers(before, manifest):
                if finding.field not in accepted and "*" not in accepted:
                    raise BundleError(
                        f"{manifest.ref} breaks callers of {label} ({before.ref}): {finding}; "
                        f"to accept the change, set swap.accept_changes = [{finding.field!r}]"
                    )

    async def _samples(self, manifest: Manifest) -> list[Sample]:
        """Read the features that this version needs for recent requests, one request at a time."""
        surfaces = {surface.name for surface in manifest.surfaces}
        assembler, needs, space = Assembler(manifest), manifest.needs, manifest.query_space
        found = []
        for request in self._recent.latest(_SAMPLES):
            if request.surface not in surfaces:
                continue
            fetched = await self._features.fetch(needs, request.user_id, request.pin_ids, request.query_pin_id, _READ_S)
            vector = request.query_vector
            if vector is not None and (space is None or len(vector) != space.dim):
                vector = None
            found.append(Sample(request, fetched, assembler.assemble(fetched, request.surface, vector)))
            await asyncio.sleep(_BETWEEN_SAMPLES_S)
        return found

    def _check_memory(self, manifest: Manifest, needed: int) -> str:
        available, kept = available_bytes(), self._config.swap.memory_bytes_kept
        if available is None:
            return f"memory: about {needed / 1e6:.0f} MB; the system does not report how much is available"
        if needed + kept > available:
            raise NotReadyError(
                f"{manifest.ref} needs about {needed:,} bytes and {kept:,} must stay free (swap.memory_bytes_kept), "
                f"but only {available:,} are available"
            )
        return f"memory: about {needed / 1e6:.0f} MB of {available / 1e6:.0f} MB available"

    def _read(self, version: int) -> Bundle:
        return self._store.read(self._config.model, version, self._config.swap.bundle_bytes_max)

    def _compiled(
        self, bundle: Bundle, utility: UtilityTable, sample: FeatureBatch | None, plan: bytes | None, report: Report
    ) -> ServedModel:
        """Compile the network and warm it up on recent requests, or else on golden ones, with pauses between runs."""
        assert report.warm_up is not None, "the caller created it"  # noqa: S101
        warm_up = report.warm_up

        def progress(runs: int, of: int) -> bool:
            if self.closed:
                raise NotReadyError(f"{bundle.manifest.ref}: the server is stopping")
            self._loader.pause()
            return warm_up.progress(runs, of)

        try:
            model = load_model(
                bundle,
                self._factory,
                self._streams,
                plan=plan,
                sample=sample,
                pause=self._loader.pause,
                progress=progress,
                limits=RunLimits(self._config.candidates_max, self._config.swap.run_bytes_max),
            )
        except UnavailableError as error:
            raise NotReadyError(str(error)) from error
        try:
            assert model.warmed_up is not None, "load_model warms up by default"  # noqa: S101
            report.checks += [*_chosen_products(model), warm_up.ended(model.warmed_up)]
            exploration = read_exploration(bundle, utility)
            if exploration is not None:
                report.checks.append(f"exploration: correct; {', '.join(sorted(exploration.surfaces))} may explore")
            return ServedModel(model, utility, read_statistics(bundle), exploration)
        except BaseException:
            model.engine.close()
            raise


def _chosen_products(model: LoadedModel) -> list[str]:
    """Log the choice of the encoder's products, if there was one, and return it for operators."""
    products = model.products
    if not products.why:
        return []
    if products.refused:
        _log.warning("products_refused", model=model.manifest.ref, asked=products.asked, why=products.why)
    else:
        _log.info("products_chosen", model=model.manifest.ref, numbers=products.numbers, why=products.why)
    return [str(products)]


def _free(model: LoadedModel) -> None:
    model.engine.close()
    give_back_freed()
