"""Chooses the gRPC port's server by the setting `grpc_edge`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from grpc_reflection.v1alpha import reflection

from kernels.native.library import NativeLibraryError
from server.access.callers import Permission
from server.api import activity, impressions, models, ranking
from server.config import ConfigError, ServerConfig
from server.config_sections import TlsConfig
from server.edge.endpoint import Endpoint, PortLimits
from server.edge.grpcio_endpoint import GrpcioEndpoint
from server.edge.native_endpoint import NativeEndpoint
from server.edge.reflection import reflection_of
from server.edge.tls import TlsPort

if TYPE_CHECKING:
    from server.access.gate import Gate
    from server.api.calls import Services
    from server.telemetry.metrics import ConnectionMetrics

_log = structlog.get_logger(__name__)

#: What callers of a service must be permitted to do. Health answers everybody.
_PERMISSIONS = {
    ranking.SERVICE: Permission.RANK,
    activity.SERVICE: Permission.RECORD,
    impressions.SERVICE: Permission.SEEN,
    models.SERVICE: Permission.MODELS,
    reflection.SERVICE_NAME: Permission.REFLECTION,
}


def new_endpoint(
    services: Services,
    config: ServerConfig,
    gate: Gate,
    metrics: ConnectionMetrics,
    *,
    shared_port: bool,
    tls: TlsPort | None = None,
) -> Endpoint:
    """Create the gRPC port without opening it.

    Args:
        services: the services; health and reflection are added to them.
        config: the server's settings.
        metrics: tells of the connections.
        gate: decides who may call which service.
        shared_port: whether other processes of this server listen on the same port.
        tls: what clients that connect are served with; without it, the port speaks plain text.

    Raises:
        ConfigError: `grpc_edge` is `native`, and that server is not built; or grpcio lacks what `[tls]` asks for.
    """
    every = {**services, **(reflection_of(services) if config.reflection else {})}
    limits = PortLimits.of(config)
    doors = {service: gate.door(permission) for service, permission in _PERMISSIONS.items()}
    if config.grpc_edge != "grpcio":
        try:
            return NativeEndpoint(
                every, limits, metrics, shared_port=shared_port, tls=tls, doors=doors, is_proxy=gate.is_proxy
            )
        except NativeLibraryError as error:
            if config.grpc_edge == "native":
                raise ConfigError(f"grpc_edge: {error}; or set grpc_edge to auto or grpcio") from error
            _log.warning("grpc_edge_not_native", reason=str(error), serving_with="grpcio")
    _check_grpcio(config.tls)
    return GrpcioEndpoint(every, limits, metrics, shared_port=shared_port, tls=tls, doors=doors)


def _check_grpcio(tls: TlsConfig) -> None:
    """Make sure that grpcio can do what the settings say: its Python interface has no more than this."""
    if tls.clients == "ask":
        raise ConfigError(
            "tls.client_certificates: the edge grpcio cannot ask for certificates without requiring them; set it to "
            "require or off, or grpc_edge to native"
        )
    if tls.minimum != "1.2":
        raise ConfigError("tls.minimum: the edge grpcio takes TLS 1.2, too; set it to 1.2, or grpc_edge to native")
