"""Chooses the gRPC port's server by the setting `grpc_edge`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from kernels.native.library import NativeLibraryError
from server.config import ConfigError, ServerConfig
from server.edge.endpoint import Endpoint, PortLimits
from server.edge.grpcio_endpoint import GrpcioEndpoint
from server.edge.native_endpoint import NativeEndpoint
from server.edge.reflection import reflection_of

if TYPE_CHECKING:
    from server.access.gate import Gate
    from server.api.calls import Services
    from server.telemetry.metrics import ConnectionMetrics

_log = structlog.get_logger(__name__)


def new_endpoint(
    services: Services, config: ServerConfig, gate: Gate, metrics: ConnectionMetrics, *, shared_port: bool
) -> Endpoint:
    """Create the gRPC port without opening it.

    Args:
        services: the services; health and reflection are added to them.
        config: the server's settings.
        metrics: tells of the connections.
        gate: decides who may ask for the services' descriptions.
        shared_port: whether other processes of this server listen on the same port.

    Raises:
        ConfigError: `grpc_edge` is `native`, and that server is not built.
    """
    every = {**services, **(reflection_of(services, gate) if config.reflection else {})}
    limits = PortLimits.of(config)
    if config.grpc_edge != "grpcio":
        try:
            return NativeEndpoint(every, limits, metrics, shared_port=shared_port)
        except NativeLibraryError as error:
            if config.grpc_edge == "native":
                raise ConfigError(f"grpc_edge: {error}; or set grpc_edge to auto or grpcio") from error
            _log.warning("grpc_edge_not_native", reason=str(error), serving_with="grpcio")
    return GrpcioEndpoint(every, limits, shared_port=shared_port)
