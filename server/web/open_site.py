"""Puts one server's HTTP port together: its metrics and probes, on a port of its own or handed on by its parent."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from server.config import ServerConfig
from server.runtime.listening import http_sockets
from server.runtime.supervisor import Supervisor
from server.web.channel import handed
from server.web.http_port import HttpPort, listening
from server.web.pages import MetricsPage, families_of, site
from server.web.probes import Probes

if TYPE_CHECKING:
    from server.runtime.tls import Certificates


def open_site(
    config: ServerConfig,
    registry: CollectorRegistry,
    probes: Probes,
    channel: socket.socket | None,
    supervisor: Supervisor,
    certificates: Certificates | None,
) -> tuple[HttpPort, int]:
    """Open the HTTP port without serving yet; return it and its number.

    Args:
        config: the server's settings.
        registry: what `/metrics` shows.
        probes: the answers of the probes.
        channel: where the parent of several processes hands connections on; None opens a port.
        supervisor: restarts the port's thread if it fails.
        certificates: what it serves HTTPS with; None for plain HTTP.

    Raises:
        ListenError: the port cannot be opened.
    """
    if channel is not None:
        doors, number = [handed(channel)], config.http_port
    else:
        opened = http_sockets(config.host, config.http_port)
        doors, number = [listening(one) for one in opened], opened[0].getsockname()[1]
    metrics = MetricsPage(families_of(registry), config.http.metrics_age_s_max)
    tls = None if certificates is None else lambda: certificates.current.http
    return HttpPort(doors, site({"/metrics": metrics.answer, **probes.pages()}), config.http, supervisor, tls), number
