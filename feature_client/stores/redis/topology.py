"""The contract that maps the keys of a Redis store to nodes, and its simple implementation: a single server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from redis.exceptions import ResponseError

from feature_client.stores.redis.node import CONNECT_TIMEOUT_S, RedisNode
from feature_client.stores.redis.replies import Command, failure_of
from feature_client.stores.redis.resp import Reply
from feature_client.stores.store import StoreUnavailableError

#: int64[N], positions in a list of keys.
Positions = np.ndarray
#: Creates a node from the store's URL. Keyword arguments such as `host` and `port` override the URL.
NewNode = Callable[..., RedisNode]


class Topology(Protocol):
    """Knows which node serves which key. It has nodes only between `start` and `close`.

    Attributes:
        many_keys: whether one command may name any keys. Nodes of a cluster refuse keys of different slots.
    """

    many_keys: bool

    @property
    def nodes(self) -> Mapping[str, RedisNode]:
        """The nodes by `host:port`; the node that the URL names is the first."""

    async def start(self) -> None:
        """Create the node that the URL names, and contact it.

        Raises:
            StoreConfigError: the URL cannot be used.
            StoreUnavailableError: no node answers. The topology is started all the same.
        """

    async def close(self) -> None:
        """Close all nodes."""

    async def ready(self, timeout_s: float | None) -> None:
        """Wait until the layout is known, but not longer than `timeout_s`; None waits until every node was asked."""

    def primaries(self) -> list[RedisNode]:
        """Return the nodes that together hold every key. Raises StoreUnavailableError if they are not known."""

    def routes(self, keys: Sequence[bytes]) -> list[tuple[RedisNode, Positions]]:
        """Return each node with the positions of its keys. Raises StoreUnavailableError if they are not known."""

    async def call(
        self, node: RedisNode, commands: Sequence[Command], timeout_s: float | None, *, idempotent: bool
    ) -> list[Reply]:
        """Send commands to a node and follow its redirects. Arguments and errors are those of `RedisNode.call`."""


class SingleServer:
    """A single Redis server, which holds every key."""

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
        (reply,) = await node.call([("PING",)], CONNECT_TIMEOUT_S, idempotent=True)
        if isinstance(reply, ResponseError):
            raise failure_of(reply, "PING", node.name)

    async def close(self) -> None:
        nodes, self._nodes = self._nodes, {}
        for node in nodes.values():
            await node.close()

    async def ready(self, timeout_s: float | None) -> None:
        """Return immediately, because a single server has no layout."""

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
    """Wait for all, then raise the first failure. Nothing is sent any more once the caller hears of it."""
    for failure in await asyncio.gather(*work, return_exceptions=True):
        if failure is not None:
            raise failure
