"""The gRPC port: our services, health and reflection, opened and closed so that callers know what they can expect."""

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

#: For clients to close their side of what was hung up.
_HANG_UP_S = 0.5


class GrpcEndpoint:
    """Serves from `start` to `stop`. Belongs to one event loop.

    Attributes:
        listens_on: the port, or the path of a Unix socket.
    """

    def __init__(
        self, services: Mapping[str, grpc.GenericRpcHandler], message_bytes_max: int, *, shared_port: bool
    ) -> None:
        """Remember.

        Args:
            services: by name.
            message_bytes_max: a larger request is refused.
            shared_port: whether other servers of ours listen on the same port.
        """
        self._services = services
        self._options = (
            ("grpc.max_receive_message_length", message_bytes_max),
            # With port sharing on, a second server on the port would silently take half of the calls.
            ("grpc.so_reuseport", int(shared_port)),
        )
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.listens_on: int | str = 0

    async def start(self, host: str, port: int) -> None:
        """Open the port; 0 takes a free one. Raises ListenError."""
        self._server = server = grpc.aio.server(options=self._options, interceptors=(CallBoundary(),))
        server.add_generic_rpc_handlers(tuple(self._services.values()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self.listens_on = open_grpc_port(server, host, port)
        await server.start()

    async def set_serving(self, *, serving: bool) -> None:
        """Say by gRPC's health protocol whether calls are answered, of the server and of each service."""
        status = health_pb2.HealthCheckResponse
        for service in ("", *self._services):
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def hang_up(self) -> None:
        """End what has no answer yet so that its caller tries elsewhere, and stop."""
        try:
            hang_up(self.listens_on)
        except OSError as error:  # without /dev/fd; gRPC's own way remains
            _log.warning("not_hung_up", reason=f"{error}; callers may see CANCELLED")
        await self.stop(_HANG_UP_S)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stop, if it was started; calls in flight have so long to end."""
        if self._server is not None:
            await self._server.stop(grace_s)
