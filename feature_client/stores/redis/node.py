"""One Redis server: sends commands in one round trip within a time limit, and sends slow reads a second time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis.asyncio as redis
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from feature_client.estimates import RunningQuantile
from feature_client.stores.redis.answers import Commands, Request
from feature_client.stores.redis.breaker import Breaker
from feature_client.stores.redis.connection import Connection
from feature_client.stores.redis.hedge import HedgedCall
from feature_client.stores.redis.replies import Command, meanings_of
from feature_client.stores.redis.resp import MalformedReplyError, Reply
from feature_client.stores.store import StoreConfigError, StoreUnavailableError

_log = structlog.get_logger(__name__)

#: A read that takes longer than 95% of all reads is sent a second time, unless that would add more than 5% to the
#: number of reads. A pause of the server therefore delays few callers, and an overloaded server gets little extra load.
_SLOW_QUANTILE = 0.95
_HEDGES_PER_READ = 0.05
_HEDGES_SAVED_MAX = 10.0
#: Timers have a resolution of a millisecond; one that is set for less can fire at once.
_SLOW_MIN_S = 0.001
#: The assumed duration before any read was timed.
_FIRST_GUESS_S = 0.005
#: The age at which a connection is replaced. DNS names of servers that can move usually have a similar time to live.
AGE_MAX_S = 30.0
#: The time limit to connect (TCP and TLS), and of what is asked before any work: whether a server answers at all.
CONNECT_TIMEOUT_S = 1.0
#: The minimum time between two log lines about malformed replies of one node.
_LOG_PAUSE_S = 10.0


class RedisRefusedError(StoreUnavailableError):
    """The server refused the user or password of the URL, or the user lacks a permission that is needed."""


@dataclass(slots=True)
class NodeCounts:
    """Counts since the start. Commands that are sent together count once."""

    reads: int = 0
    hedged: int = 0
    failures: int = 0
    #: Failures because a reply did not fit its command.
    malformed: int = 0
    #: Calls that were not sent because the circuit breaker was open.
    spared: int = 0
    #: Connections that were replaced because of their age.
    renewed: int = 0


class RedisNode:
    """A pool of connections to one server, with a circuit breaker and a running estimate of its speed.

    Each new connection resolves the server's host name again. A name can move while the old server keeps answering, for
    example as a replica, so no connection is used for much longer than `age_max_s`: a new one is opened in the
    background and replaces it. If none can be opened, the old one stays in use.
    """

    def __init__(
        self, url: str, connections_max: int, timeout_s: float, age_max_s: float = AGE_MAX_S, **overrides: Any
    ) -> None:
        """Prepare a pool without connecting.

        Args:
            url: `redis://` or `rediss://`, with user, password and options of redis-py.
            connections_max: the maximum number of connections. A call that finds none free waits within its time limit.
            timeout_s: the time limit of calls that set none of their own. Connecting has `CONNECT_TIMEOUT_S`.
            age_max_s: the age at which a connection is replaced.
            overrides: options that override those of the URL, such as another host and port.

        Raises:
            StoreConfigError: the URL cannot be used.
        """
        self._timeout_s = timeout_s
        self._age_max_s = age_max_s
        try:
            self._pool = redis.ConnectionPool.from_url(  # only creates connections; this class tracks which are free
                url,
                socket_timeout=None,  # every call sets its own
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
                maint_notifications_config=MaintNotificationsConfig(enabled=False),  # they need RESP3
            )
            self._pool.connection_kwargs.update(overrides)
            Connection(self._pool)  # raises on unknown options
        except (ValueError, TypeError, RedisError):
            # Their messages can quote a password that was mistaken for a port.
            raise StoreConfigError(
                "the Redis URL cannot be used: write redis://[user:password@]host:port/db, encode the characters "
                "/ ? # @ : % of a password as %2F %3F %23 %40 %3A %25, and use only options that redis-py knows"
            ) from None
        kwargs = self._pool.connection_kwargs
        self.host, self.db = str(kwargs.get("host", "localhost")), int(kwargs.get("db") or 0)
        self.name = str(kwargs.get("path") or f"{self.host}:{kwargs.get('port', 6379)}")
        self.breaker = Breaker()
        self.counts = NodeCounts()
        #: Open connections that are not in use. The most recently used one is last, because it is most likely alive.
        self._free: list[Connection] = []
        self._places = asyncio.Semaphore(connections_max)
        self._slow = RunningQuantile(_SLOW_QUANTILE, _FIRST_GUESS_S)
        self._hedges = _HEDGES_SAVED_MAX
        #: Connections that were opened before this time are not used again.
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
        """Send commands together and return their replies; see `ask`."""
        return await self.ask(Commands(commands), timeout_s, idempotent=idempotent)

    async def ask(self, request: Request, timeout_s: float | None, *, idempotent: bool) -> list[Reply]:
        """Send commands together and return their replies. If a command fails, its reply is the exception.

        Args:
            request: at least one command. If the connection turns out to be unusable, all are sent once more on a new
                one.
            timeout_s: the time limit of the call; None uses the limit of the node.
            idempotent: whether the commands may be sent twice even though the first attempt can still succeed.

        Raises:
            RedisRefusedError: the server refused the user or password.
            StoreUnavailableError: the server did not answer in time, the connection broke, a reply was malformed, or
                the circuit breaker is open.
        """
        loop = asyncio.get_running_loop()
        budget_s = self._timeout_s if timeout_s is None else timeout_s
        start_s = loop.time()
        if budget_s <= 0:
            raise StoreUnavailableError(f"no time was left to ask Redis at {self.name}")
        if not self.breaker.allows(start_s, budget_s):
            self.counts.spared += 1
            raise StoreUnavailableError(
                f"Redis at {self.name} keeps failing; its circuit breaker is open, and a probe follows within seconds"
            )
        self.counts.reads += 1
        slow_s = math.inf
        if idempotent:
            self._hedges = min(_HEDGES_SAVED_MAX, self._hedges + _HEDGES_PER_READ)
            slow_s = max(self._slow.value, _SLOW_MIN_S)
        try:
            replies = await HedgedCall(partial(self._send, request), budget_s, slow_s, self._may_hedge).run()
        except TimeoutError as error:
            self._failed(loop)
            raise StoreUnavailableError(
                f"Redis at {self.name} did not answer within {budget_s * 1e3:.1f} ms"
            ) from error
        except (RedisError, OSError) as error:
            self._failed(loop)
            raise self._unavailable(error, loop.time()) from error
        if any(meaning.node_failed for meaning in meanings_of(replies)):
            self._failed(loop)
        else:
            self.breaker.succeeded()
            self._slow.observe(max(1e-6, loop.time() - start_s))
        return replies

    def _failed(self, loop: asyncio.AbstractEventLoop) -> None:
        self.counts.failures += 1
        self.breaker.failed(loop.time())

    def _unavailable(self, error: Exception, now_s: float) -> StoreUnavailableError:
        """Return the error that a caller gets for a failure."""
        if isinstance(error, AuthenticationError):
            return RedisRefusedError(f"Redis at {self.name} refused the user or password of the store URL: {error}")
        if isinstance(error, NoPermissionError):
            return RedisRefusedError(
                f"Redis at {self.name} does not allow the URL's user to send PING; add +ping to its ACL"
            )
        if isinstance(error, MalformedReplyError):
            self.counts.malformed += 1
            if now_s >= self._log_again_s:
                self._log_again_s = now_s + _LOG_PAUSE_S
                _log.warning("redis_reply_malformed", node=self.name, error=str(error), so_far=self.counts.malformed)
            return StoreUnavailableError(f"Redis at {self.name} sent a malformed reply: {error}")
        return StoreUnavailableError(f"Redis at {self.name} failed: {error}")

    def _may_hedge(self) -> bool:
        """Return whether a read may be sent a second time, and count it."""
        if self._hedges < 1:
            return False
        self._hedges -= 1
        self.counts.hedged += 1
        return True

    async def _send(self, request: Request) -> list[Reply]:
        """Send commands on a free connection and, if that one is unusable, once more on a new one.

        A free connection may be broken since a restart of the server, or lead to a server that is no primary any more.
        """
        async with self._places:
            connection = self._free.pop() if self._free else Connection(self._pool)
            reused = connection.is_open
            try:
                try:
                    replies = await self._exchange(connection, request)
                except (RedisConnectionError, OSError):
                    if not reused:
                        raise
                    await self._leave(asyncio.get_running_loop().time())
                    return await self._exchange(connection, request)
                if reused and not connection.is_open:
                    replies = await self._exchange(connection, request)
                    if connection.is_open:
                        await self._leave(connection.opened_s)
                return replies
            finally:
                await self._give_back(connection)

    async def _exchange(self, connection: Connection, request: Request) -> list[Reply]:
        if not connection.is_open:
            await connection.open(self._age_max_s)
        return await connection.exchange(request)

    async def _give_back(self, connection: Connection) -> None:
        if self._closed or connection.replaced or connection.opened_s < self._moved_s:
            await connection.close()
        elif connection.is_open:
            self._free.append(connection)
        if self._expired() is not None and (self._renewing is None or self._renewing.done()):
            self._renewing = asyncio.create_task(self._renew())

    async def _leave(self, moved_s: float) -> None:
        """Close all connections that were opened before `moved_s`, because they lead to a server that cannot answer."""
        self._moved_s = max(self._moved_s, moved_s)
        left = [other for other in self._free if other.opened_s < self._moved_s]
        self._free = [other for other in self._free if other not in left]
        for other in left:
            await other.close()

    def _expired(self) -> Connection | None:
        now_s = asyncio.get_running_loop().time()
        return next((free for free in self._free if free.expires_s <= now_s), None)

    async def _renew(self) -> None:
        """Replace old free connections by new ones, one at a time, until a new one cannot be opened."""
        async with self._places:
            while (old := self._expired()) is not None:
                new = Connection(self._pool)
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT_S):
                        await new.open(self._age_max_s)
                except (RedisError, OSError, TimeoutError) as error:
                    # For example, name resolution is down for a while. The old connections still work and stay in use.
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
