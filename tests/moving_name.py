"""A host name that tests point from one server on loopback to another, as DNS does in a failover."""

from __future__ import annotations

import socket

import pytest

NAME = "features.test"


class MovingName:
    """Resolves `NAME` to `port` on loopback, whatever port the caller names; while `port` is None, resolving fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.port: int | None = None
        self.lookups = 0
        real = socket.getaddrinfo

        def getaddrinfo(host, port, *args, **kwargs):
            if host != NAME:
                return real(host, port, *args, **kwargs)
            self.lookups += 1
            if self.port is None:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", self.port))]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    @property
    def url(self) -> str:
        return f"redis://{NAME}:6379/0"
