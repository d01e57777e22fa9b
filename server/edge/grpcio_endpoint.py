"""The gRPC port by grpcio: where our own server is not built, or `grpc_edge` says so."""

from __future__ import annotations

from functools import partial
from typing import Any

import grpc
import grpc.aio
import structlog

from server.edge.endpoint import Endpoint
from server.edge.hang_up import hang_up
from server.edge.tls import HANDSHAKE_S_MAX
from server.runtime.listening import open_grpc_port
from server.runtime.tls import Certificates, Loaded

_log = structlog.get_logger(__name__)

#: Time for clients to close their side of the connections that we shut down.
_HANG_UP_S = 0.5


class GrpcioEndpoint(Endpoint):
    kind = "grpcio"

    _server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        options = [
            ("grpc.max_receive_message_length", self._limits.message_bytes_max),
            ("grpc.max_metadata_size", self._limits.header_bytes_max),
            ("grpc.max_concurrent_streams", self._limits.connection_calls_max),
            # If port sharing were always on, an unrelated second server could silently take half of the calls.
            ("grpc.so_reuseport", int(self._shared_port)),
        ]
        for name, limit_s in (
            ("grpc.max_connection_age_ms", self._limits.connection_age_s_max),
            ("grpc.max_connection_idle_ms", self._limits.connection_idle_s_max),
        ):
            if limit_s:
                options.append((name, round(limit_s * 1e3)))
        tls = self._tls
        if tls is not None:
            options.append(("grpc.server_handshake_timeout_ms", round(HANDSHAKE_S_MAX * 1e3)))
        self._server = server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers(
            tuple(grpc.method_handlers_generic_handler(name, methods) for name, methods in self._services.items())
        )
        credentials = None if tls is None else partial(_credentials, tls.certificates)
        self.listens_on = open_grpc_port(server, host, port, credentials)
        await server.start()

    def retire(self) -> None:
        """Do nothing: grpcio can tell clients only when it stops."""

    async def hang_up(self) -> None:
        try:
            hang_up(self.listens_on)
        except OSError as error:  # no /dev/fd; fall back to gRPC's own shutdown
            _log.warning("not_hung_up", reason=f"{error}; callers may see CANCELLED")
        if self._server is not None:
            await self._server.stop(_HANG_UP_S)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)


def _credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Return credentials that follow the certificate; gRPC asks for it on a thread of its own, in every handshake."""
    known = certificates.current

    def changed() -> Any:  # None for no change, which the stubs do not know
        nonlocal known
        if certificates.current is known:
            return None
        known = certificates.current
        return _configuration(known)

    require = certificates.files.clients == "require"
    return grpc.dynamic_ssl_server_credentials(_configuration(known), changed, require)


def _configuration(loaded: Loaded) -> grpc.ServerCertificateConfiguration:
    found = loaded.contents
    return grpc.ssl_server_certificate_configuration([(found.key, found.certificate)], found.client_ca)
