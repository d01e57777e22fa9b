"""Accepts connections on a TLS port: each one counts from its accept on, and not only after its handshake."""

from __future__ import annotations

import asyncio
import errno
import socket

import structlog

from server.edge.connection import CLOSING_S, Connection, Served
from server.edge.tls import HANDSHAKE_S_MAX, TlsPort
from server.runtime.listening import BACKLOG

_log = structlog.get_logger(__name__)

#: Connections accepted in one turn of the event loop. One that makes room for another keeps its descriptor for some
#: turns, and only so many are spare.
_ACCEPTED_AT_ONCE = 16
#: Errors of an accept that last until others close something. All others are of one connection.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: Pause after an accept that failed for want of descriptors or memory.
_PAUSE_S = 1.0


class Handshake:
    """A connection until its handshake is over. It has a place in the crowd, which it hands on to a `Connection`."""

    def __init__(self, served: Served, tls: TlsPort, accepted: socket.socket) -> None:
        self._served, self._tls, self._accepted = served, tls, accepted
        self._is_done = False
        self.task = asyncio.get_running_loop().create_task(self._secure())

    def abort(self) -> None:
        """Close the connection at once."""
        self.task.cancel()

    def done(self) -> None:
        """Give the place in the crowd, and the socket, to a connection."""
        self._is_done = True
        self._served.crowd.leave(self)

    def end(self) -> None:
        """Close what no connection has taken over."""
        self._served.crowd.leave(self)
        if not self._is_done:
            self._accepted.close()

    async def _secure(self) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Secured(self._served, self),
                self._accepted,
                ssl=self._tls.context(),
                ssl_handshake_timeout=HANDSHAKE_S_MAX,
                ssl_shutdown_timeout=CLOSING_S,
            )
        except OSError:  # the client has gone, was too slow, or broke the handshake: `TlsPort` counts and logs that
            pass
        except ValueError as error:  # Python cannot read a name in the client's certificate
            self._tls.metrics.failed.inc()
            _log.warning("tls_handshake_failed", reason=f"the client's certificate cannot be read: {error}")


class _Secured(Connection):
    """A connection that takes the place of its handshake when that is done."""

    def __init__(self, served: Served, handshake: Handshake) -> None:
        super().__init__(served)
        self._handshake = handshake

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._handshake.done()
        super().connection_made(transport)


class TlsListener:
    """Listens on a bound socket, and accepts connections, each with the certificate of its moment."""

    def __init__(self, served: Served, tls: TlsPort, listening: socket.socket) -> None:
        self._served, self._tls, self._listening = served, tls, listening
        self._loop = asyncio.get_running_loop()
        self._pausing: asyncio.TimerHandle | None = None
        self.handshakes: set[Handshake] = set()
        listening.settimeout(0)
        listening.listen(BACKLOG)
        self._loop.add_reader(listening, self._accept)

    def close(self) -> None:
        """Accept no more connections, and end the handshakes."""
        if self._pausing is not None:
            self._pausing.cancel()
        self._loop.remove_reader(self._listening)
        self._listening.close()
        for one in self.handshakes:
            one.abort()

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, _ = self._listening.accept()
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    return
                # Do not try again in every turn.
                _log.error("connections_not_accepted", reason=str(error))
                self._loop.remove_reader(self._listening)
                self._pausing = self._loop.call_later(_PAUSE_S, self._go_on)
                return
            self._begin(accepted)

    def _go_on(self) -> None:
        self._pausing = None
        self._loop.add_reader(self._listening, self._accept)

    def _begin(self, accepted: socket.socket) -> None:
        accepted.settimeout(0)
        if accepted.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one = Handshake(self._served, self._tls, accepted)
        self.handshakes.add(one)
        one.task.add_done_callback(lambda _: self._over(one))
        if not self._served.crowd.enter(one):
            one.abort()

    def _over(self, one: Handshake) -> None:
        self.handshakes.discard(one)
        one.end()
