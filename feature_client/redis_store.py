from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import structlog
from redis.exceptions import AskError, MovedError, ResponseError

from feature_client.redis_node import Command, RedisNode, RedisRefusedError, Reply
from feature_client.slots import SLOTS, slots_of
from feature_client.store import Change, StoreConfigError, StoreUnavailableError

_log = structlog.get_logger(__name__)

_PUT_CHUNK = 1_000
#: Keys of one MGET: larger reads go over several connections at once, so that none blocks the server for long.
_GET_CHUNK = 1_000
_SCAN_KEYS = 5_000
_UPDATE_TRIES = 20
#: The least time between two looks at a cluster's layout.
_LAYOUT_AGE_MIN_S = 0.1

#: Set a key where it still holds what was read; an absent one reads as empty, which no stored value is.
_SET_IF_UNCHANGED = (
    "if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end redis.call('SET', KEYS[1], ARGV[2]) return 1"
)

_Positions = np.ndarray


class RedisStore:
    """A store in one Redis server."""

    local = False

    def __init__(self, url: str, *, connections_max: int = 16, timeout_s: float = 1.0) -> None:
        """Remember.

        Args:
            url: `redis://[user:password@]host:port/db`, or `rediss://` for TLS; redis-py's options after `?`.
            connections_max: per server.
            timeout_s: to connect, and of calls without a budget of their own.
        """
        self._url = url
        self._connections_max = connections_max
        self._timeout_s = timeout_s
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

        async def read(node: RedisNode, positions: _Positions) -> None:
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
                    raise StoreUnavailableError(f"Redis at {node.name} failed a scan: {reply}") from reply
                cursor, keys = reply
                yield keys
                if cursor == b"0":
                    break

    def _owning_nodes(self) -> list[RedisNode]:
        return list(self._nodes.values())

    def _new_node(self, **overrides: Any) -> RedisNode:
        return RedisNode(self._url, self._connections_max, self._timeout_s, **overrides)

    async def _look(self) -> None:
        """See whether the server is there."""
        (reply,) = await next(iter(self._nodes.values())).call([("PING",)], None, idempotent=True)
        if isinstance(reply, Exception):
            raise StoreUnavailableError(f"Redis answered PING with: {reply}") from reply

    def _routes(self, keys: Sequence[bytes]) -> list[tuple[RedisNode, _Positions]]:
        """Say which server holds which keys."""
        if not self._started:
            raise StoreUnavailableError("the Redis store is not started")
        return [(next(iter(self._nodes.values())), np.arange(len(keys)))]

    async def _read(self, node: RedisNode, keys: Sequence[bytes], timeout_s: float) -> list[bytes | None]:
        (reply,) = await node.call([("MGET", *keys)], timeout_s, idempotent=True)
        if isinstance(reply, Exception):
            raise StoreUnavailableError(f"Redis at {node.name} failed a read: {reply}") from reply
        found: list[bytes | None] = reply
        return found

    async def _on_owners(self, commands: Sequence[Command], keys: Sequence[bytes]) -> list[Reply]:
        """Send each command to the server that holds its key; return the replies in order.

        Raises:
            StoreUnavailableError: one of them failed.
        """
        replies: list[Reply] = [None] * len(commands)

        async def send(node: RedisNode, positions: _Positions) -> None:
            found = await node.call([commands[i] for i in positions], None, idempotent=False)
            for i, reply in zip(positions, found, strict=True):
                replies[i] = reply

        if commands:
            await asyncio.gather(*(send(node, positions) for node, positions in self._routes(keys)))
        failed = next((reply for reply in replies if isinstance(reply, ResponseError)), None)
        if failed is not None:
            raise StoreUnavailableError(f"Redis failed a write: {failed}") from failed
        return replies


class RedisClusterStore(RedisStore):
    """A store in a Redis Cluster: each node is asked for its keys, all at once.

    Keys are spread over all slots, so a node's part of a read is a pipeline of GETs. The layout is read again when a
    node says that a slot moved, or fails.
    """

    def __init__(self, url: str, *, connections_max: int = 16, timeout_s: float = 1.0) -> None:
        super().__init__(url.replace("+cluster", "", 1), connections_max=connections_max, timeout_s=timeout_s)
        #: int16[SLOTS], positions in `_owners`.
        self._slots = np.zeros(SLOTS, np.int16)
        self._owners: list[RedisNode] = []
        self._looked_at_s = float("-inf")
        self._looking: asyncio.Task[None] | None = None

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        self._owners = []
        await super().close()

    async def multi_get(self, keys: Sequence[bytes], timeout_s: float | None = None) -> list[bytes | None]:
        if self._started and not self._owners:
            await self._look_soon(timeout_s)
        return await super().multi_get(keys, timeout_s)

    async def _look(self) -> None:
        """Learn which node holds which slots, from the first node that answers."""
        self._looked_at_s = asyncio.get_running_loop().time()
        failure: Exception = StoreUnavailableError("no Redis node is known")
        for node in list(self._nodes.values()):
            try:
                (reply,) = await node.call([("CLUSTER", "SLOTS")], None, idempotent=True)
            except StoreUnavailableError as error:
                failure = error
                continue
            if isinstance(reply, ResponseError):
                raise StoreConfigError(
                    f"Redis at {node.name} is no cluster ({reply}); use redis:// instead of redis+cluster://"
                )
            self._adopt(reply, node)
            return
        raise StoreUnavailableError(str(failure)) from failure

    def _adopt(self, ranges: list[Any], asked: RedisNode) -> None:
        slots = np.full(SLOTS, -1, np.int16)
        owners: list[RedisNode] = []
        for first, last, primary, *_ in ranges:
            host = primary[0].decode() if primary[0] else asked.name.rpartition(":")[0]
            node = self._node_at(host, int(primary[1]))
            if node not in owners:
                owners.append(node)
            slots[first : last + 1] = owners.index(node)
        if not owners:
            raise StoreUnavailableError("the cluster serves no slots yet")
        self._slots, self._owners = slots, owners

    def _node_at(self, host: str, port: int) -> RedisNode:
        name = f"{host}:{port}"
        if name not in self._nodes:
            self._nodes[name] = self._new_node(host=host, port=port)
        return self._nodes[name]

    async def _look_soon(self, timeout_s: float | None = None) -> None:
        """Read the layout, once for all who want it and not too often."""
        if self._looking is None or self._looking.done():
            wait_s = self._looked_at_s + _LAYOUT_AGE_MIN_S - asyncio.get_running_loop().time()
            if wait_s > 0 and self._owners:
                return
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(_note_failed_look)
        await asyncio.wait([self._looking], timeout=timeout_s)

    def _owning_nodes(self) -> list[RedisNode]:
        return list(self._owners)

    def _routes(self, keys: Sequence[bytes]) -> list[tuple[RedisNode, _Positions]]:
        if not self._owners:
            raise StoreUnavailableError("no node of the Redis Cluster could be reached yet")
        owners = self._slots[slots_of(keys)]
        uncovered = np.flatnonzero(owners < 0)
        if len(uncovered):
            owners[uncovered] = 0  # its answer says what is wrong
        return [(self._owners[i], np.flatnonzero(owners == i)) for i in np.unique(owners)]

    async def _read(self, node: RedisNode, keys: Sequence[bytes], timeout_s: float) -> list[bytes | None]:
        ends_s = asyncio.get_running_loop().time() + timeout_s
        try:
            replies = await node.call([("GET", key) for key in keys], timeout_s, idempotent=True)
        except StoreUnavailableError:
            self._look_in_background()
            raise
        failed = [i for i, reply in enumerate(replies) if isinstance(reply, ResponseError)]
        if not failed:
            return replies
        if any(isinstance(replies[i], MovedError) for i in failed):
            await self._look_soon(max(0.0, ends_s - asyncio.get_running_loop().time()))
        for i in failed:
            left_s = ends_s - asyncio.get_running_loop().time()
            replies[i] = await self._follow(replies[i], keys[i], left_s)
        return replies

    async def _follow(self, redirect: ResponseError, key: bytes, timeout_s: float) -> bytes | None:
        """Ask the node that a redirect names."""
        if not isinstance(redirect, AskError):  # a MovedError is one too
            raise StoreUnavailableError(f"Redis failed a read: {redirect}") from redirect
        moved = isinstance(redirect, MovedError)
        commands: list[Command] = [("GET", key)] if moved else [("ASKING",), ("GET", key)]
        node = self._node_at(redirect.host, redirect.port)
        reply = (await node.call(commands, timeout_s, idempotent=True))[-1]
        if isinstance(reply, ResponseError):
            raise StoreUnavailableError(f"Redis failed a read twice: {reply}") from reply
        value: bytes | None = reply
        return value

    async def _put(self, chunk: Sequence[tuple[bytes, bytes]]) -> None:
        await self._on_owners([("SET", key, value) for key, value in chunk], [key for key, _ in chunk])

    async def _on_owners(self, commands: Sequence[Command], keys: Sequence[bytes]) -> list[Reply]:
        if self._started and not self._owners:
            await self._look_soon()
        try:
            return await super()._on_owners(commands, keys)
        except StoreUnavailableError as error:
            if not isinstance(error.__cause__, MovedError):
                self._look_in_background()
                raise
        # What was written before is written again: these commands may be.
        await self._look_soon()
        return await super()._on_owners(commands, keys)

    def _look_in_background(self) -> None:
        soon = asyncio.get_running_loop().create_task(self._look_soon())
        _background.add(soon)
        soon.add_done_callback(_background.discard)


#: The event loop keeps only weak references to tasks.
_background: set[asyncio.Task[None]] = set()


def _note_failed_look(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.warning("redis_cluster_layout_unknown", error=str(error))


def _chunks(node: RedisNode, positions: _Positions) -> Iterator[tuple[RedisNode, _Positions]]:
    for start in range(0, len(positions), _GET_CHUNK):
        yield node, positions[start : start + _GET_CHUNK]
