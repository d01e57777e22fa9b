"""gRPC reflection: tells callers that may ask which services and messages there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from pinrank.v1 import activity_pb2, models_pb2, ranking_pb2  # noqa: F401 - reflection answers from the registered descriptors

if TYPE_CHECKING:
    from server.api.calls import Methods, Services


def reflection_of(services: Services) -> Services:
    """Return the service that describes others, health and itself."""
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(names)
    return registered(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, servicer)


def registered(add: Callable[[Any, Any], None], servicer: object) -> dict[str, Methods]:
    """Return the methods that a package of grpcio registers with a server, by service."""
    registry = _Registry()
    add(servicer, registry)
    return registry.services


class _Registry:
    """Takes the services that grpcio's packages register with a server."""

    def __init__(self) -> None:
        self.services: dict[str, Methods] = {}

    def add_registered_method_handlers(self, service: str, methods: dict[str, Any]) -> None:
        self.services[service] = methods

    def add_generic_rpc_handlers(self, _: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """Ignore them: they are the same methods."""
