from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from server.config_sections import HttpConfig
from server.runtime.listening import http_sockets
from server.runtime.supervisor import Supervisor
from server.web.http_port import Answer, HttpPort, Tls, listening

OpenPort = Callable[..., int]


@pytest.fixture
def open_port() -> Iterator[OpenPort]:
    """Serve an answer on free ports of loopback, within changed bounds."""
    with_ends: list[HttpPort] = []

    def serve(answer: Answer, tls: Tls | None = None, **limits: float) -> int:
        opened = http_sockets("127.0.0.1", 0)
        port = HttpPort([listening(one) for one in opened], answer, HttpConfig(**limits), Supervisor(), tls)  # type: ignore[arg-type]
        port.start()
        with_ends.append(port)
        number: int = opened[0].getsockname()[1]
        return number

    yield serve
    for port in with_ends:
        port.close()
