"""One Redis server: commands in one round trip, within a time budget, with a second try when it is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hiredis
import redis.asyncio as redis
from redis.asyncio.connection import AbstractConnection
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from feature_client.breaker import Breaker
from feature_client.quantile import RunningQuantile
from feature_client.redaction import redacted, said, secrets_of
from feature_client.store import StoreConfigError, StoreUnavailableError

Command = tuple[bytes | str | int, ...]
Reply = Any

#: A read that takes longer than nineteen of twenty is asked a second time, as long as that adds no more than a
#: twentieth to the reads; a pause of the server thus costs few callers anything, and an overloaded one little more.
_SLOW_QUANTILE = 0.95
_HEDGES_PER_READ = 0.05
_HEDGES_SAVED_MAX = 10.0
#: Before any read was timed.
_FIRST_GUESS_S = 0.005


class RedisRefusedError(StoreUnavailableError):
    """The server refused the URL's user or password."""


@dataclass(slots=True)
class NodeCounts:
    """Since the start: commands sent together count once."""

    reads: int = 0
    hedged: int = 0
    failures: int = 0
    #: Not sent, as the circuit was open.
    spared: int = 0


class RedisNode:
    """A pool of connections to one server, its circuit breaker, and what is known of its speed."""

    def __init__(self, url: str, connections_max: int, timeout_s: float, **overrides: Any) -> None:
        """Prepare a pool; nothing is connected yet.

        Args:
            url: `redis://` or `rediss://`, with user, password and redis-py's options.
            connections_max: the most connections; who finds none free waits within its budget.
            timeout_s: to connect, and of a call that brings no budget of its own.
            overrides: options over the URL's, such as another host and port.

        Raises:
            StoreConfigError: the URL cannot be used.
        """
        self._timeout_s = timeout_s
        try:
            self._pool = redis.ConnectionPool.from_url(  # only makes connections; which are free is kept here
                url,
                socket_timeout=None,  # every call brings its own
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            # Its text may quote the password, where that has a `/` or another character of a URL's own.
            option = str(error) if str(error).startswith("Invalid value for") else "the port must be a number"
            raise StoreConfigError(
                f"unusable Redis URL {redacted(url)!r}: {option}; percent-encode special characters of user and "
                "password"
            ) from None
        self._secrets = secrets_of(url, user=True)
        self._pool.connection_kwargs.update(overrides)
        kwargs = self._pool.connection_kwargs
        self.name = str(kwargs.get("path") or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}")
        self.breaker = Breaker()
        self.counts = NodeCounts()
        #: Most recently used last, as that one is the most surely alive.
        self._free: list[AbstractConnection] = []
        self._places = asyncio.Semaphore(connections_max)
        self._slow = RunningQuantile(_SLOW_QUANTILE, _FIRST_GUESS_S)
        self._hedges = _HEDGES_SAVED_MAX

    async def close(self) -> None:
        for connection in self._free:
            await connection.disconnect()
        self._free.clear()

    async def call(self, commands: Sequence[Command], timeout_s: float | None, *, idempotent: bool) -> list[Reply]:
        """Send commands together and return their replies; errors of single commands come back as exceptions.

        Args:
            commands: at least one.
            timeout_s: for all of it; None takes the node's own.
            idempotent: whether they may be sent twice.

        Raises:
            RedisRefusedError: the server refused user or password.
            StoreUnavailableError: it did not answer in time, the connection broke, or the circuit is open.
        """
        loop = asyncio.get_running_loop()
        budget_s = self._timeout_s if timeout_s is None else timeout_s
        start_s = loop.time()
        if not self.breaker.allows(start_s, budget_s):
            self.counts.spared += 1
            raise StoreUnavailableError(f"Redis at {self.name} failed just now and is left alone for a moment")
        self.counts.reads += 1
        try:
            async with asyncio.timeout(budget_s):
                replies = await (self._hedged(commands) if idempotent else self._send(commands))
        except AuthenticationError as error:
            self._failed(loop)
            raise RedisRefusedError(
                f"Redis at {self.name} refused the user or password of the store URL: {said(error, self._secrets)}"
            ) from error
        except TimeoutError as error:
            self._failed(loop)
            raise StoreUnavailableError(
                f"Redis at {self.name} did not answer within {budget_s * 1e3:.1f} ms"
            ) from error
        except (RedisError, OSError) as error:
            self._failed(loop)
            raise StoreUnavailableError(f"Redis at {self.name} failed: {said(error, self._secrets)}") from error
        self.breaker.succeeded()
        self._slow.observe(max(1e-6, loop.time() - start_s))
        return replies

    def _failed(self, loop: asyncio.AbstractEventLoop) -> None:
        self.counts.failures += 1
        self.breaker.failed(loop.time())

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
            elif all(other.done() for other in tasks):
                first.set_exception(error)

        def send() -> None:
            task = loop.create_task(self._send(commands))
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

    def _new_connection(self) -> AbstractConnection:
        made: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return made

    async def _send(self, commands: Sequence[Command]) -> list[Reply]:
        """Send on a free connection; on one that broke while it lay idle, once more on a new one."""
        async with self._places:
            connection = self._free.pop() if self._free else self._new_connection()
            reused = connection.is_connected
            try:
                try:
                    return await self._exchange(connection, commands)
                except (RedisConnectionError, OSError):
                    if not reused:
                        raise
                # The server was restarted, or dropped idle connections: the others are broken too.
                for other in self._free:
                    await other.disconnect(nowait=True)
                return await self._exchange(connection, commands)
            finally:
                self._free.append(connection)

    async def _exchange(self, connection: AbstractConnection, commands: Sequence[Command]) -> list[Reply]:
        """Send commands and read their replies; whatever goes wrong, no reply is left for the next to read.

        On redis-py's connection without its command layer, packing and pool: those cost 0.3 ms a call of 228 keys.
        """
        try:
            packed: list[bytes] = [hiredis.pack_command(command) for command in commands]  # type: ignore[arg-type]
            await connection.send_packed_command(b"".join(packed))
            replies: list[Reply] = []
            for _ in commands:
                try:
                    replies.append(await connection.read_response(disable_decoding=True))
                except ResponseError as error:
                    error.args = (said(error, self._secrets),)  # whoever shows it
                    replies.append(error)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return replies
