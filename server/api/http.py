"""`/metrics` and `/healthz` over HTTP, on a thread of their own: a busy event loop stays observable."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

from server.runtime.listening import Interface, ListenError, http_interfaces
from server.runtime.supervisor import Supervisor

_log = structlog.get_logger(__name__)

_ACCEPT_AGAIN_S = 0.1


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, interface: Interface, port: int) -> None:
        """Bind as the gRPC port is bound; the library's way asks the DNS for this machine's name, and may wait long."""
        super().__init__((interface.host, port), _Quiet, bind_and_activate=False)
        self.socket.close()
        self.socket = interface.bound(port, socket.SO_REUSEADDR)
        self.server_name, self.server_port = interface.host, self.socket.getsockname()[1]
        self.setup_environ()
        self.server_activate()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. One that cannot be, for want of descriptors, would be tried again without a pause."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_ACCEPT_AGAIN_S)
            raise

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - the signature is theirs
        """Log what fails, unless it is a client that went away or took too long."""
        error = sys.exception()
        if not isinstance(error, OSError):
            _log.error("http_failed", exc_info=error)


class _Quiet(WSGIRequestHandler):
    #: Seconds a client may take over its request; half-open connections must not pile up.
    timeout = 5

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature is wsgiref's
        """Scrapes are not worth a log line."""


def open_endpoints(
    host: str,
    port: int,
    registry: CollectorRegistry,
    healthy: Callable[[], bool],
    details: Callable[[], Sequence[str]],
    supervisor: Supervisor,
) -> list[HttpEndpoint]:
    """Open and start an `HttpEndpoint` on every interface of a host, all on one port; 0 takes a free one.

    Raises:
        ListenError: a port cannot be opened; none stays open.
    """
    found: list[HttpEndpoint] = []
    try:
        for interface in http_interfaces(host):
            number = found[0].port if found else port
            try:
                found.append(HttpEndpoint(interface, number, registry, healthy, details, supervisor))
            except OSError as error:
                raise ListenError(
                    f"cannot listen on {interface.at(number)} ({error.strerror}); set http_port to move"
                ) from error
            found[-1].start()
    except ListenError:
        for endpoint in found:
            endpoint.close()
        raise
    return found


class HttpEndpoint:
    """Serves until `close`."""

    def __init__(
        self,
        interface: Interface,
        port: int,
        registry: CollectorRegistry,
        healthy: Callable[[], bool],
        details: Callable[[], Sequence[str]],
        supervisor: Supervisor,
    ) -> None:
        """Open the port.

        Args:
            interface: address to listen on.
            port: 0 takes a free one.
            registry: of what `/metrics` tells.
            healthy: asked on every `/healthz`: 200 when true, 503 when not.
            details: the lines that follow the first one of `/healthz`.
            supervisor: keeps the thread alive.

        Raises:
            OSError: the port cannot be opened.
        """
        metrics: Callable[[Any, Any], Iterable[bytes]] = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            match environ["PATH_INFO"]:
                case "/metrics":
                    return metrics(environ, start_response)
                case "/healthz":
                    ok = healthy()
                    start_response("200 OK" if ok else "503 Service Unavailable", [("Content-Type", "text/plain")])
                    lines = ["serving" if ok else "not serving", *details()]
                    return ["".join(f"{line}\n" for line in lines).encode()]
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"there are /metrics and /healthz\n"]

        self._server = _Server(interface, port)
        self._server.set_app(app)
        self._thread = supervisor.thread("http", partial(self._server.serve_forever, 0.1))
        self.port = self._server.server_port

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
