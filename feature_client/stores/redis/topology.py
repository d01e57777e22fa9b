"""The contract for where a Redis store keeps its keys, and the simple case: one server (`cluster.py` is the other)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from redis.exceptions import ResponseError

from feature_client.stores.redis.node import RedisNode
from feature_client.stores.redis.replies import Command, failure_of
from feature_client.stores.redis.resp import Reply
from feature_client.stores.store import StoreUnavailableError

#: int64[N], positions of keys.
Positions = np.ndarray
#: Makes a node from the store's URL; keyword arguments such as `host` and `port` replace what the URL says.
NewNode = Callable[..., RedisNode]


class Topology(Protocol):
    """Knows which node serves which key. It has no nodes until it is started, and none after it is closed.

    Attributes:
        many_keys: whether one command may name many keys; the nodes of a cluster refuse keys of several slots.
    """

    many_keys: bool

    @property
    def nodes(self) -> Mapping[str, RedisNode]:
        """The nodes by host:port; the node of the URL is the first."""

    async def start(self) -> None:
        """Make the node of the URL and ask it.

        Raises:
            StoreConfigError: the URL cannot be used.
            StoreUnavailableError: no node answers; the topology is started all the same.
        """

    async def close(self) -> None:
        """Close all nodes."""

    async def ready(self, timeout_s: float | None) -> None:
        """Wait until the layout is known or the time is up; `None` waits until the nodes were asked."""

    def primaries(self) -> list[RedisNode]:
        """Return the nodes that together hold every key. Raises StoreUnavailableError while they are not known."""

    def routes(self, keys: Sequence[bytes]) -> list[tuple[RedisNode, Positions]]:
        """Return each node with the positions of its keys. Raises StoreUnavailableError while they are not known."""

    async def call(
        self, node: RedisNode, commands: Sequence[Command], timeout_s: float | None, *, idempotent: bool
    ) -> list[Reply]:
        """Send commands to a node, or where it redirects them to; arguments and errors as of `RedisNode.call`."""


class SingleServer:
    """One Redis server that holds every key."""

    many_keys = True

    def __init__(self, new_node: NewNode) -> None:
        self._new_node = new_node
        self._nodes: dict[str, RedisNode] = {}

    @property
    def nodes(self) -> Mapping[str, RedisNode]:
        return self._nodes

    async def start(self) -> None:
        node = self._new_node()
        self._nodes = {node.name: node}
        (reply,) = await node.call([("PING",)], None, idempotent=True)
        if isinstance(reply, ResponseError):
            raise failure_of(reply, "PING", node.name)

    async def close(self) -> None:
        nodes, self._nodes = self._nodes, {}
        for node in nodes.values():
            await node.close()

    async def ready(self, timeout_s: float | None) -> None:
        """Return at once: there is no layout."""

    def primaries(self) -> list[RedisNode]:
        if not self._nodes:
            raise StoreUnavailableError("the Redis store is not started")
        return list(self._nodes.values())

    def routes(self, keys: Sequence[bytes]) -> list[tuple[RedisNode, Positions]]:
        (node,) = self.primaries()
        return [(node, np.arange(len(keys)))]

    async def call(
        self, node: RedisNode, commands: Sequence[Command], timeout_s: float | None, *, idempotent: bool
    ) -> list[Reply]:
        return await node.call(commands, timeout_s, idempotent=idempotent)


async def all_done(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait for all, so that nothing is sent any more once a caller heard; raise the first failure."""
    for failure in await asyncio.gather(*work, return_exceptions=True):
        if failure is not None:
            raise failure
