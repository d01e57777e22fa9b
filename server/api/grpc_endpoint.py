"""The gRPC port: serves our services, the health service and reflection, and closes without losing calls."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pinrank.v1 import activity_pb2, models_pb2, ranking_pb2  # noqa: F401 - reflection answers from the registered descriptors
from server.api.calls import CallBoundary
from server.api.draining import hang_up
from server.runtime.listening import open_grpc_port

_log = structlog.get_logger(__name__)

#: Time for clients to close their side of the connections that we shut down.
_HANG_UP_S = 0.5


class GrpcEndpoint:
    """A gRPC server on one port or Unix socket. Belongs to one event loop.

    Attributes:
        listens_on: the port, or the path of a Unix socket.
    """

    def __init__(
        self, services: Mapping[str, grpc.GenericRpcHandler], message_bytes_max: int, *, shared_port: bool
    ) -> None:
        """Create the endpoint without opening its port.

        Args:
            services: handlers by service name.
            message_bytes_max: maximum size of a request; gRPC refuses larger ones.
            shared_port: whether other processes of this server listen on the same port.
        """
        self._services = services
        self._options = (
            ("grpc.max_receive_message_length", message_bytes_max),
            # If port sharing were always on, an unrelated second server could silently take half of the calls.
            ("grpc.so_reuseport", int(shared_port)),
        )
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.listens_on: int | str = 0

    async def start(self, host: str, port: int) -> None:
        """Open the port (0 takes a free one) and serve. Raises ListenError."""
        self._server = server = grpc.aio.server(options=self._options, interceptors=(CallBoundary(),))
        server.add_generic_rpc_handlers(tuple(self._services.values()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self.listens_on = open_grpc_port(server, host, port)
        await server.start()

    async def set_serving(self, *, serving: bool) -> None:
        """Set the status that the gRPC health service reports for the server and for each service."""
        status = health_pb2.HealthCheckResponse
        for service in ("", *self._services):
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def hang_up(self) -> None:
        """End unanswered calls with UNAVAILABLE, so that callers try another server, and stop."""
        try:
            hang_up(self.listens_on)
        except OSError as error:  # no /dev/fd; fall back to gRPC's own shutdown
            _log.warning("not_hung_up", reason=f"{error}; callers may see CANCELLED")
        await self.stop(_HANG_UP_S)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stop the server if it was started; calls in flight have `grace_s` to end."""
        if self._server is not None:
            await self._server.stop(grace_s)
