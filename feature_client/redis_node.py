"""One Redis server: commands in one round trip, within a time budget, with a second try when it is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis.asyncio as redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.retry import Retry

from feature_client.breaker import Breaker
from feature_client.quantile import RunningQuantile
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
            self._pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=connections_max,
                timeout=timeout_s,
                socket_timeout=None,  # every call brings its own
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise StoreConfigError(f"unusable Redis URL: {error}") from error
        self._pool.connection_kwargs.update(overrides)
        kwargs = self._pool.connection_kwargs
        self.name = str(kwargs.get("path") or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}")
        self.breaker = Breaker()
        self.counts = NodeCounts()
        self._slow = RunningQuantile(_SLOW_QUANTILE, _FIRST_GUESS_S)
        self._hedges = _HEDGES_SAVED_MAX

    async def close(self) -> None:
        await self._pool.disconnect()

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
                f"Redis at {self.name} refused the user or password of the store URL: {error}"
            ) from error
        except TimeoutError as error:
            self._failed(loop)
            raise StoreUnavailableError(
                f"Redis at {self.name} did not answer within {budget_s * 1e3:.1f} ms"
            ) from error
        except (RedisError, OSError) as error:
            self._failed(loop)
            raise StoreUnavailableError(f"Redis at {self.name} failed: {error}") from error
        self.breaker.succeeded()
        self._slow.observe(max(1e-6, loop.time() - start_s))
        return replies

    def _failed(self, loop: asyncio.AbstractEventLoop) -> None:
        self.counts.failures += 1
        self.breaker.failed(loop.time())

    async def _hedged(self, commands: Sequence[Command]) -> list[Reply]:
        """Send; when no answer comes for unusually long, send again on another connection and take the first."""
        self._hedges = min(_HEDGES_SAVED_MAX, self._hedges + _HEDGES_PER_READ)
        tasks = [asyncio.ensure_future(self._send(commands))]
        try:
            done, _ = await asyncio.wait(tasks, timeout=self._slow.value)
            if not done and self._hedges >= 1:
                self._hedges -= 1
                self.counts.hedged += 1
                tasks.append(asyncio.ensure_future(self._send(commands)))
            while True:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task.exception() is None or len(tasks) == 1:
                        return task.result()
                    tasks.remove(task)
        finally:
            for task in tasks:
                if not task.cancel() and not task.cancelled():
                    task.exception()  # seen, and of no interest any more

    async def _send(self, commands: Sequence[Command]) -> list[Reply]:
        # redis-py's own connection, without its command layer: that costs a tenth of a millisecond a call.
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            if len(commands) == 1:
                await connection.send_packed_command(connection.pack_command(*commands[0]))
            else:
                await connection.send_packed_command(connection.pack_commands(commands))
            replies = []
            for _ in commands:
                try:
                    replies.append(await connection.read_response(disable_decoding=True))
                except ResponseError as error:
                    replies.append(error)
        except BaseException:
            # Replies may still be on their way: nobody else may read them.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await self._pool.release(connection)
        return replies
