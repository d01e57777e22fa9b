"""Loads and unloads model versions, and records the outcome in the version records and metrics."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from model_store.bundle.files import BundleError
from model_store.bundle.manifest import Manifest
from model_store.model.utility import UtilityError
from model_store.registry.objects import ModelStoreError
from model_store.registry.signing import SigningError
from server.proving.admit_version import VersionAdmitter
from server.proving.prover import ProvingError
from server.proving.refusals import Refusals
from server.proving.replay import NotReadyError
from server.rollout.installed_models import InstalledModels
from server.rollout.lifecycle import Phase
from server.rollout.versions import Versions
from server.runtime.supervisor import Supervisor
from server.runtime.tasks import BackgroundTasks
from server.telemetry.metrics import Fault, ModelMetrics

_log = structlog.get_logger(__name__)

#: Name of the background tasks that load and free versions.
TASK = "model-intake"


class VersionLoading:
    """Loads one version at a time into memory. Belongs to one event loop."""

    def __init__(
        self,
        admitter: VersionAdmitter,
        installed: InstalledModels,
        versions: Versions,
        refusals: Refusals,
        retry_s: float,
        metrics: ModelMetrics,
        supervisor: Supervisor,
        tasks: BackgroundTasks,
    ) -> None:
        """Store the parts; nothing happens yet.

        Args:
            admitter: proves versions and warms them up.
            installed: the models in memory.
            versions: the record of every known version.
            refusals: which versions were refused, kept across restarts.
            retry_s: seconds until a version that failed through no fault of its own is retried.
            metrics: counts failures and warm-ups that were cut off.
            supervisor: watches the background tasks that free memory.
            tasks: holds these tasks.
        """
        self._admitter = admitter
        self._installed = installed
        self._versions = versions
        self._refusals = refusals
        self._retry_s = retry_s
        self._metrics = metrics
        self._supervisor = supervisor
        self._tasks = tasks

    async def load(self, version: int, replaced: Mapping[str, Manifest], *, starting: bool = False) -> Exception | None:
        """Load a version that is in the verifying phase; return None once it is ready, or the error that stopped it.

        Args:
            version: its number.
            replaced: for each label that names the version, the manifest that answers there now.
            starting: whether the server is starting, with no version to compare this one with.
        """
        record = self._versions[version]
        try:
            served = await self._admitter.admit(
                version, replaced, record.report, lambda: self._enter_warming(version), starting=starting
            )
            self._installed.install(served)
        except (BundleError, SigningError, UtilityError) as error:
            self._fail(version, "bundle", str(error), None)
            if not starting:  # a restarted server has no recent requests to find this again
                self._refusals.note(record.report.digest, str(error))
            return error
        except (ModelStoreError, NotReadyError, ProvingError) as error:
            self.fail_and_retry(version, str(error))
            return error
        except Exception as error:  # noqa: BLE001 - no error of a new bundle may disturb the versions that serve
            _log.error("model_load_failed", exc_info=error)
            # The error's text may quote a row of a recent request, so the reason gives its type alone.
            self._fail(
                version,
                "unexpected",
                f"{type(error).__name__}; see model_load_failed in the log for the traceback",
                None,
            )
            return error
        record.served = served
        self._metrics.prover_confined.set(not record.report.unconfined)
        if record.report.warm_up is not None and record.report.warm_up.cut_off:
            self._metrics.warm_ups_cut_off.inc()
        self._versions.become(version, Phase.READY)
        self._refusals.forget(record.report.digest)
        return None

    def fail_and_retry(self, version: int, reason: str) -> None:
        """Fail a version that is not itself at fault, and retry it later."""
        self._fail(version, "surroundings", reason, self._retry_s)

    def unload(self, version: int) -> None:
        """Drop a version, and free its memory off the event loop."""
        served = self._versions.remove(version)
        if served is not None:
            self._installed.dismiss(served)
            self._tasks.start(self._supervisor.task(TASK, self._admitter.free(served.model)))

    async def close(self) -> None:
        """Cancel the load in progress."""
        await self._admitter.close()

    def _enter_warming(self, version: int) -> None:
        self._versions.become(version, Phase.WARMING)

    def _fail(self, version: int, fault: Fault, reason: str, retry_s: float | None) -> None:
        self._installed.drop_unread_caches()
        self._tasks.start(self._supervisor.task(TASK, self._admitter.give_back()))
        self._versions.fail(version, fault, reason, retry_s)
        self._metrics.failed[fault].inc()
