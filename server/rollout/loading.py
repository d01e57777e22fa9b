"""Taking versions in and letting them go: what came of it goes into the record of versions, and into the metrics."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from model_store.bundle.files import BundleError
from model_store.bundle.manifest import Manifest
from model_store.model.utility import UtilityError
from model_store.registry.objects import ModelStoreError
from model_store.registry.signing import SigningError
from server.proving.admit_version import Intake
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

#: Background work of this name loads and frees versions.
TASK = "model-intake"


class VersionLoading:
    """Brings one version at a time into memory. Belongs to one event loop."""

    def __init__(
        self,
        intake: Intake,
        installed: InstalledModels,
        versions: Versions,
        refusals: Refusals,
        retry_s: float,
        metrics: ModelMetrics,
        supervisor: Supervisor,
        tasks: BackgroundTasks,
    ) -> None:
        """Remember.

        Args:
            intake: makes versions ready.
            installed: the models in memory.
            versions: the record of what became of each.
            refusals: of versions, kept over restarts.
            retry_s: after which a version that is not at fault itself is tried again.
            metrics: of versions.
            supervisor: of what is freed in the background.
            tasks: where that runs.
        """
        self._intake = intake
        self._installed = installed
        self._versions = versions
        self._refusals = refusals
        self._retry_s = retry_s
        self._metrics = metrics
        self._supervisor = supervisor
        self._tasks = tasks

    async def load(self, version: int, replaced: Mapping[str, Manifest], *, starting: bool = False) -> Exception | None:
        """Make a version ready that is being verified, or let it fail and return why.

        Args:
            version: which.
            replaced: by label that it is for, the manifest that answers there now.
            starting: nothing is served yet.
        """
        record = self._versions[version]
        try:
            served = await self._intake.take_in(
                version, replaced, record.report, lambda: self._warming(version), starting=starting
            )
            self._installed.install(served)
        except (BundleError, SigningError, UtilityError) as error:
            self._fail(version, "bundle", str(error), None)
            if not starting:  # the next start proves anew, but has nothing to compare with
                self._refusals.note(record.report.digest, str(error))
            return error
        except (ModelStoreError, NotReadyError, ProvingError) as error:
            self.put_off(version, str(error))
            return error
        except Exception as error:  # noqa: BLE001 - the boundary: whatever a bundle can raise leaves what is serving alone
            _log.error("model_load_failed", exc_info=error)
            # Its text may quote a row of the recent requests that the version was tried on.
            self._fail(version, "unexpected", f"{type(error).__name__}; the log's model_load_failed says where", None)
            return error
        record.served = served
        if record.report.warm_up is not None and record.report.warm_up.cut_off:
            self._metrics.warm_ups_cut_off.inc()
        self._versions.become(version, Phase.READY)
        self._refusals.forget(record.report.digest)
        return None

    def put_off(self, version: int, reason: str) -> None:
        """Let a version fail for what is not its own fault: it is tried again."""
        self._fail(version, "surroundings", reason, self._retry_s)

    def unload(self, version: int) -> None:
        """Forget a version, and free what it took, off the loop."""
        served = self._versions.remove(version)
        if served is not None:
            self._installed.dismiss(served)
            self._tasks.start(self._supervisor.task(TASK, self._intake.free(served.model)))

    async def close(self) -> None:
        """Give up what is being loaded."""
        await self._intake.close()

    def _warming(self, version: int) -> None:
        self._versions.become(version, Phase.WARMING)

    def _fail(self, version: int, fault: Fault, reason: str, retry_s: float | None) -> None:
        self._installed.drop_unread_caches()
        self._tasks.start(self._supervisor.task(TASK, self._intake.give_back()))
        self._versions.fail(version, fault, reason, retry_s)
        self._metrics.failed[fault].inc()
