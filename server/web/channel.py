"""Lets a parent process ask its children over HTTP without a port or a path: it hands them connections.

The parent and each child hold the ends of a socket pair. To ask, the parent makes another pair and sends one of its
ends through the first (SCM_RIGHTS); for the child's HTTP port that is an accepted connection. Nobody else can reach
it, it needs no folder, and it is gone when either process is.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

from server.web.http_port import Door


@dataclass(frozen=True, slots=True)
class Reply:
    """What a child answered."""

    status: int
    body: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The child has ended."""


@dataclass(frozen=True, slots=True)
class Silent:
    """The child did not answer in time."""


def handed(channel: socket.socket) -> Door:
    """Return the door of a child's end of the channel."""

    def accept() -> socket.socket:
        message, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if not message:
            raise EOFError
        if not descriptors:
            raise ConnectionAbortedError  # this process has no descriptor left for it
        return socket.socket(fileno=descriptors[0])

    return Door(channel, accept, outside=False)


async def ask(channel: socket.socket, path: str, within_s: float) -> Reply | Gone | Silent:
    """Ask a child for a page.

    Args:
        channel: the parent's end of the channel; it does not block.
        path: the path.
        within_s: time limit in seconds.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            socket.send_fds(channel, [b"."], [theirs.fileno()])
        except BlockingIOError:  # it has left earlier ones unread
            ours.close()
            return Silent()
        except OSError:
            ours.close()
            return Gone()
    try:
        async with asyncio.timeout(within_s):
            reader, writer = await asyncio.open_connection(sock=ours)
            writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            received = await reader.read()
    except TimeoutError:
        return Silent()
    except OSError:
        return Gone()
    finally:
        ours.close()
    head, _, body = received.decode().partition("\r\n\r\n")
    if not head:
        return Gone()
    return Reply(int(head.split(" ", 2)[1]), body)
