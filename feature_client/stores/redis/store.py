"""The Redis store: it sends its commands to the nodes that its topology names."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import partial

import structlog
from redis.exceptions import ResponseError

from feature_client.stores.redis.answers import GetMany
from feature_client.stores.redis.cluster import Cluster
from feature_client.stores.redis.node import AGE_MAX_S, RedisNode, RedisRefusedError
from feature_client.stores.redis.replies import Command, code_of, failure_of
from feature_client.stores.redis.resp import Reply
from feature_client.stores.redis.topology import Positions, SingleServer, Topology, all_done
from feature_client.stores.store import Change, StoreConfigError, StoreUnavailableError

_log = structlog.get_logger(__name__)

#: The time limit of calls that set none of their own: long enough for a server that pauses or is busy.
TIMEOUT_S = 10.0
_PUT_CHUNK = 1_000
#: The maximum number of keys per MGET. Larger reads use several connections so that none blocks the server for long.
_GET_CHUNK = 1_000
_SCAN_KEYS = 5_000
_UPDATE_TRIES = 20

#: Sets a key if it still has the value that was read. An absent key counts as empty; no stored value is empty. A SET
#: without PX also removes the end that the value had.
_SET_IF_UNCHANGED, _SET_IF_UNCHANGED_UNTIL = (
    "if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end "
    f"redis.call('SET', KEYS[1], ARGV[2]{options}) return 1"
    for options in ("", ", 'PX', ARGV[3]")
)


class RedisStore:
    """A store in a single Redis server or a Redis Cluster. Its topology knows which node serves which key."""

    local = False

    def __init__(
        self, url: str, *, connections_max: int = 16, timeout_s: float = TIMEOUT_S, age_max_s: float = AGE_MAX_S
    ) -> None:
        """Prepare a store; `start` connects it.

        Args:
            url: `redis://[user:password@]host:port/db`, or `redis+cluster://[user:password@]host:port` with any node
                of a cluster. Use `rediss` for TLS. Options of redis-py can follow after `?`.
            connections_max: the maximum number of connections per node.
            timeout_s: the time limit of calls that set none of their own.
            age_max_s: the age at which a connection is replaced by a new one, for which the host name is resolved
                again, and at which the layout of a cluster is read again.
        """
        scheme, separator, rest = url.partition("://")
        node_url = scheme.removesuffix("+cluster") + separator + rest
        new_node = partial(RedisNode, node_url, connections_max, timeout_s, age_max_s)
        self._topology: Topology = Cluster(new_node, age_max_s) if node_url != url else SingleServer(new_node)
        self._timeout_s = timeout_s

    @property
    def nodes(self) -> Mapping[str, RedisNode]:
        """The nodes by `host:port`; none if the store is not started."""
        return self._topology.nodes

    async def start(self) -> None:
        """Open the connection pools. The store also starts if a server is down; reads raise until it is up."""
        try:
            await self._topology.start()
        except RedisRefusedError as error:
            await self.close()
            raise StoreConfigError(str(error)) from error
        except StoreConfigError:
            await self.close()
            raise
        except StoreUnavailableError as error:
            _log.warning("feature_store_down_at_start", error=str(error))

    async def close(self) -> None:
        await self._topology.close()

    async def multi_get(self, keys: Sequence[bytes], timeout_s: float | None = None) -> Sequence[bytes | None]:
        if not keys:
            return []
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        await self._topology.ready(timeout_s)
        # A call without a time limit waits for the layout until every node was asked.
        ends_s = loop.time() + self._timeout_s if timeout_s is None else start_s + timeout_s
        if self._topology.many_keys and len(keys) <= _GET_CHUNK:
            return await self._get_many(self._topology.primaries()[0], keys, ends_s - loop.time())
        keys = list(keys)
        routes = [part for route in self._topology.routes(keys) for part in _chunks(*route)]
        values: list[bytes | None] = [None] * len(keys)
        failures: list[str] = []
        lost: list[int] = []

        async def read(node: RedisNode, positions: Positions) -> None:
            try:
                found = await self._read(node, [keys[i] for i in positions], ends_s - loop.time())
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

    async def _read(self, node: RedisNode, keys: Sequence[bytes], timeout_s: float) -> Sequence[bytes | None]:
        """Read keys that one node serves. A key that holds another type than a string counts as absent."""
        if self._topology.many_keys:
            return await self._get_many(node, keys, timeout_s)
        replies = await self._topology.call(node, [("GET", key) for key in keys], timeout_s, idempotent=True)
        for i, reply in enumerate(replies):
            if isinstance(reply, ResponseError):
                if code_of(reply) != "WRONGTYPE":
                    raise failure_of(reply, "a read", node.name)
                replies[i] = None  # MGET does the same
        return replies

    async def _get_many(self, node: RedisNode, keys: Sequence[bytes], timeout_s: float) -> Sequence[bytes | None]:
        (reply,) = await node.ask(GetMany(keys), timeout_s, idempotent=True)
        if isinstance(reply, ResponseError):
            raise failure_of(reply, "a read", node.name)
        values: Sequence[bytes | None] = reply
        return values

    async def multi_put(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        written = 0
        remaining = iter(items)
        while chunk := list(itertools.islice(remaining, _PUT_CHUNK)):
            await self._put(chunk)
            written += len(chunk)
        return written

    async def _put(self, chunk: Sequence[tuple[bytes, bytes]]) -> None:
        if self._topology.many_keys:
            # One command with many keys is faster than many commands with one key.
            await self._on_owners([("MSET", *itertools.chain.from_iterable(chunk))], [chunk[0][0]])
        else:
            await self._on_owners([("SET", key, value) for key, value in chunk], [key for key, _ in chunk])

    async def update(self, keys: Sequence[bytes], change: Change, lasts_s: float | None = None) -> None:
        left = list(range(len(keys)))
        script = _SET_IF_UNCHANGED if lasts_s is None else _SET_IF_UNCHANGED_UNTIL
        ends: tuple[int, ...] = () if lasts_s is None else (max(1, round(lasts_s * 1e3)),)
        for _ in range(_UPDATE_TRIES):
            before = await self.multi_get([keys[i] for i in left])
            after = change(left, before)
            changes: list[tuple[int, Command]] = [
                (i, ("EVAL", script, 1, keys[i], old or b"", new, *ends))
                for i, old, new in zip(left, before, after, strict=True)
                if new is not None and new != old
            ]
            replies = await self._on_owners([command for _, command in changes], [keys[i] for i, _ in changes])
            left = [i for (i, _), done in zip(changes, replies, strict=True) if not done]
            if not left:
                return
        raise StoreUnavailableError(
            f"{len(left)} keys were changed by other writers {_UPDATE_TRIES} times in a row; try again", lost=left
        )

    async def scan(self) -> AsyncIterator[list[bytes]]:
        await self._topology.ready(None)
        for node in self._topology.primaries():
            cursor: bytes = b"0"
            while True:
                (reply,) = await node.call([("SCAN", cursor, "COUNT", _SCAN_KEYS)], None, idempotent=True)
                if isinstance(reply, ResponseError):
                    raise failure_of(reply, "a scan", node.name)
                cursor, keys = reply
                yield keys
                if cursor == b"0":
                    break

    async def count(self) -> int:
        await self._topology.ready(None)
        found = 0
        for node in self._topology.primaries():
            (reply,) = await node.call([("DBSIZE",)], None, idempotent=True)
            if isinstance(reply, ResponseError):
                raise failure_of(reply, "a count", node.name)
            found += int(reply)
        return found

    async def _on_owners(
        self, commands: Sequence[Command], keys: Sequence[bytes], what: str = "a write"
    ) -> list[Reply]:
        """Send each command to the node that serves its key; return the replies in order.

        Raises:
            StoreUnavailableError: a command failed.
        """
        replies: list[Reply] = [None] * len(commands)

        async def send(node: RedisNode, positions: Positions) -> None:
            found = await self._topology.call(node, [commands[i] for i in positions], None, idempotent=False)
            for i, reply in zip(positions, found, strict=True):
                replies[i] = reply

        if commands:
            await self._topology.ready(None)
            await all_done(send(node, positions) for node, positions in self._topology.routes(keys))
        error = next((reply for reply in replies if isinstance(reply, ResponseError)), None)
        if error is not None:
            raise failure_of(error, what)
        return replies

    async def ask(self, key: bytes, *command: bytes | str | int) -> Reply:
        """Send one command to the node that serves a key; return its reply. `replies.py` lists the commands.

        If the connection breaks, the command is sent once more on a new connection.

        Raises:
            StoreUnavailableError: the command failed. If the node answered with an error, that error is the cause.
        """
        return (await self._on_owners([command], [key], str(command[0])))[0]


def _chunks(node: RedisNode, positions: Positions) -> Iterator[tuple[RedisNode, Positions]]:
    for start in range(0, len(positions), _GET_CHUNK):
        yield node, positions[start : start + _GET_CHUNK]
