"""The gRPC port by our own server: HTTP/2 from nghttp2, sockets from the event loop, and no threads between them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.edge.call import Method
from server.edge.connection import CLOSING_S, Connection, Served
from server.edge.crowd import Crowd, connections_that_fit
from server.edge.endpoint import Endpoint, PortLimits
from server.edge.handshakes import TlsListener
from server.edge.http2 import Http2Endpoint
from server.edge.tls import TlsPort
from server.runtime.listening import BACKLOG, grpc_sockets, socket_path

if TYPE_CHECKING:
    from server.access.gate import Door
    from server.api.calls import Services
    from server.telemetry.metrics import ConnectionMetrics

#: Time between looks at the connections' deadlines and ages. Rank calls keep their deadlines themselves, and exactly.
_WATCH_S = 0.1


class NativeEndpoint(Endpoint):
    kind = "native"

    def __init__(
        self,
        services: Services,
        limits: PortLimits,
        metrics: ConnectionMetrics,
        *,
        shared_port: bool,
        tls: TlsPort | None = None,
        doors: Mapping[str, Door] | None = None,
        is_proxy: Callable[[Mapping[str, list[bytes]]], bool] = lambda _: False,
    ) -> None:
        """Create the endpoint without opening its port, as `Endpoint` does.

        `is_proxy` says by the names in a client's certificate (`Call.auth_context`) whether it speaks for others.

        Raises:
            NativeLibraryError: the library is not built, or nghttp2 is not installed.
        """
        super().__init__(services, limits, metrics, shared_port=shared_port, tls=tls, doors=doors)
        handlers = {
            f"/{service}/{name}": handler
            for service, methods in self._services.items()
            for name, handler in methods.items()
        }
        self._served = Served(
            Http2Endpoint(
                {path: handler.request_streaming for path, handler in handlers.items()},
                limits.message_bytes_max,
                limits.header_bytes_max,
                limits.connection_calls_max,
                limits.bytes_in_flight_max,
            ),
            tuple(Method.of(path, handler) for path, handler in handlers.items()),
            limits,
            Crowd(connections_that_fit(limits.connections_max), metrics),
            is_proxy,
            tls,
        )
        self._socket_path: Path | None = None
        self._listeners: list[asyncio.Server | TlsListener] = []
        self._watch: asyncio.TimerHandle | None = None
        #: TLS handshakes that ended with their listener.
        self._cut_off: list[asyncio.Task[None]] = []

    @property
    def connections(self) -> frozenset[Connection]:
        """The open connections, without those in a TLS handshake."""
        return frozenset(one for one in self._served.crowd.open if isinstance(one, Connection))

    async def start(self, host: str, port: int) -> None:
        self._socket_path = socket_path(host)
        for bound in grpc_sockets(host, port, shared_port=self._shared_port):
            self.listens_on = str(self._socket_path) if self._socket_path else bound.getsockname()[1]
            self._listeners.append(await self._listen(bound))
        self._watch_connections()

    async def _listen(self, bound: socket.socket) -> asyncio.Server | TlsListener:
        if self._tls is not None:
            return TlsListener(self._served, self._tls, bound)
        loop = asyncio.get_running_loop()
        make: Any = loop.create_unix_server if self._socket_path else loop.create_server
        listener: asyncio.Server = await make(lambda: Connection(self._served), sock=bound, backlog=BACKLOG)
        return listener

    def _watch_connections(self) -> None:
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(_WATCH_S, self._watch_connections)
        now_s = loop.time()
        for connection in self.connections:
            connection.watch(now_s)

    def retire(self) -> None:
        for connection in self.connections:
            connection.retire()

    async def hang_up(self) -> None:
        self._stop_listening()
        connections = self.connections
        for connection in connections:
            connection.hang_up()
        await _closed(connections)
        await self.stop()

    async def stop(self) -> None:
        self._stop_listening()
        self._served.stopped = True
        await asyncio.sleep(0)  # for connections that were accepted just now
        await asyncio.gather(*self._cut_off, return_exceptions=True)
        connections = self.connections
        for connection in connections:
            connection.abort()
        await _closed(connections)

    def _stop_listening(self) -> None:
        # Remove the path first: once our listener is closed, a successor may create its own file here.
        if self._listeners and self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)
        for listener in self._listeners:
            if isinstance(listener, TlsListener):
                self._cut_off += [one.task for one in listener.handshakes]
            listener.close()
        self._listeners.clear()
        if self._watch is not None:
            self._watch.cancel()


async def _closed(connections: Iterable[Connection]) -> None:
    """Wait until connections are closed, at most `CLOSING_S`."""
    waits = [asyncio.ensure_future(connection.closed.wait()) for connection in connections]
    if waits:
        _, left = await asyncio.wait(waits, timeout=CLOSING_S)
        for wait in left:
            wait.cancel()
