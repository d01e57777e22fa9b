from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import structlog
from redis.exceptions import AskError, ClusterDownError, MovedError, ResponseError

from feature_client.stores.redis.node import AGE_MAX_S, RedisNode
from feature_client.stores.redis.replies import Command, code_of
from feature_client.stores.redis.resp import Reply
from feature_client.stores.redis.slots import SLOTS, slots_of
from feature_client.stores.redis.store import Positions, RedisStore, all_done, failed
from feature_client.stores.store import StoreConfigError, StoreError, StoreUnavailableError

_log = structlog.get_logger(__name__)

#: The least time between two looks at a cluster's layout.
_LAYOUT_AGE_MIN_S = 0.1
#: Primaries of a layout: Redis Cluster's own bound.
_PRIMARIES_MAX = 1_000
#: Nodes that redirects may name beyond the layout, until it is read again.
_STRANGERS_MAX = 16


class RedisClusterStore(RedisStore):
    """A store in a Redis Cluster: each node is asked for its keys, all at once.

    Keys are spread over all slots, so a node's part of a read is a pipeline of GETs. Redirects are followed. The layout
    is read again when a node redirects or fails, and when it is old; the URL's node, whose name is looked up anew, is
    the first to be asked for it.
    """

    def __init__(
        self, url: str, *, connections_max: int = 16, timeout_s: float = 1.0, age_max_s: float = AGE_MAX_S
    ) -> None:
        """Remember; arguments as of RedisStore. A layout is read again after `age_max_s` too."""
        url = url.replace("+cluster", "", 1)
        super().__init__(url, connections_max=connections_max, timeout_s=timeout_s, age_max_s=age_max_s)
        #: int16[SLOTS], positions in `_owners`.
        self._slots = np.zeros(SLOTS, np.int16)
        self._owners: list[RedisNode] = []
        self._looked_at_s = float("-inf")
        self._looking: asyncio.Task[None] | None = None
        self._last_look_failed = False

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        self._owners = []
        await super().close()

    async def multi_get(self, keys: Sequence[bytes], timeout_s: float | None = None) -> list[bytes | None]:
        await self._know_layout(timeout_s)
        return await super().multi_get(keys, timeout_s)

    async def _put(self, chunk: Sequence[tuple[bytes, bytes]]) -> None:
        await self._on_owners([("SET", key, value) for key, value in chunk], [key for key, _ in chunk])

    async def _on_owners(
        self, commands: Sequence[Command], keys: Sequence[bytes], what: str = "a write"
    ) -> list[Reply]:
        await self._know_layout(None)
        return await super()._on_owners(commands, keys, what)

    async def _know_layout(self, timeout_s: float | None) -> None:
        """Wait for a layout where there is none; see to it that it does not become old."""
        if self._started and not self._owners:
            await asyncio.wait([self._look_again()], timeout=timeout_s)
        elif self._started and asyncio.get_running_loop().time() - self._looked_at_s > self._age_max_s:
            self._look_again()

    def _look_again(self) -> asyncio.Task[None]:
        """Read the layout in the background, once for all who want it and not too often."""
        loop = asyncio.get_running_loop()
        lately = self._owners and loop.time() < self._looked_at_s + _LAYOUT_AGE_MIN_S
        if self._looking is None or (self._looking.done() and not lately):
            self._looking = loop.create_task(self._look())
            self._looking.add_done_callback(self._note_look)
        return self._looking

    async def _look(self) -> None:
        """Learn which node holds which slots, from the first node that tells."""
        self._looked_at_s = asyncio.get_running_loop().time()
        failure: StoreError = StoreUnavailableError("no Redis node is known")
        for node in list(self._nodes.values()):
            try:
                (reply,) = await node.call([("CLUSTER", "SLOTS")], None, idempotent=True)
                if isinstance(reply, ResponseError):
                    raise StoreConfigError(
                        f"Redis at {node.name} is no cluster ({reply}); use redis:// instead of redis+cluster://"
                    )
                self._adopt(reply, node)
            except StoreError as error:
                failure = error
            else:
                await self._forget_others()
                return
        raise failure

    def _note_look(self, looked: asyncio.Task[None]) -> None:
        """Log the first look that fails and the first that does not: an outage has many, as every read wants one."""
        if looked.cancelled():
            return
        error = looked.exception()
        if error is not None and not self._last_look_failed:
            _log.warning("redis_cluster_layout_unknown", error=str(error))
        elif error is None and self._last_look_failed:
            _log.info("redis_cluster_layout_known", nodes=len(self._owners))
        self._last_look_failed = error is not None

    def _new_node(self, **overrides: Any) -> RedisNode:
        node = super()._new_node(**overrides)
        if node.db:
            raise StoreConfigError("the Redis URL cannot be used: a cluster has no database but 0")
        return node

    def _adopt(self, ranges: list[Any], asked: RedisNode) -> None:
        slots = np.full(SLOTS, -1, np.int16)
        positions: dict[tuple[str, int], int] = {}
        for first, last, (host, port, *_), *_ in ranges:
            primary = (host.decode() if host else asked.host, port)
            slots[first : last + 1] = positions.setdefault(primary, len(positions))
        if not 0 < len(positions) <= _PRIMARIES_MAX:
            raise StoreUnavailableError(f"Redis at {asked.name} names {len(positions)} nodes that serve slots")
        self._slots, self._owners = slots, [self._node_at(*primary) for primary in positions]

    def _node_at(self, host: str, port: int) -> RedisNode:
        name = f"{host}:{port}"
        if name not in self._nodes:
            self._nodes[name] = self._new_node(host=host, port=port)
        return self._nodes[name]

    def _stranger_at(self, host: str, port: int) -> RedisNode:
        """Return the node that a redirect names, which the layout need not know yet."""
        if f"{host}:{port}" not in self._nodes and len(self._nodes) > len(self._owners) + _STRANGERS_MAX:
            raise StoreUnavailableError("the Redis Cluster redirects to ever more nodes")
        return self._node_at(host, port)

    async def _forget_others(self) -> None:
        """Close nodes that the layout does not name any more, but for the URL's."""
        for name in list(self._nodes)[1:]:
            if self._nodes[name] not in self._owners:
                await self._nodes.pop(name).close()

    def _owning_nodes(self) -> list[RedisNode]:
        return list(self._owners)

    def _routes(self, keys: Sequence[bytes]) -> list[tuple[RedisNode, Positions]]:
        if not self._owners:
            raise StoreUnavailableError("no node of the Redis Cluster could be reached yet")
        owners = self._slots[slots_of(keys)]
        uncovered = np.flatnonzero(owners < 0)
        if len(uncovered):
            owners[uncovered] = 0  # its answer says what is wrong
        return [(self._owners[i], np.flatnonzero(owners == i)) for i in np.unique(owners)]

    async def _read(self, node: RedisNode, keys: Sequence[bytes], timeout_s: float) -> list[bytes | None]:
        replies = await self._call(node, [("GET", key) for key in keys], timeout_s, idempotent=True)
        for i, reply in enumerate(replies):
            if isinstance(reply, ResponseError):
                if code_of(reply) != "WRONGTYPE":
                    raise failed(node.name, "a read", reply)
                replies[i] = None  # as in an MGET
        return replies

    async def _call(
        self, node: RedisNode, commands: Sequence[Command], timeout_s: float | None, *, idempotent: bool
    ) -> list[Reply]:
        """Send commands to a node, and those that it redirects to where it says."""
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        try:
            replies = await node.call(commands, timeout_s, idempotent=idempotent)
        except StoreUnavailableError:
            self._look_again()
            raise
        elsewhere: dict[tuple[str, int, bool], list[int]] = {}
        for i, reply in enumerate(replies):
            if isinstance(reply, AskError):  # a MovedError is one too
                asking = not isinstance(reply, MovedError)
                elsewhere.setdefault((reply.host or node.host, reply.port, asking), []).append(i)
            elif isinstance(reply, ClusterDownError):
                self._look_again()

        async def send(host: str, port: int, asking: bool, positions: list[int]) -> None:
            left_s = None if timeout_s is None else max(0.0, timeout_s - (loop.time() - start_s))
            again = [c for i in positions for c in ((("ASKING",), commands[i]) if asking else (commands[i],))]
            found = await self._stranger_at(host, port).call(again, left_s, idempotent=idempotent)
            for i, reply in zip(positions, found[asking :: 1 + asking], strict=True):
                replies[i] = reply

        if elsewhere:
            self._look_again()
            await all_done(send(*to, positions) for to, positions in elsewhere.items())
        return replies
