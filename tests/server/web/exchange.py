"""Talks to an HTTP port over plain sockets, so that tests see every byte."""

from __future__ import annotations

import contextlib
import resource
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator


def exchange(port: int, sent: bytes, timeout_s: float = 30) -> bytes:
    """Send bytes on a connection of their own, and return everything that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as opened:
        opened.sendall(sent)
        return received(opened)


def received(opened: socket.socket) -> bytes:
    """Return everything that arrives until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while more := opened.recv(65_536):
            found += more
    return found


def fetch(port: int, path: str, **fields: str) -> tuple[int, bytes, dict[str, str]]:
    """Return the status, the body and the header fields of a GET."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=fields)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def lines(port: int, path: str) -> tuple[int, list[str]]:
    """Return the status and the lines of a GET."""
    status, body, _ = fetch(port, path)
    return status, body.decode().splitlines()


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """Let this process open as many sockets as the system allows."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def idle_connections(port: int, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """Keep connections open that say only this much."""
    with contextlib.ExitStack() as opened:
        found = []
        for _ in range(count):
            one = opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            with contextlib.suppress(OSError):  # a full port may have closed it already
                one.sendall(sent)
            found.append(one)
        yield found
