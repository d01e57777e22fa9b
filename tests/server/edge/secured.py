"""Both edges behind TLS, and clients that connect to them in ways that gRPC's own do not."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from server.edge.endpoint import Endpoint, PortLimits
from server.edge.tls import TlsPort
from server.runtime.tls import Certificates, TlsFiles
from server.telemetry.metrics import Metrics
from tests.certificates import Authority, Pair
from tests.server.edge.service import BYTES_MAX, Service

#: Names of handshakes' events in the metric.
EVENTS = "pinrank_tls_handshakes_total"


class Secured(Service):
    """Handlers that also tell their caller who it is, and that answer at length."""

    async def whoami(self, _, context):
        found = context.auth_context()
        names = [b"x509_common_name", b"x509_subject_alternative_name"]
        return b"|".join(b",".join(found.get(name.decode(), ())) for name in names)

    async def many(self, _, __):
        self.running += 1
        return bytes(4 << 20)


class SecuredPort:
    """An edge on a free port of loopback."""

    def __init__(self, kind: type[Endpoint], files: TlsFiles, age_s_max: float = 0, connections_max: int = 0) -> None:
        self.service, self.metrics = Secured(), Metrics()
        self.certificates = Certificates(files)
        unary = grpc.unary_unary_rpc_method_handler
        methods: dict[str, Any] = {
            "Reverse": unary(self.service.reverse),
            "Hang": unary(self.service.hang),
            "WhoAmI": unary(self.service.whoami),
            "Many": unary(self.service.many),
        }
        port = TlsPort(self.certificates, self.metrics.tls)
        limits = PortLimits(BYTES_MAX, connection_age_s_max=age_s_max, connections_max=connections_max)
        self.endpoint = kind({"test": methods}, limits, self.metrics.connections, shared_port=False, tls=port)

    async def start(self, host: str = "127.0.0.1") -> SecuredPort:
        await self.endpoint.start(host, 0)
        return self

    @property
    def port(self) -> int:
        return int(self.endpoint.listens_on)

    def channel(
        self, ca: Path, pair: Pair | None = None, host: str = "localhost", **options: object
    ) -> grpc.aio.Channel:
        own = () if pair is None else (pair.key.read_bytes(), pair.certificate.read_bytes())
        settings = {"grpc.use_local_subchannel_pool": 1, "grpc.max_receive_message_length": -1}
        return grpc.aio.secure_channel(
            f"{host}:{self.port}",
            grpc.ssl_channel_credentials(ca.read_bytes(), *own),
            list((settings | options).items()),
        )

    def count(self, event: str) -> float:
        return self.metrics.value(EVENTS, event=event) or 0.0


def client_context(authority: Authority, alpn: str | None = "h2", *, weak: bool = False) -> ssl.SSLContext:
    """Return the context of a client; a weak one lets OpenSSL offer what its own policy forbids, such as TLS 1.1."""
    context = ssl.create_default_context(cafile=authority.file)
    if alpn:
        context.set_alpn_protocols([alpn])
    if weak:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def hello() -> bytes:
    """Return the first bytes of a TLS client."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(to_client, to_server, server_hostname="localhost")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return to_server.read()
    raise AssertionError("the handshake cannot be complete")


async def shaken(port: int, context: ssl.SSLContext) -> str:
    """Connect, and return the version of TLS that was agreed on; or why there is none."""

    def connect() -> str:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as plain:
            try:
                with context.wrap_socket(plain, server_hostname="localhost") as secured:
                    return str(secured.version()) if secured.recv(1) else "closed"
            except OSError as error:  # an alert, or the end of the connection without one
                return f"refused: {error}"

    return await asyncio.to_thread(connect)
