"""The topology of a Redis Cluster: the table of slots, followed through moves, failovers and changes of layout."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import structlog
from redis.exceptions import AskError, ClusterDownError, MovedError, ResponseError

from feature_client.stores.redis.node import CONNECT_TIMEOUT_S, RedisNode
from feature_client.stores.redis.replies import Command
from feature_client.stores.redis.resp import Reply
from feature_client.stores.redis.slots import SLOTS, slots_of
from feature_client.stores.redis.topology import NewNode, Positions, all_done
from feature_client.stores.store import StoreConfigError, StoreError, StoreUnavailableError

_log = structlog.get_logger(__name__)

#: The minimum time between two reads of the layout.
_LAYOUT_AGE_MIN_S = 0.1
#: The maximum number of primaries in a layout. Redis Cluster has the same limit.
_PRIMARIES_MAX = 1_000
#: How many nodes outside the layout redirects may name before the layout is read again.
_STRANGERS_MAX = 16


class Cluster:
    """A Redis Cluster. Every node is asked for its own keys, all nodes at the same time.

    Keys are spread over all slots, so each node answers its part of a read as a pipeline of GETs. Redirects are
    followed. The layout (which node serves which slots) is read again when a node redirects or fails, and when it is
    old. The node that the URL names is asked first, because its host name is resolved again.
    """

    many_keys = False

    def __init__(self, new_node: NewNode, age_max_s: float) -> None:
        """Prepare a topology whose layout is read again after `age_max_s` seconds."""
        self._new_node = new_node
        self._age_max_s = age_max_s
        #: By `host:port`; the node that the URL names is the first.
        self._nodes: dict[str, RedisNode] = {}
        #: int16[SLOTS], the position in `_owners` of the node that serves each slot; -1 if none does.
        self._slots = np.zeros(SLOTS, np.int16)
        self._owners: list[RedisNode] = []
        self._looked_at_s = float("-inf")
        self._looking: asyncio.Task[None] | None = None
        self._last_look_failed = False

    @property
    def nodes(self) -> Mapping[str, RedisNode]:
        return self._nodes

    async def start(self) -> None:
        first = self._new_node()
        if first.db:
            raise StoreConfigError(
                "the Redis URL cannot be used: a cluster only has database 0; remove the number from the URL"
            )
        self._nodes = {first.name: first}
        await self._look()

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        self._owners = []
        nodes, self._nodes = self._nodes, {}
        for node in nodes.values():
            await node.close()

    async def ready(self, timeout_s: float | None) -> None:
        """Wait for a layout if there is none, and refresh an old one in the background."""
        if not self._nodes:  # not started
            return
        if not self._owners:
            await asyncio.wait([self._look_again()], timeout=timeout_s)
        elif asyncio.get_running_loop().time() - self._looked_at_s > self._age_max_s:
            self._look_again()

    def _look_again(self) -> asyncio.Task[None]:
        """Read the layout in the background. All callers share one read, and reads are at least 0.1 s apart."""
        loop = asyncio.get_running_loop()
        lately = self._owners and loop.time() < self._looked_at_s + _LAYOUT_AGE_MIN_S
        if self._looking is None or (self._looking.done() and not lately):
            self._looking = loop.create_task(self._look())
            self._looking.add_done_callback(self._note_look)
        return self._looking

    async def _look(self) -> None:
        """Read the layout from the first node that answers."""
        self._looked_at_s = asyncio.get_running_loop().time()
        failure: StoreError = StoreUnavailableError("no Redis node is known")
        for node in list(self._nodes.values()):
            try:
                (reply,) = await node.call([("CLUSTER", "SLOTS")], CONNECT_TIMEOUT_S, idempotent=True)
                if isinstance(reply, ResponseError):
                    raise StoreConfigError(
                        f"Redis at {node.name} is not a cluster ({reply}); use redis:// instead of redis+cluster://"
                    )
                self._adopt(reply, node)
            except StoreError as error:
                failure = error
            else:
                await self._forget_others()
                return
        raise failure

    def _note_look(self, looked: asyncio.Task[None]) -> None:
        """Log the first failed read of the layout and the first success after it; an outage has many failed reads."""
        if looked.cancelled():
            return
        error = looked.exception()
        if error is not None and not self._last_look_failed:
            _log.warning("redis_cluster_layout_unknown", error=str(error))
        elif error is None and self._last_look_failed:
            _log.info("redis_cluster_layout_known", nodes=len(self._owners))
        self._last_look_failed = error is not None

    def _adopt(self, ranges: list[Any], asked: RedisNode) -> None:
        slots = np.full(SLOTS, -1, np.int16)
        positions: dict[tuple[str, int], int] = {}
        for first, last, (host, port, *_), *_ in ranges:
            primary = (host.decode() if host else asked.host, port)
            slots[first : last + 1] = positions.setdefault(primary, len(positions))
        if not 0 < len(positions) <= _PRIMARIES_MAX:
            raise StoreUnavailableError(
                f"Redis at {asked.name} reports a layout of {len(positions)} nodes, expected 1 to {_PRIMARIES_MAX}"
            )
        self._slots, self._owners = slots, [self._node_at(*primary) for primary in positions]

    def _node_at(self, host: str, port: int) -> RedisNode:
        name = f"{host}:{port}"
        if name not in self._nodes:
            self._nodes[name] = self._new_node(host=host, port=port)
        return self._nodes[name]

    def _stranger_at(self, host: str, port: int) -> RedisNode:
        """Return the node that a redirect names, which the layout may not contain yet."""
        if f"{host}:{port}" not in self._nodes and len(self._nodes) > len(self._owners) + _STRANGERS_MAX:
            raise StoreUnavailableError(
                "the Redis Cluster redirects to ever more nodes; check its configuration (CLUSTER SLOTS)"
            )
        return self._node_at(host, port)

    async def _forget_others(self) -> None:
        """Close the nodes that the layout does not contain any more, except the node that the URL names."""
        for name in list(self._nodes)[1:]:
            if self._nodes[name] not in self._owners:
                await self._nodes.pop(name).close()

    def primaries(self) -> list[RedisNode]:
        if not self._nodes:
            raise StoreUnavailableError("the Redis store is not started")
        if not self._owners:
            raise StoreUnavailableError("no node of the Redis Cluster has been reached yet")
        return list(self._owners)

    def routes(self, keys: Sequence[bytes]) -> list[tuple[RedisNode, Positions]]:
        primaries = self.primaries()
        owners = self._slots[slots_of(keys)]
        uncovered = np.flatnonzero(owners < 0)
        if len(uncovered):
            owners[uncovered] = 0  # the error that it answers says what is wrong
        return [(primaries[i], np.flatnonzero(owners == i)) for i in np.unique(owners)]

    async def call(
        self, node: RedisNode, commands: Sequence[Command], timeout_s: float | None, *, idempotent: bool
    ) -> list[Reply]:
        """Send commands to a node, and send those that it redirects to the nodes that it names."""
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
