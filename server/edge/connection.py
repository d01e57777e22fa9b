"""One client's connection: runs the handlers of its calls, and writes what they answer. Belongs to one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import grpc
import grpc.aio

from server.edge.call import Call, Compressed, Method, peer_name, run
from server.edge.crowd import Closable, Crowd, free_calls, resets
from server.edge.http2 import ConnectionBrokenError, Event, EventKind, Http2Connection, Http2Endpoint
from server.edge.tls import TlsPort, auth_context

if TYPE_CHECKING:
    from server.edge.endpoint import PortLimits

#: Maximum time between a connection and its first HTTP/2 frame.
_GREETING_S_MAX = 20.0
#: Time for calls that a client sent before it heard that the connection retires.
RETIREMENT_S = 1.0
#: Time for clients to close a connection on which we send nothing more.
CLOSING_S = 0.5
_RETIRED = "the connection is too old, or the server shuts down; call again over another connection"
_HANGING_UP = "the server is shutting down; retry on another replica"

#: Time for a client to take an answer, whatever its deadline.
_TAKING_S = 20.0
#: Time for a client to send a whole request, whatever its deadline.
_ASKING_S = 20.0
#: Calls of methods that are no work, such as Health/Watch, last for ever; one connection needs few of them.
_IDLE_CALLS_MAX = 8
#: Calls to begin before other connections have their turn.
_BEGUN_A_TURN = 32
_CALL, _BEGUN = EventKind.CALL.value, EventKind.BEGUN.value


@dataclass(slots=True)
class Served:
    """What all connections of a server share.

    Attributes:
        http2: the native part of it.
        methods: the methods in the order in which `http2` has them.
        limits: the port's limits.
        crowd: the open connections, those in a TLS handshake too.
        is_proxy: says by a client certificate's names whether it speaks for others.
        tls: what clients are served with; None if the port speaks plain text.
        stopped: whether connections that come from now on are closed at once.
    """

    http2: Http2Endpoint
    methods: tuple[Method, ...]
    limits: PortLimits
    crowd: Crowd[Closable]
    is_proxy: Callable[[Mapping[str, list[bytes]]], bool]
    tls: TlsPort | None = None
    stopped: bool = False


class Connection(asyncio.Protocol):
    """Between the event loop's transport, HTTP/2 and the handlers."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._loop = asyncio.get_running_loop()
        self._http2 = Http2Connection(served.http2)
        self._calls: dict[int, Call] = {}
        #: The calls that are work: not those that wait for their client's next message, or to be told something.
        self._working: set[int] = set()
        self._idle_calls = 0
        #: Whether others speak over it, too, so that what one of them does must not hold up the connection.
        self._is_proxys = False
        #: What happened and waits until other connections have had their turn.
        self._waiting: deque[Event] = deque()
        self._transport: asyncio.Transport
        self._unread_since_s = self._reads_from_s = now_s = self._loop.time()
        self._is_writable, self._is_throttled = True, False
        self._has_ended = False
        self.closed = asyncio.Event()
        self._peer = ""
        self._auth_context: Mapping[str, list[bytes]] = {}
        self._greeted_by_s = now_s + _GREETING_S_MAX
        # Connections that were opened together must not all come back together.
        spread = random.uniform(0.9, 1.1)
        age_s = served.limits.connection_age_s_max
        self._retires_at_s = now_s + age_s * spread if age_s else float("inf")
        self._idle_s_max = served.limits.connection_idle_s_max or float("inf")
        self._idle_since_s = now_s
        self._resets, self._free_calls = resets(now_s), free_calls(now_s)
        self._resets_seen = 0
        self._goes_away_at_s = self._ends_idle_at_s = self._closes_at_s = float("inf")

    @property
    def is_reading(self) -> bool:
        """Whether the client's bytes are read; not while it reads no answers, or has had more than its turn."""
        return self._transport.is_reading()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will be sent, and the client is to close the connection."""
        return self._has_ended

    @property
    def calls(self) -> int:
        """The number of calls in progress."""
        return len(self._calls)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._peer = peer_name(transport.get_extra_info("peername"))
        if self._served.stopped or not self._served.crowd.enter(self):  # or it was accepted before the listener closed
            self.abort()
        elif self._is_secured():
            self.flush()
        else:
            self.abort()

    def _is_secured(self) -> bool:
        """Return whether the client may speak: in plain text if the port does, or else HTTP/2 over TLS."""
        tls = self._served.tls
        if tls is None:
            return True
        secured: ssl.SSLObject = self._transport.get_extra_info("ssl_object")
        self._auth_context = auth_context(secured.getpeercert())
        self._is_proxys = self._served.is_proxy(self._auth_context)
        return tls.has_h2(secured)

    def connection_lost(self, _: Exception | None) -> None:
        self._served.crowd.leave(self)
        self._is_writable = False
        self._waiting.clear()
        self.closed.set()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.over()

    def pause_writing(self) -> None:
        self._is_writable, self._unread_since_s = False, self._loop.time()
        self._read_or_not()

    def resume_writing(self) -> None:
        self._is_writable = True
        self._read_or_not()
        self.flush()

    def _read_or_not(self) -> None:
        """Read what the client sends, unless it does not read its answers, or had more than its turn."""
        if self._transport.is_closing():
            return
        reads = self._is_writable and not self._waiting and not self._is_throttled
        if reads != self._transport.is_reading():
            (self._transport.resume_reading if reads else self._transport.pause_reading)()

    def data_received(self, data: bytes) -> None:
        try:
            self._heed(self._http2.receive(data))
        except ConnectionBrokenError:
            self._close("broken")
        else:
            if self._http2.resets != self._resets_seen:
                self._judge_resets()
            self.flush()

    def _judge_resets(self) -> None:
        """Close the connection if its client begins calls only to end them (CVE-2023-44487)."""
        ended, self._resets_seen = self._http2.resets - self._resets_seen, self._http2.resets
        if self._resets.wait_s(ended, self._loop.time()):
            self._http2.go_away(calm=True)
            self._close("resets")
        else:
            self._resets.take(ended)

    def _close(self, reason: str) -> None:
        """Close the connection after what there is to say, because of what its client did."""
        self._served.crowd.metrics.closed(reason)
        self.flush()
        self._closes_at_s = self._loop.time() + CLOSING_S
        self._transport.close()

    def _heed(self, events: list[Event]) -> None:
        # Nothing may be sent meanwhile: what is sent causes events too, and they would overtake the others.
        self._waiting.extend(events)
        if len(self._waiting) == len(events):  # or they follow those that wait already
            self._heed_waiting()

    def _heed_waiting(self, *, is_late: bool = False) -> None:
        begun = 0
        while self._waiting and begun < _BEGUN_A_TURN:
            event = self._waiting.popleft()
            if event.kind in (_CALL, _BEGUN):
                if is_late and not self._http2.is_in_progress(event.stream):
                    continue
                self._begin(event)
                begun += 1
            elif (call := self._calls.get(event.stream)) is not None:
                self._go_on(call, event)
        if self._waiting:
            self._loop.call_soon(partial(self._heed_waiting, is_late=True))
        self._read_or_not()

    def _begin(self, event: Event) -> None:
        """Begin a call, or only note it as long as its message has not come."""
        method, bytes_max = self._served.methods[event.method], self._served.limits.message_bytes_max
        call = self._calls.get(event.stream)
        if call is None:
            call = self._calls[event.stream] = Call(
                self._http2,
                event.stream,
                event.timeout_us,
                event.credentials,
                method.serialise,
                self.flush,
                self._peer,
                self._auth_context,
            )
        if event.kind == _BEGUN or call.answered:
            call.asks_until_s = self._loop.time() + _ASKING_S
            return
        call.begun = method
        if not method.is_work:
            self._idle_calls += 1
            if self._idle_calls > _IDLE_CALLS_MAX and not self._is_proxys:
                problem = f"a connection may have {_IDLE_CALLS_MAX} calls of this method at once; end others first"
                call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, problem)
                return
        if method.takes_stream:
            answer = run(method, call.requests(bytes_max, partial(self._rest, event.stream)), call)
        else:
            self._work(event.stream, call)
            answer = run(
                method, Compressed(event.message, call, bytes_max) if event.compressed else event.message, call
            )
        call.task = self._loop.create_task(answer)

    def _work(self, stream: int, call: Call) -> None:
        """Note that a call has something to do, so that its connection does not make room for another."""
        if call.begun is not None and call.begun.is_work and stream not in self._working:
            self._working.add(stream)
            self._served.crowd.works(self)

    def _rest(self, stream: int) -> None:
        """Note that a call is over, or waits for its client's next message."""
        self._working.discard(stream)
        if not self._working:
            self._served.crowd.rests(self)

    def _go_on(self, call: Call, event: Event) -> None:
        match event.kind:
            case EventKind.CLOSED:
                del self._calls[event.stream]
                call.over()
                self._rest(event.stream)
                self._is_proxys |= call.by_proxy
                if call.begun is not None:
                    self._idle_calls -= not call.begun.is_work
                    if (call.begun.is_free or call.is_refused) and not self._is_proxys:
                        self._charge()
                if not self._calls:
                    self._idle_since_s = self._loop.time()
            case EventKind.SENT:
                call.sent()
            case EventKind.MESSAGE:
                self._work(event.stream, call)
                call.receive(event.message, compressed=bool(event.compressed))
            case EventKind.REQUEST_ENDED:
                self._work(event.stream, call)
                call.end_of_request()

    def _charge(self) -> None:
        """Count a call that no quota or limit bounds. Beyond a rate, the client's further calls wait."""
        now_s = self._loop.time()
        self._free_calls.take(1)
        if (wait_s := self._free_calls.wait_s(1, now_s)) > 0:
            self._reads_from_s = now_s + wait_s
            if not self._is_throttled:
                self._is_throttled = True
                self._read_or_not()
                self._loop.call_at(self._reads_from_s, self._end_throttle)

    def _end_throttle(self) -> None:
        if self._loop.time() < self._reads_from_s:  # calls have ended meanwhile
            self._loop.call_at(self._reads_from_s, self._end_throttle)
        else:
            self._is_throttled = False
            self._read_or_not()

    def flush(self) -> None:
        """Write what is to be sent, as long as the client reads it."""
        while self._is_writable and not self._has_ended:
            try:
                content, events = self._http2.send()
            except ConnectionBrokenError:
                self._transport.abort()
                return
            if content:
                self._transport.write(content)
            if events:
                self._heed(events)
            if not self._http2.has_more:
                break
        if not self._http2.is_open:
            self._end()

    def watch(self, now_s: float) -> None:
        """Do what is due: end calls after their deadlines, close a silent connection, retire an old one.

        Args:
            now_s: `time.monotonic()`, which is the event loop's time too.
        """
        self._watch_calls(now_s)
        if now_s > self._greeted_by_s and not self._http2.is_greeted and not self._transport.is_closing():
            self._served.crowd.metrics.closed("silent")
            self._transport.abort()
        if not self._calls and now_s - self._idle_since_s > self._idle_s_max:
            self._idle_s_max = float("inf")
            self._served.crowd.metrics.closed("idle")
            self.retire()
        if now_s > self._closes_at_s:
            self._transport.abort()
        if not self._is_writable and now_s > self._unread_since_s + _TAKING_S and not self.closed.is_set():
            self._served.crowd.metrics.closed("unread")
            self._transport.abort()
        if now_s > self._retires_at_s:
            self.retire()
        if now_s > self._goes_away_at_s:
            self._goes_away_at_s, self._ends_idle_at_s = float("inf"), now_s + _TAKING_S
            self._http2.go_away()
            self.flush()
        if now_s > self._ends_idle_at_s:
            for stream in self._calls.keys() - self._working:
                self._cut_off(self._calls[stream], grpc.StatusCode.UNAVAILABLE, _RETIRED)

    def _watch_calls(self, now_s: float) -> None:
        """End calls whose time is over: to send a request, to answer it, or to take the answer."""
        for stream, call in tuple(self._calls.items()):
            if call.task is None and now_s > call.asks_until_s:
                self._cut_off(call, grpc.StatusCode.DEADLINE_EXCEEDED, f"no whole request came within {_ASKING_S:g} s")
            if call.answered and not call.is_taking:
                call.is_taking, call.deadline_s = True, min(call.deadline_s or float("inf"), now_s + _TAKING_S)
            if call.deadline_s is None or now_s <= call.deadline_s:
                continue
            if call.answered:  # the client does not take its answer
                self._http2.reset(stream)
                self.flush()
            else:
                self._cut_off(call, grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline has passed")

    def retire(self) -> None:
        """Tell the client to use another connection; calls that come meanwhile are answered."""
        self._retires_at_s, self._goes_away_at_s = float("inf"), self._loop.time() + RETIREMENT_S
        self._http2.retire()
        self.flush()

    def hang_up(self) -> None:
        """End unanswered calls with UNAVAILABLE, and send nothing after what was written."""
        while self._waiting:
            self._heed_waiting()
        for call in tuple(self._calls.values()):
            self._cut_off(call, grpc.StatusCode.UNAVAILABLE, _HANGING_UP)
        self._http2.go_away()
        self.flush()
        self._end()
        self._is_throttled = False
        self._read_or_not()  # to notice that the client closes

    def _end(self) -> None:
        """Send nothing after what was written, and let the client close the connection.

        If we closed it, and so stopped to read, a TCP reset could destroy answers that are still on their way.
        """
        if self._has_ended or self._transport.is_closing():
            return
        self._has_ended = True
        self._closes_at_s = self._loop.time() + CLOSING_S
        if self._transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has closed the connection already
                self._transport.write_eof()
        # TLS has no such end: a client that has its last answer closes the connection, because we sent GOAWAY.

    def abort(self) -> None:
        """Close the connection at once."""
        self._transport.abort()

    def _cut_off(self, call: Call, code: grpc.StatusCode, message: str) -> None:
        if not call.answered:
            call.end(code, message)
            if call.task is not None:
                call.task.cancel()
