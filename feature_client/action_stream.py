"""Actions from a Redis stream into users' stored sequences, for producers other than our RPC.

An entry has the fields of `pinrank.v1.Action` by name, numbers as decimal text. Entries are acknowledged after they
were folded; one that is read again after a crash changes nothing, as folding knows its event id.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import structlog

from feature_client.activity import Outcome, write_events
from feature_client.groups import SequenceGroup
from feature_client.redis_cluster import RedisClusterStore
from feature_client.redis_store import RedisStore
from feature_client.resp import Reply
from feature_client.store import Store, StoreError, StoreUnavailableError

_log = structlog.get_logger(__name__)

#: How long one read waits for new entries.
_BLOCK_MS = 200
#: How long any command may take.
_TIMEOUT_S = 5.0
#: Entries that a follower read and did not acknowledge for so long are another's to take.
_ABANDONED_MS = 5_000
_PAUSE_FIRST_S, _PAUSE_MAX_S = 0.1, 5.0

_Entry = tuple[bytes, Mapping[bytes, bytes]]


@dataclass(slots=True)
class FollowerCounts:
    """Since the start, in entries."""

    added: int = 0
    repeated: int = 0
    too_old: int = 0
    #: Moved to the stream's `:refused` neighbour, as they are no actions of the group.
    refused: int = 0


class StreamFollower:
    """A member of a stream's consumer group. Any number may share the work; one that dies loses nothing."""

    def __init__(
        self,
        url: str,
        stream: str,
        consumer_group: str,
        name: str,
        store: Store,
        group: SequenceGroup,
        batch: int = 256,
    ) -> None:
        """Remember.

        Args:
            url: the stream's Redis: `redis://` or `redis+cluster://`.
            stream: its key.
            consumer_group: made at the stream's start when it is not there.
            name: of this member; a new one with an old name takes its unacknowledged entries over.
            store: a started store that holds the sequences.
            group: whose sequences.
            batch: entries read at once.
        """
        of = RedisClusterStore if "+cluster" in url.partition("://")[0] else RedisStore
        self._server = of(url, timeout_s=_TIMEOUT_S)
        self._stream, self._consumer_group, self._name = stream, consumer_group, name
        self._store, self._group, self._batch = store, group, batch
        self._actions = {action.encode(): i for i, action in enumerate(group.actions)}
        self._surfaces = {surface.encode(): i for i, surface in enumerate(group.surfaces)}
        self.counts = FollowerCounts()

    async def follow(self, stop: asyncio.Event) -> None:
        """Fold what comes until `stop` is set; while Redis or the store is away, wait and try again.

        Raises:
            StoreConfigError: the stream's URL cannot be used, or Redis refuses its user or password.
        """
        pause_s, joined, abandoned_at_s = _PAUSE_FIRST_S, False, 0.0
        loop = asyncio.get_running_loop()
        try:
            await self._server.start()
            while not stop.is_set():
                try:
                    if not joined:
                        await self._join()
                        await self._fold(await self._own_unacknowledged())
                        joined = True
                    if loop.time() >= abandoned_at_s:
                        await self._fold(await self._abandoned())
                        abandoned_at_s = loop.time() + _ABANDONED_MS / 1e3
                    await self._fold(await self._new())
                    pause_s = _PAUSE_FIRST_S
                except StoreError as error:
                    _log.warning("action_stream_interrupted", error=str(error), pause_s=pause_s)
                    joined = False
                    try:
                        async with asyncio.timeout(pause_s * random.uniform(0.5, 1.5)):
                            await stop.wait()
                    except TimeoutError:
                        pause_s = min(2 * pause_s, _PAUSE_MAX_S)
        finally:
            await self._server.close()

    async def _ask(self, *command: bytes | str | int, key: str | None = None) -> Reply:
        """Send a command of the stream's, or of another key's, to the server that holds it."""
        return await self._server.ask((key or self._stream).encode(), *command)

    async def _join(self) -> None:
        if not self._server.nodes:
            await self._server.start()
        try:
            await self._ask("XGROUP", "CREATE", self._stream, self._consumer_group, "0", "MKSTREAM")
        except StoreUnavailableError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _read(self, start: str, block_ms: int | None) -> list[_Entry]:
        block: tuple[str | int, ...] = () if block_ms is None else ("BLOCK", block_ms)
        reply = await self._ask(
            "XREADGROUP", "GROUP", self._consumer_group, self._name, "COUNT", self._batch, *block,
            "STREAMS", self._stream, start,
        )  # fmt: skip
        return [_entry(found) for _, entries in reply or () for found in entries]

    async def _own_unacknowledged(self) -> list[_Entry]:
        found: list[_Entry] = []
        start = "0"
        while entries := await self._read(start, None):
            found += entries
            start = entries[-1][0].decode()
        return found

    async def _abandoned(self) -> list[_Entry]:
        reply = await self._ask(
            "XAUTOCLAIM", self._stream, self._consumer_group, self._name, _ABANDONED_MS, "0-0", "COUNT", self._batch
        )
        return [_entry(found) for found in reply[1] if found is not None]

    async def _new(self) -> list[_Entry]:
        return await self._read(">", _BLOCK_MS)

    async def _fold(self, entries: list[_Entry]) -> None:
        for start in range(0, len(entries), self._batch):
            await self._fold_batch(entries[start : start + self._batch])

    async def _fold_batch(self, entries: list[_Entry]) -> None:
        users, events = [], []
        refused: list[tuple[_Entry, str]] = []
        for entry in entries:
            try:
                user, event = self._parse(entry[1])
            except (KeyError, ValueError, OverflowError) as error:
                refused.append((entry, f"{type(error).__name__}: {error}"))
            else:
                users.append(user)
                events.append(event)
        if events:
            outcome = await write_events(
                self._store, self._group, np.array(users, np.uint64), np.array(events, SequenceGroup.dtype)
            )
            added, repeated, too_old = np.bincount(outcome, minlength=len(Outcome)).tolist()
            self.counts.added += added
            self.counts.repeated += repeated
            self.counts.too_old += too_old
        for (_, fields), reason in refused:
            flat = [part for pair in fields.items() for part in pair]
            neighbour = f"{self._stream}:refused"
            await self._ask(
                "XADD", neighbour, "MAXLEN", "~", 10_000, "*", *flat, b"reason", reason.encode(), key=neighbour
            )
            self.counts.refused += 1
            _log.warning("action_refused", reason=reason)
        await self._ask("XACK", self._stream, self._consumer_group, *(number for number, _ in entries))
        await self._trim()

    def _parse(self, fields: Mapping[bytes, bytes]) -> tuple[int, tuple[int, int, int, int, int]]:
        user, pin, event_id = (_unsigned(fields, name) for name in (b"user_id", b"pin_id", b"event_id"))
        time_ms = _unsigned(fields, b"time_ms")
        if event_id == 0 or not 0 < time_ms < 1 << 62:
            raise ValueError(f"event_id {event_id} and time_ms {time_ms} must be above 0")
        return user, (pin, time_ms, event_id, self._actions[fields[b"action"]], self._surfaces[fields[b"surface"]])

    async def _trim(self) -> None:
        """Delete what every consumer group of the stream has done with."""
        needed: list[tuple[int, int]] = []
        for told in await self._ask("XINFO", "GROUPS", self._stream):
            group = dict(zip(told[::2], told[1::2], strict=True))
            last, step = group[b"last-delivered-id"], 1
            if group[b"pending"]:
                _, first, *_ = await self._ask("XPENDING", self._stream, group[b"name"])
                if first is not None:
                    last, step = first, 0
            milliseconds, sequence = map(int, last.split(b"-"))
            needed.append((milliseconds, sequence + step))
        if needed:
            oldest = min(needed)
            await self._ask("XTRIM", self._stream, "MINID", f"{oldest[0]}-{oldest[1]}")


def _entry(found: Reply) -> _Entry:
    number, fields = found
    return number, dict(zip((fields or ())[::2], (fields or ())[1::2], strict=True))


def _unsigned(fields: Mapping[bytes, bytes], name: bytes) -> int:
    value = int(fields[name])
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name.decode()} {value} is no unsigned 64-bit number")
    return value
