"""Closes the sockets of grpcio's server so that no caller sees CANCELLED.

gRPC's own shutdown does not guarantee this. Calls that no handler has accepted yet, and calls that arrive during the
shutdown, end with CANCELLED (grpc/grpc#41785). Clients take that for their own cancellation and do not retry. So before
gRPC stops, we close its listeners and shut down its connections: unanswered calls then end with UNAVAILABLE, and
clients connect to another server.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path


def hang_up(name: int | str) -> None:
    """Close this process's listeners on an address, and shut down the connections that they accepted.

    Data that was already written still arrives. gRPC does not expose its sockets, so we find them among the process's
    open file descriptors.

    Args:
        name: a TCP port, or the path of a Unix socket; the function removes the socket's file.

    Raises:
        OSError: the system does not list open file descriptors in /dev/fd.
    """
    if isinstance(name, str):  # remove it now: once our listener is closed, a successor may create its own file here
        Path(name).unlink(missing_ok=True)
    # Close listeners first, because clients reconnect at once. We replace each descriptor instead of shutting it down,
    # because gRPC would log an error for a listener that was shut down.
    with Path(os.devnull).open("rb") as nowhere:
        for number, own in _sockets(name):
            if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                os.dup2(nowhere.fileno(), number, inheritable=False)
    for _, own in _sockets(name):
        # Shut down our sending side only. If we stopped reading, a TCP reset could destroy answers still on their way.
        with contextlib.suppress(OSError):  # the client has closed the connection already
            own.shutdown(socket.SHUT_WR)


def _sockets(name: int | str) -> Iterator[tuple[int, socket.socket]]:
    """Yield the open descriptors of sockets bound to an address, each with a duplicate that we own."""
    for entry in os.listdir("/dev/fd"):  # noqa: PTH208 - numbers, not files
        number = int(entry)
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            own = socket.socket(fileno=os.dup(number))
        except OSError:  # it was closed in the meantime
            continue
        with own:
            if _name(own) == name:
                yield number, own


def _name(own: socket.socket) -> int | str | None:
    """Return the port or the path that a socket is bound to."""
    try:
        match own.family:
            case socket.AF_INET | socket.AF_INET6 if own.type == socket.SOCK_STREAM:
                return int(own.getsockname()[1])
            case socket.AF_UNIX:
                return str(own.getsockname())
    except OSError:  # the peer has disconnected
        return None
    return None
