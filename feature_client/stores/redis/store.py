from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import structlog
from redis.exceptions import MovedError, ResponseError

from feature_client.stores.redis.node import AGE_MAX_S, RedisNode, RedisRefusedError
from feature_client.stores.redis.replies import Command, code_of, meaning_of
from feature_client.stores.redis.resp import Reply
from feature_client.stores.store import Change, StoreConfigError, StoreUnavailableError

_log = structlog.get_logger(__name__)

_PUT_CHUNK = 1_000
#: Keys of one MGET: larger reads go over several connections at once, so that none blocks the server for long.
_GET_CHUNK = 1_000
_SCAN_KEYS = 5_000
_UPDATE_TRIES = 20

#: Set a key where it still holds what was read; an absent one reads as empty, which no stored value is.
_SET_IF_UNCHANGED = (
    "if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end redis.call('SET', KEYS[1], ARGV[2]) return 1"
)

Positions = np.ndarray


class RedisStore:
    """A store in one Redis server."""

    local = False

    def __init__(
        self, url: str, *, connections_max: int = 16, timeout_s: float = 1.0, age_max_s: float = AGE_MAX_S
    ) -> None:
        """Remember.

        Args:
            url: `redis://[user:password@]host:port/db`, or `rediss://` for TLS; redis-py's options after `?`.
            connections_max: per server.
            timeout_s: to connect, and of calls without a budget of their own.
            age_max_s: after which a connection is replaced by one for which the host's name was looked up anew.
        """
        self._url = url
        self._connections_max = connections_max
        self._timeout_s = timeout_s
        self._age_max_s = age_max_s
        self._started = False
        #: By host:port.
        self._nodes: dict[str, RedisNode] = {}

    @property
    def nodes(self) -> Mapping[str, RedisNode]:
        return self._nodes

    async def start(self) -> None:
        """Open the pools. A server that is down is not fatal: reads raise until it is back."""
        first = self._new_node()
        self._nodes[first.name] = first
        self._started = True
        try:
            await self._look()
        except RedisRefusedError as error:
            await self.close()
            raise StoreConfigError(str(error)) from error
        except StoreConfigError:
            await self.close()
            raise
        except StoreUnavailableError as error:
            _log.warning("feature_store_down_at_start", error=str(error))

    async def close(self) -> None:
        self._started = False
        nodes, self._nodes = self._nodes, {}
        for node in nodes.values():
            await node.close()

    async def multi_get(self, keys: Sequence[bytes], timeout_s: float | None = None) -> list[bytes | None]:
        if not keys:
            return []
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        ends_s = asyncio.get_running_loop().time() + timeout_s
        routes = [part for route in self._routes(keys) for part in _chunks(*route)]
        if len(routes) == 1:
            return await self._read(routes[0][0], keys, timeout_s)
        values: list[bytes | None] = [None] * len(keys)
        failures: list[str] = []
        lost: list[int] = []

        async def read(node: RedisNode, positions: Positions) -> None:
            try:
                left_s = ends_s - asyncio.get_running_loop().time()
                found = await self._read(node, [keys[i] for i in positions], left_s)
            except StoreUnavailableError as error:
                failures.append(str(error))
                lost.extend(positions.tolist())
            else:
                for i, value in zip(positions, found, strict=True):
                    values[i] = value

        await asyncio.gather(*(read(node, positions) for node, positions in routes))
        if failures:
            raise StoreUnavailableError(failures[0], values, sorted(lost))
        return values

    async def multi_put(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        written = 0
        remaining = iter(items)
        while chunk := list(itertools.islice(remaining, _PUT_CHUNK)):
            await self._put(chunk)
            written += len(chunk)
        return written

    async def _put(self, chunk: Sequence[tuple[bytes, bytes]]) -> None:
        # One command of many keys is read and answered faster than many of one.
        await self._on_owners([("MSET", *itertools.chain.from_iterable(chunk))], [chunk[0][0]])

    async def update(self, keys: Sequence[bytes], change: Change) -> None:
        left = list(range(len(keys)))
        for _ in range(_UPDATE_TRIES):
            before = await self.multi_get([keys[i] for i in left])
            after = change(left, before)
            changes = [
                (i, ("EVAL", _SET_IF_UNCHANGED, 1, keys[i], old or b"", new))
                for i, old, new in zip(left, before, after, strict=True)
                if new is not None and new != old
            ]
            replies = await self._on_owners([command for _, command in changes], [keys[i] for i, _ in changes])
            left = [i for (i, _), done in zip(changes, replies, strict=True) if not done]
            if not left:
                return
        raise StoreUnavailableError(
            f"{len(left)} keys were changed by others {_UPDATE_TRIES} times in a row", lost=left
        )

    async def scan(self) -> AsyncIterator[list[bytes]]:
        for node in self._owning_nodes():
            cursor: bytes = b"0"
            while True:
                (reply,) = await node.call([("SCAN", cursor, "COUNT", _SCAN_KEYS)], None, idempotent=True)
                if isinstance(reply, ResponseError):
                    raise failed(node.name, "a scan", reply)
                cursor, keys = reply
                yield keys
                if cursor == b"0":
                    break

    def _owning_nodes(self) -> list[RedisNode]:
        return list(self._nodes.values())

    def _new_node(self, **overrides: Any) -> RedisNode:
        return RedisNode(self._url, self._connections_max, self._timeout_s, self._age_max_s, **overrides)

    async def _look(self) -> None:
        """See whether the server is there."""
        node = next(iter(self._nodes.values()))
        (reply,) = await node.call([("PING",)], None, idempotent=True)
        if isinstance(reply, ResponseError):
            raise failed(node.name, "PING", reply)

    def _routes(self, keys: Sequence[bytes]) -> list[tuple[RedisNode, Positions]]:
        """Say which server holds which keys."""
        if not self._started:
            raise StoreUnavailableError("the Redis store is not started")
        return [(next(iter(self._nodes.values())), np.arange(len(keys)))]

    async def _read(self, node: RedisNode, keys: Sequence[bytes], timeout_s: float) -> list[bytes | None]:
        (reply,) = await self._call(node, [("MGET", *keys)], timeout_s, idempotent=True)
        if isinstance(reply, ResponseError):
            raise failed(node.name, "a read", reply)
        found: list[bytes | None] = reply
        return found

    async def _call(
        self, node: RedisNode, commands: Sequence[Command], timeout_s: float | None, *, idempotent: bool
    ) -> list[Reply]:
        return await node.call(commands, timeout_s, idempotent=idempotent)

    async def _on_owners(
        self, commands: Sequence[Command], keys: Sequence[bytes], what: str = "a write"
    ) -> list[Reply]:
        """Send each command to the server that holds its key; return the replies in order.

        Raises:
            StoreUnavailableError: one of them failed.
        """
        replies: list[Reply] = [None] * len(commands)

        async def send(node: RedisNode, positions: Positions) -> None:
            found = await self._call(node, [commands[i] for i in positions], None, idempotent=False)
            for i, reply in zip(positions, found, strict=True):
                replies[i] = reply

        if commands:
            await all_done(send(node, positions) for node, positions in self._routes(keys))
        error = next((reply for reply in replies if isinstance(reply, ResponseError)), None)
        if error is not None:
            raise failed("", what, error)
        return replies

    async def ask(self, key: bytes, *command: bytes | str | int) -> Reply:
        """Send one command, of those in `redis_replies`, to the server that holds a key; return its reply.

        It may be sent a second time, on a new connection, when the first one broke.

        Raises:
            StoreUnavailableError: it failed, or answered with an error, which then is the cause.
        """
        return (await self._on_owners([command], [key], str(command[0])))[0]


async def all_done(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait for all, so that nothing is sent any more once a caller heard; raise the first failure."""
    for failure in await asyncio.gather(*work, return_exceptions=True):
        if failure is not None:
            raise failure


def failed(name: str, what: str, error: ResponseError) -> StoreUnavailableError:
    """Return what a caller is told when a server answers with an error, which becomes the cause."""
    at, told = f" at {name}" if name else "", meaning_of(error).text or "it answered with an error"
    of_a_cluster = isinstance(error, MovedError) or code_of(error) == "CROSSSLOT"
    advice = "; use redis+cluster:// for a cluster" if of_a_cluster else ""
    unavailable = StoreUnavailableError(f"Redis{at} failed {what}: {code_of(error)}, {told}{advice}")
    unavailable.__cause__ = error
    return unavailable


def _chunks(node: RedisNode, positions: Positions) -> Iterator[tuple[RedisNode, Positions]]:
    for start in range(0, len(positions), _GET_CHUNK):
        yield node, positions[start : start + _GET_CHUNK]
