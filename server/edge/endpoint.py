"""What both kinds of gRPC port have in common: the services, health and reflection, and how a server uses a port."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from pinrank.v1 import activity_pb2, models_pb2, ranking_pb2  # noqa: F401 - reflection answers from the registered descriptors
from server.api.calls import guarded
from server.edge.tls import TlsPort

if TYPE_CHECKING:
    from server.api.calls import Methods

    #: Methods by service name.
    Services = Mapping[str, Methods]


class Endpoint(ABC):
    """A gRPC server on one port or Unix socket. Belongs to one event loop.

    Attributes:
        kind: the value of `grpc_edge` that stands for this kind of server.
        listens_on: the port, or the path of a Unix socket.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        services: Services,
        message_bytes_max: int,
        connection_age_s_max: float,
        *,
        shared_port: bool,
        tls: TlsPort | None = None,
    ) -> None:
        """Create the endpoint without opening its port.

        Args:
            services: the services; health and reflection are added to them.
            message_bytes_max: maximum size of a request; larger ones end with RESOURCE_EXHAUSTED.
            connection_age_s_max: age from which connections are closed, in seconds; 0 for never.
            shared_port: whether other processes of this server listen on the same port.
            tls: what clients that connect are served with; without it, the port speaks plain text.
        """
        self._message_bytes_max = message_bytes_max
        self._connection_age_s_max = connection_age_s_max
        self._shared_port = shared_port
        self._tls = tls
        self._names = tuple(services)
        self._health = health.aio.HealthServicer()
        registry = _Registry()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, registry)
        described = reflection.aio.ReflectionServicer((*services, health.SERVICE_NAME, reflection.SERVICE_NAME))
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(described, registry)
        #: The guarded methods of all services.
        self._services = {
            service: {name: guarded(handler, f"/{service}/{name}") for name, handler in methods.items()}
            for service, methods in {**services, **registry.services}.items()
        }
        self.listens_on: int | str = 0

    @abstractmethod
    async def start(self, host: str, port: int) -> None:
        """Open the port (0 takes a free one) and serve. Raises ListenError."""

    async def set_serving(self, *, serving: bool) -> None:
        """Set the status that the gRPC health service reports for the server and for each service."""
        status = health_pb2.HealthCheckResponse
        for service in ("", *self._names):
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    @abstractmethod
    async def renew_tls(self) -> None:
        """Serve the present certificate to clients that connect from now on. Connections go on with their own."""

    @abstractmethod
    async def hang_up(self) -> None:
        """End unanswered calls with UNAVAILABLE, so that callers try another server, and stop."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop the server at once, if it was started."""


class _Registry:
    """Takes the services that grpcio's packages register with a server."""

    def __init__(self) -> None:
        self.services: dict[str, dict[str, Any]] = {}

    def add_registered_method_handlers(self, service: str, methods: dict[str, Any]) -> None:
        self.services[service] = methods

    def add_generic_rpc_handlers(self, _: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """Ignore them: they are the same methods."""
