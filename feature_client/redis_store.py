from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import redis.asyncio as redis
import structlog
from redis.exceptions import AuthenticationError, RedisError

from feature_client.store import StoreConfigError, StoreUnavailableError

_PUT_CHUNK = 1_000

_log = structlog.get_logger(__name__)


class RedisStore:
    """A store in one Redis server: an MGET a read, pipelined SETs a write."""

    local = False

    def __init__(self, url: str, *, connections_max: int = 16, timeout_s: float = 1.0) -> None:
        self._url = url
        self._connections_max = connections_max
        self._timeout_s = timeout_s
        self._client: redis.Redis | None = None

    async def start(self) -> None:
        """Open the pool. A server that is down is not fatal: reads raise until it is back."""
        try:
            pool = redis.BlockingConnectionPool.from_url(
                self._url,
                max_connections=self._connections_max,
                timeout=self._timeout_s,
                socket_timeout=self._timeout_s,
                socket_connect_timeout=self._timeout_s,
            )
            self._client = redis.Redis.from_pool(pool)
            await self._client.ping()
        except ValueError as error:
            raise StoreConfigError(f"unusable Redis URL: {error}") from error
        except AuthenticationError as error:
            raise StoreConfigError(f"Redis refused the user or password of the store URL: {error}") from error
        except RedisError as error:
            _log.warning("feature_store_down_at_start", error=str(error))

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def multi_get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if not keys:
            return []
        try:
            values: list[bytes | None] = await self._opened().mget(keys)  # type: ignore[assignment]
            return values
        except (RedisError, OSError) as error:
            raise StoreUnavailableError(f"Redis failed a read: {error}") from error

    async def multi_put(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        written = 0
        try:
            remaining = iter(items)
            while chunk := list(itertools.islice(remaining, _PUT_CHUNK)):
                pipeline = self._opened().pipeline(transaction=False)
                for key, value in chunk:
                    pipeline.set(key, value)
                written += len(await pipeline.execute())
        except (RedisError, OSError) as error:
            raise StoreUnavailableError(f"Redis failed a write: {error}") from error
        return written

    def _opened(self) -> redis.Redis:
        if self._client is None:
            raise StoreUnavailableError("the Redis store is not started")
        return self._client
