"""What both kinds of gRPC port have in common: the services and health, and how a server uses a port."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from server.api.calls import guarded
from server.edge.http2 import ALL_KEPT_BYTES_MAX, HEADER_BYTES_MAX, STREAMS_MAX
from server.edge.reflection import registered
from server.edge.tls import TlsPort

if TYPE_CHECKING:
    from collections.abc import Mapping

    from server.access.gate import Door
    from server.api.calls import Services
    from server.config import ServerConfig
    from server.telemetry.metrics import ConnectionMetrics


@dataclass(frozen=True, slots=True)
class PortLimits:
    """What a port takes.

    Attributes:
        message_bytes_max: maximum size of a request; larger ones end with RESOURCE_EXHAUSTED.
        header_bytes_max: maximum size of a call's metadata.
        connections_max: maximum number of connections; 0 for as many as there are descriptors for.
        connection_calls_max: maximum number of calls at once on a connection; clients let further ones wait.
        connection_age_s_max: age from which connections are closed, in seconds; 0 for never.
        bytes_in_flight_max: maximum size of what all connections keep of unanswered calls.
        connection_idle_s_max: time without a call after which connections are closed, in seconds; 0 for never.
    """

    message_bytes_max: int
    header_bytes_max: int = HEADER_BYTES_MAX
    connections_max: int = 0
    connection_calls_max: int = STREAMS_MAX
    bytes_in_flight_max: int = ALL_KEPT_BYTES_MAX
    connection_age_s_max: float = 0
    connection_idle_s_max: float = 0

    @classmethod
    def of(cls, config: ServerConfig) -> PortLimits:
        return cls(*(getattr(config, field.name) for field in fields(cls)))


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
        limits: PortLimits,
        metrics: ConnectionMetrics,
        *,
        shared_port: bool,
        tls: TlsPort | None = None,
        doors: Mapping[str, Door] | None = None,
    ) -> None:
        """Create the endpoint without opening its port.

        Args:
            services: the services; health is added to them.
            limits: the port's limits.
            metrics: tells of the connections, if this kind of port knows them.
            shared_port: whether other processes of this server listen on the same port.
            tls: what clients that connect are served with; without it, the port speaks plain text.
            doors: by service, what lets its callers in; a service without one lets everybody in.
        """
        self._limits = limits
        self._metrics = metrics
        self._shared_port = shared_port
        self._tls = tls
        self._names = tuple(services)
        self._health = health.aio.HealthServicer()
        (health_service, checks), *_ = registered(health_pb2_grpc.add_HealthServicer_to_server, self._health).items()
        # The package has no List for asyncio: each call of its default would be logged as a failure of this server.
        checks = {name: handler for name, handler in checks.items() if name != "List"}
        #: The guarded methods of all services.
        self._services = {
            service: {
                name: guarded(handler, f"/{service}/{name}", (doors or {}).get(service))
                for name, handler in methods.items()
            }
            for service, methods in {**services, health_service: checks}.items()
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
    def retire(self) -> None:
        """Tell clients to connect again, if this kind of port can, and go on answering."""

    @abstractmethod
    async def hang_up(self) -> None:
        """End unanswered calls with UNAVAILABLE, so that callers try another server, and stop."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop the server at once, if it was started."""
