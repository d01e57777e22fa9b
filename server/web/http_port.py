"""Listens for HTTP on a thread with an event loop of its own, so that it answers while the server's loop is busy.

Whoever can reach the port can use up no more than its bounds: connections, bytes, and seconds from a connection's
acceptance to its end. When it is full, the oldest connection that is not being answered makes room for the next one, so
that clients who connect and say nothing cannot keep a health check out.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import structlog

from server.config_sections import HttpConfig
from server.runtime.supervisor import Supervisor
from server.web.messages import Incomplete, Request, Response, read_request, text

_log = structlog.get_logger(__name__)

#: Returns the response to a request.
Answer = Callable[[Request], Awaitable[Response]]
#: Returns the current certificate and its rules.
Tls = Callable[[], ssl.SSLContext]

#: The part of all connections that is accepted before those that were accepted earlier are read again.
_ACCEPTED_AT_ONCE = 1 / 8
#: Pause after a connection could not be accepted (out of file descriptors).
_ACCEPT_AGAIN_S = 0.1


@dataclass(frozen=True, slots=True)
class Door:
    """Where connections come from.

    Attributes:
        opened: becomes readable when a connection waits.
        accept: returns the next connection. Raises OSError, and EOFError if there will be none any more.
        outside: whether others than this server connect, with TLS if the port has it.
    """

    opened: socket.socket
    accept: Callable[[], socket.socket]
    outside: bool


def listening(opened: socket.socket) -> Door:
    """Return the door of a socket that listens."""
    return Door(opened, lambda: opened.accept()[0], outside=True)


class HttpPort:
    """An HTTP/1.1 server without keep-alive; serves from `start` until `close`. Its loop's thread runs `answer`."""

    def __init__(
        self, doors: Sequence[Door], answer: Answer, limits: HttpConfig, supervisor: Supervisor, tls: Tls | None = None
    ) -> None:
        """Create the port.

        Args:
            doors: where connections come from; the port closes them.
            answer: called for every request; what it raises is logged, and answered with 500.
            limits: the bounds.
            supervisor: restarts the thread if it fails.
            tls: called for each connection from outside, whose handshake is part of its time; None for plain HTTP.
        """
        self.answer = answer
        self.limits = limits
        self._doors = list(doors)
        self._supervisor = supervisor
        self._tls = tls
        # Not uvloop's: it has no TLS handshake on a connection that is already accepted within a time of ours.
        self.loop = asyncio.SelectorEventLoop()
        self.loop.set_exception_handler(self._failed)
        #: Oldest first.
        self._open: dict[_Connection, None] = {}
        self._paused = True
        self._closing = False
        self._thread = supervisor.thread("http", self._serve)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Close all connections and stop listening."""
        self._closing = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        self._resume()
        if not self._closing:
            self.loop.run_forever()
        if self._closing:
            self._pause()
            self.loop.run_until_complete(self._end())
            self.loop.close()
            for door in self._doors:
                door.opened.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in list(self._open):
            connection.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # connections close in a turn of their own

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError):
            return  # a client that has gone
        if isinstance(error, Exception):
            self._supervisor.note("http", error)
        else:
            loop.default_exception_handler(context)

    def _resume(self) -> None:
        if self._paused and not self._closing:
            self._paused = False
            for door in self._doors:
                door.opened.setblocking(False)  # noqa: FBT003 - the standard library's
                self.loop.add_reader(door.opened, self._accept, door)

    def _pause(self) -> None:
        self._paused = True
        for door in self._doors:
            self.loop.remove_reader(door.opened)

    def _accept(self, door: Door) -> None:
        for _ in range(max(1, int(self.limits.connections_max * _ACCEPTED_AT_ONCE))):
            full = len(self._open) >= self.limits.connections_max
            idle = next((one for one in self._open if not one.answering), None)
            if full and idle is None:
                return self._pause()  # until one of them is answered
            try:
                accepted = door.accept()
            except BlockingIOError:
                return None
            except ConnectionAbortedError:
                continue
            except EOFError:
                self.loop.remove_reader(door.opened)
                return self._doors.remove(door)
            except OSError:
                if idle is not None:
                    idle.abort()
                self._pause()
                self.loop.call_later(_ACCEPT_AGAIN_S, self._resume)
                return None
            if _has_gone(accepted):
                accepted.close()
                continue
            if full and idle is not None:
                idle.abort()
            connection = _Connection(self)
            self._open[connection] = None
            connection.task = self.loop.create_task(self._greet(connection, accepted, door))
            connection.task.add_done_callback(partial(_close_unless_greeted, connection, accepted))
        return None

    async def _greet(self, connection: _Connection, accepted: socket.socket, door: Door) -> None:
        """Begin to read a connection, after its handshake."""
        try:
            context = self._tls() if self._tls is not None and door.outside else None
            # The connection's own time ends a handshake.
            await self.loop.connect_accepted_socket(lambda: connection, accepted, ssl=context)
        except OSError:  # the client has gone, or its handshake failed
            connection.abort()
        except Exception as error:  # noqa: BLE001 - a certificate that cannot be used must not end the port
            self._supervisor.note("http", error)
            connection.abort()

    def forget(self, connection: _Connection) -> None:
        """Note that a connection has ended."""
        self._open.pop(connection, None)
        if self._paused:
            self._resume()


class _Connection(asyncio.Protocol):
    """One connection: reads one request, answers it and closes.

    Attributes:
        answering: whether the request has arrived and its response is being made.
        greeted: whether the connection could be read.
        task: the handshake, or the making of the response.
    """

    task: asyncio.Task[None]

    def __init__(self, port: HttpPort) -> None:
        self._port = port
        self._received = b""
        self._read_on = True
        self._transport: asyncio.Transport | None = None
        self._ended = False
        self._late = port.loop.call_later(port.limits.request_s_max, self.abort)
        self.answering = False
        self.greeted = False

    def abort(self) -> None:
        """End the connection at once, whatever it is doing."""
        self._end()
        self.task.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._late.cancel()
            self._port.forget(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - the loop makes these of stream sockets
        self._transport, self.greeted = transport, True
        if self._ended:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        self._end()

    def eof_received(self) -> bool:
        """Wait for the answer if the client only said that it has said everything; TLS cannot be closed by halves."""
        return self.answering and self._transport is not None and self._transport.can_write_eof()

    def data_received(self, data: bytes) -> None:
        if not self._read_on:
            return
        self._received += data
        match read_request(self._received):
            case Request() as request:
                self._read_on, self.answering = False, True
                self.task = self._port.loop.create_task(self._answer(request))
            case Response() as refusal:
                self._send(refusal, with_body=True, all_read=False)
            case Incomplete():
                pass

    async def _answer(self, request: Request) -> None:
        try:
            response = await self._port.answer(request)
        except Exception as error:  # noqa: BLE001 - the boundary: a bug in one page must not end the port
            _log.error("http_failed", path=request.path, exc_info=error)
            response = text(HTTPStatus.INTERNAL_SERVER_ERROR, "this page could not be made; the log says why")
        self.answering = False
        self._send(response, with_body=request.method != "HEAD", all_read=True)

    def _send(self, response: Response, *, with_body: bool, all_read: bool) -> None:
        self._read_on = False
        if self._transport is None or self._ended:
            return
        self._transport.write(response.encoded(with_body=with_body))
        if not all_read and self._transport.can_write_eof():
            # The client may still be sending. Closing now would reset the connection, and it might lose the answer.
            self._transport.write_eof()
        else:
            self._transport.close()


def _close_unless_greeted(connection: _Connection, accepted: socket.socket, _: asyncio.Task[None]) -> None:
    """Close a socket that no transport has, or no longer has; also if the task was cancelled before it began."""
    if not connection.greeted:
        accepted.close()


def _has_gone(accepted: socket.socket) -> bool:
    """Make a connection non-blocking, and return whether its client has closed it without a word.

    In a flood most have: without this look, each would take a place and a task of its own.
    """
    accepted.setblocking(False)  # noqa: FBT003 - the standard library's
    try:
        return not accepted.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
