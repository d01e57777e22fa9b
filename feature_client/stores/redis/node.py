"""One Redis server: commands in one round trip, within a time budget, with a second try when it is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis.asyncio as redis
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from feature_client.estimates import RunningQuantile
from feature_client.stores.redis.breaker import Breaker
from feature_client.stores.redis.connection import Connection
from feature_client.stores.redis.replies import Command, meaning_of
from feature_client.stores.redis.resp import MalformedReplyError, Reply
from feature_client.stores.store import StoreConfigError, StoreUnavailableError

_log = structlog.get_logger(__name__)

#: A read that takes longer than nineteen of twenty is asked a second time, as long as that adds no more than a
#: twentieth to the reads; a pause of the server thus costs few callers anything, and an overloaded one little more.
_SLOW_QUANTILE = 0.95
_HEDGES_PER_READ = 0.05
_HEDGES_SAVED_MAX = 10.0
#: Before any read was timed.
_FIRST_GUESS_S = 0.005
#: A connection is replaced when it is so old: about what names' time to live is set to where servers move.
AGE_MAX_S = 30.0
#: The least time between two lines of the log about one node's nonsense.
_LOG_PAUSE_S = 10.0


class RedisRefusedError(StoreUnavailableError):
    """The server refused the URL's user or password, or that user may not do what we must."""


@dataclass(slots=True)
class NodeCounts:
    """Since the start: commands sent together count once."""

    reads: int = 0
    hedged: int = 0
    failures: int = 0
    #: Failures that were replies which no Redis sends to what was asked.
    malformed: int = 0
    #: Not sent, as the circuit was open.
    spared: int = 0
    #: Connections that were replaced, as they were old.
    renewed: int = 0


class RedisNode:
    """A pool of connections to one server, its circuit breaker, and what is known of its speed.

    Every connection looks the server's name up anew. As a name may move while the old server goes on answering, as a
    replica say, no connection is used for much longer than `age_max_s`: a new one takes its place, opened in the
    background, when that can be opened.
    """

    def __init__(
        self, url: str, connections_max: int, timeout_s: float, age_max_s: float = AGE_MAX_S, **overrides: Any
    ) -> None:
        """Prepare a pool; nothing is connected yet.

        Args:
            url: `redis://` or `rediss://`, with user, password and redis-py's options.
            connections_max: the most connections; who finds none free waits within its budget.
            timeout_s: to connect, and of a call that brings no budget of its own.
            age_max_s: of a connection.
            overrides: options over the URL's, such as another host and port.

        Raises:
            StoreConfigError: the URL cannot be used.
        """
        self._timeout_s = timeout_s
        self._age_max_s = age_max_s
        try:
            self._pool = redis.ConnectionPool.from_url(  # only makes connections; which are free is kept here
                url,
                socket_timeout=None,  # every call brings its own
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                maint_notifications_config=MaintNotificationsConfig(enabled=False),  # these are of RESP3
            )
            self._pool.connection_kwargs.update(overrides)
            Connection(self._pool)  # which knows its options
        except (ValueError, TypeError, RedisError):
            # What they say may quote a password that was taken for a port.
            raise StoreConfigError(
                "the Redis URL cannot be used: write redis://[user:password@]host:port/db, the signs / ? # @ : % of a "
                "password as %2F %3F %23 %40 %3A %25, and after a ? only options that redis-py knows"
            ) from None
        kwargs = self._pool.connection_kwargs
        self.host, self.db = str(kwargs.get("host", "localhost")), int(kwargs.get("db") or 0)
        self.name = str(kwargs.get("path") or f"{self.host}:{kwargs.get('port', 6379)}")
        self.breaker = Breaker()
        self.counts = NodeCounts()
        #: Open ones; most recently used last, as that one is the most surely alive.
        self._free: list[Connection] = []
        self._places = asyncio.Semaphore(connections_max)
        self._slow = RunningQuantile(_SLOW_QUANTILE, _FIRST_GUESS_S)
        self._hedges = _HEDGES_SAVED_MAX
        #: Connections from before are not used again.
        self._moved_s = 0.0
        self._renewing: asyncio.Task[None] | None = None
        self._log_again_s = 0.0
        self._closed = False

    async def close(self) -> None:
        self._closed = True
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        for connection in self._free:
            await connection.close()
        self._free.clear()

    async def call(self, commands: Sequence[Command], timeout_s: float | None, *, idempotent: bool) -> list[Reply]:
        """Send commands together and return their replies; errors of single commands come back as exceptions.

        Args:
            commands: at least one; all may be sent a second time when the first connection turns out to be of no use.
            timeout_s: for all of it; None takes the node's own.
            idempotent: whether they may be sent twice although the first time may succeed.

        Raises:
            RedisRefusedError: the server refused user or password.
            StoreUnavailableError: it did not answer in time, the connection broke, what it answered makes no sense, or
                the circuit is open.
        """
        loop = asyncio.get_running_loop()
        budget_s = self._timeout_s if timeout_s is None else timeout_s
        start_s = loop.time()
        if budget_s <= 0:
            raise StoreUnavailableError(f"no time was left to ask Redis at {self.name}")
        if not self.breaker.allows(start_s, budget_s):
            self.counts.spared += 1
            raise StoreUnavailableError(f"Redis at {self.name} failed just now and is left alone for a moment")
        self.counts.reads += 1
        try:
            async with asyncio.timeout(budget_s):
                replies = await (self._hedged(commands) if idempotent else self._send(commands))
        except TimeoutError as error:
            self._failed(loop)
            raise StoreUnavailableError(
                f"Redis at {self.name} did not answer within {budget_s * 1e3:.1f} ms"
            ) from error
        except (RedisError, OSError) as error:
            self._failed(loop)
            raise self._unavailable(error, loop.time()) from error
        if any(meaning_of(reply).node_failed for reply in replies):
            self._failed(loop)
        else:
            self.breaker.succeeded()
            self._slow.observe(max(1e-6, loop.time() - start_s))
        return replies

    def _failed(self, loop: asyncio.AbstractEventLoop) -> None:
        self.counts.failures += 1
        self.breaker.failed(loop.time())

    def _unavailable(self, error: Exception, now_s: float) -> StoreUnavailableError:
        """Return what a caller is told of a failure."""
        if isinstance(error, AuthenticationError):
            return RedisRefusedError(f"Redis at {self.name} refused the user or password of the store URL: {error}")
        if isinstance(error, NoPermissionError):
            return RedisRefusedError(f"Redis at {self.name} does not let the URL's user send PING: allow it (+ping)")
        if isinstance(error, MalformedReplyError):
            self.counts.malformed += 1
            if now_s >= self._log_again_s:
                self._log_again_s = now_s + _LOG_PAUSE_S
                _log.warning("redis_reply_malformed", node=self.name, error=str(error), so_far=self.counts.malformed)
            return StoreUnavailableError(f"Redis at {self.name} answered nonsense: {error}")
        return StoreUnavailableError(f"Redis at {self.name} failed: {error}")

    async def _hedged(self, commands: Sequence[Command]) -> list[Reply]:
        """Send; when no answer comes for unusually long, send again on another connection and take the first."""
        self._hedges = min(_HEDGES_SAVED_MAX, self._hedges + _HEDGES_PER_READ)
        loop = asyncio.get_running_loop()
        first: asyncio.Future[list[Reply]] = loop.create_future()
        tasks: list[asyncio.Task[list[Reply]]] = []

        def land(task: asyncio.Task[list[Reply]]) -> None:
            if task.cancelled():
                return
            error = task.exception()
            if first.done():
                return
            if error is None:
                first.set_result(task.result())
            elif all(other.done() and (other.cancelled() or other.exception()) for other in tasks):
                first.set_exception(error)

        def send() -> None:
            task = loop.create_task(self._send(commands, tasks[0] if tasks else None))
            tasks.append(task)
            task.add_done_callback(land)

        def send_again() -> None:
            if self._hedges >= 1:
                self._hedges -= 1
                self.counts.hedged += 1
                send()

        send()
        timer = loop.call_later(self._slow.value, send_again)
        try:
            return await first
        finally:
            timer.cancel()
            for task in tasks:
                task.cancel()

    async def _send(self, commands: Sequence[Command], first: asyncio.Task[list[Reply]] | None = None) -> list[Reply]:
        """Send on a free connection; when that one led nowhere, once more on a new one.

        It may be broken since the server was restarted, or lead to a server that another has taken over from.

        Args:
            commands: what to send.
            first: of a second try, the first.
        """
        async with self._places:
            if first is not None and first.done():
                # The connection that it just gave back would be closed when its answer lands.
                return first.result()
            connection = self._free.pop() if self._free else Connection(self._pool)
            reused = connection.is_open
            try:
                try:
                    replies = await self._exchange(connection, commands)
                except (RedisConnectionError, OSError):
                    if not reused:
                        raise
                    await self._leave(asyncio.get_running_loop().time())
                    return await self._exchange(connection, commands)
                if reused and not connection.is_open:
                    replies = await self._exchange(connection, commands)
                    if connection.is_open:
                        await self._leave(connection.opened_s)
                return replies
            finally:
                await self._give_back(connection)

    async def _exchange(self, connection: Connection, commands: Sequence[Command]) -> list[Reply]:
        if not connection.is_open:
            await connection.open(self._age_max_s)
        return await connection.exchange(commands)

    async def _give_back(self, connection: Connection) -> None:
        if self._closed or connection.replaced or connection.opened_s < self._moved_s:
            await connection.close()
        elif connection.is_open:
            self._free.append(connection)
        if self._expired() is not None and (self._renewing is None or self._renewing.done()):
            self._renewing = asyncio.create_task(self._renew())

    async def _leave(self, moved_s: float) -> None:
        """Use no connection again that was opened before: they lead to where nobody answers as he should."""
        self._moved_s = max(self._moved_s, moved_s)
        left = [other for other in self._free if other.opened_s < self._moved_s]
        self._free = [other for other in self._free if other not in left]
        for other in left:
            await other.close()

    def _expired(self) -> Connection | None:
        now_s = asyncio.get_running_loop().time()
        return next((free for free in self._free if free.expires_s <= now_s), None)

    async def _renew(self) -> None:
        """Replace free connections that are old by new ones, one after the other, as long as new ones can be opened."""
        async with self._places:
            while (old := self._expired()) is not None:
                new = Connection(self._pool)
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await new.open(self._age_max_s)
                except (RedisError, OSError, TimeoutError) as error:
                    # Names cannot be looked up for a while, say: the old ones still answer, and stay in use meanwhile.
                    _log.warning("redis_connection_not_renewed", node=self.name, error=str(error))
                    for kept in (old, *self._free):
                        kept.expires_s = max(kept.expires_s, asyncio.get_running_loop().time() + self._age_max_s)
                    return
                self.counts.renewed += 1
                self._free.append(new)
                old.replaced = True
                if old in self._free:
                    self._free.remove(old)
                    await old.close()
