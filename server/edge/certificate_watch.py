"""Follows the certificate files: what changes on disk is served to new connections, without a restart."""

from __future__ import annotations

import asyncio

import structlog

from server.runtime.supervisor import Supervisor
from server.runtime.tasks import BackgroundTasks
from server.runtime.tls import Certificates, TlsError
from server.telemetry.metrics import TlsMetrics

_log = structlog.get_logger(__name__)


class CertificateWatch:
    """Looks at the files at an interval. Belongs to one event loop."""

    def __init__(
        self,
        certificates: Certificates,
        metrics: TlsMetrics,
        supervisor: Supervisor,
        interval_s: float,
    ) -> None:
        self._certificates = certificates
        self._metrics = metrics
        self._supervisor = supervisor
        self._interval_s = interval_s
        self._tasks = BackgroundTasks()
        self._served = certificates.current
        metrics.serve(self._served.serial, self._served.expires_at_s)

    def start(self) -> None:
        self._tasks.start(self._supervisor.loop("tls-certificates", self._watch))

    async def close(self) -> None:
        await self._tasks.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self.look()

    async def look(self) -> None:
        """Serve what the files hold now. If it cannot be served, say so once, and go on with what was served."""
        try:
            # Files may be on a slow network, and a bundle of authorities takes time to read.
            await asyncio.to_thread(self._certificates.renew)
        except TlsError as error:
            self._metrics.refused.inc()
            _log.error("tls_certificate_refused", reason=str(error), serving=self._certificates.current.serial)
        current = self._certificates.current
        if current is not self._served:  # each handshake asks for the certificate
            self._served = current
            self._metrics.renewed.inc()
            self._metrics.serve(current.serial, current.expires_at_s)
            _log.info("tls_certificate_renewed", serial=current.serial)
