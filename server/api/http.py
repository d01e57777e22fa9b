"""Serves `/metrics` and `/healthz` over HTTP on a separate thread, so that both answer while the event loop is busy."""

from __future__ import annotations

import contextlib
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
from server.runtime.tls import Certificates

_log = structlog.get_logger(__name__)

_ACCEPT_AGAIN_S = 0.1


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, interface: Interface, port: int, certificates: Certificates | None) -> None:
        """Bind the same way as the gRPC port; the library's own bind looks up the host name in DNS, which may hang."""
        self._certificates = certificates
        super().__init__((interface.host, port), _Quiet, bind_and_activate=False)
        self.socket.close()
        self.socket = interface.bound(port, socket.SO_REUSEADDR)
        self.server_name, self.server_port = interface.host, self.socket.getsockname()[1]
        self.setup_environ()
        self.server_activate()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; pause after a failure (out of file descriptors), or the server would retry in a loop."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_ACCEPT_AGAIN_S)
            raise

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection; with TLS, after a handshake, here on the connection's own thread."""
        if self._certificates is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_Quiet.timeout)
        with self._certificates.current.http.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)
            secured.settimeout(0)
            with contextlib.suppress(OSError):
                secured.unwrap()  # says that this was all, and does not wait for the client to say the same

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - the signature is theirs
        """Log errors, except those of clients that disconnected or timed out."""
        error = sys.exception()
        if not isinstance(error, OSError):
            _log.error("http_failed", exc_info=error)


class _Quiet(WSGIRequestHandler):
    #: Seconds that a client may take to send its request; half-open connections must not accumulate.
    timeout = 5

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature is wsgiref's
        """Log nothing: scrapes are too frequent."""


def open_endpoints(
    host: str,
    port: int,
    registry: CollectorRegistry,
    healthy: Callable[[], bool],
    details: Callable[[], Sequence[str]],
    supervisor: Supervisor,
    certificates: Certificates | None = None,
) -> list[HttpEndpoint]:
    """Open and start an `HttpEndpoint` on every address of a host, all on the same port; 0 takes a free one.

    Raises:
        ListenError: a port cannot be opened; those already opened are closed.
    """
    found: list[HttpEndpoint] = []
    try:
        for interface in http_interfaces(host):
            number = found[0].port if found else port
            try:
                found.append(HttpEndpoint(interface, number, registry, healthy, details, supervisor, certificates))
            except OSError as error:
                raise ListenError(
                    f"cannot listen on {interface.at(number)} ({error.strerror}); set http_port to another port"
                ) from error
            found[-1].start()
    except ListenError:
        for endpoint in found:
            endpoint.close()
        raise
    return found


class HttpEndpoint:
    """An HTTP server for `/metrics` and `/healthz` on one address; serves from `start` until `close`."""

    def __init__(
        self,
        interface: Interface,
        port: int,
        registry: CollectorRegistry,
        healthy: Callable[[], bool],
        details: Callable[[], Sequence[str]],
        supervisor: Supervisor,
        certificates: Certificates | None = None,
    ) -> None:
        """Open the port.

        Args:
            interface: address to listen on.
            port: port to listen on; 0 takes a free one.
            registry: the metrics that `/metrics` exports.
            healthy: called for every `/healthz`, which answers 200 for True and 503 for False.
            details: returns the lines that `/healthz` shows after its first line.
            supervisor: restarts the thread if it fails.
            certificates: what it serves HTTPS with; without them, it serves HTTP.

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
            return [b"not found; this server has /metrics and /healthz\n"]

        self._server = _Server(interface, port, certificates)
        self._server.set_app(app)
        self._thread = supervisor.thread("http", partial(self._server.serve_forever, 0.1))
        self.port = self._server.server_port

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
