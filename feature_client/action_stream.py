"""Actions from a Redis stream into users' stored sequences, for producers other than our RPC.

An entry has the fields of `pinrank.v1.Action` by name, numbers as decimal text. Entries are acknowledged after they
were folded; one that is read again after a crash changes nothing, as folding knows its event id.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import redis.asyncio as redis
import structlog
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from feature_client.activity import Outcome, clock_ms, write_events
from feature_client.groups import SequenceGroup
from feature_client.store import Store, StoreConfigError, StoreError
from feature_client.stream_entries import Action, Entry, Refusal, Vocabulary, read_claimed, read_entries

_log = structlog.get_logger(__name__)

#: How long one read waits for new entries.
_BLOCK_MS = 200
_PAUSE_FIRST_S, _PAUSE_MAX_S = 0.1, 5.0
#: Refused entries that are kept.
_REFUSED_MAX = 10_000


@dataclass(slots=True)
class FollowerCounts:
    """Since the start, in entries."""

    added: int = 0
    repeated: int = 0
    too_old: int = 0
    #: Moved to the stream's `:refused` neighbour, as they are no actions of the group.
    refused: int = 0
    #: Deleted or trimmed by others after they were read and before they were folded.
    lost: int = 0
    #: Stored actions that no clock shows yet, dropped from the sequences that were written.
    future_dropped: int = 0
    #: Times that following failed and began anew.
    interrupted: int = 0


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
        abandoned_ms: int = 5_000,
        now_ms: Callable[[], int] = clock_ms,
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
            abandoned_ms: entries that a member read and did not acknowledge for so long are another's to take.
            now_ms: the Unix time in milliseconds.

        Raises:
            StoreConfigError: the URL cannot be used.
        """
        cluster = "+cluster" in url.partition("://")[0]
        make: Any = redis.RedisCluster if cluster else redis.Redis
        try:
            self._redis = make.from_url(url.replace("+cluster", "", 1), socket_timeout=10, socket_connect_timeout=2)
        except (ValueError, RedisError, RedisClusterException) as error:
            raise StoreConfigError(f"the stream's URL cannot be used: {error}") from error
        # redis-py's own readers take of a name that repeats the last value, and stumble over entries that were deleted.
        for command in ("XREADGROUP", "XAUTOCLAIM"):
            self._redis.set_response_callback(command, lambda reply, **_: reply)
        self._stream, self._consumer_group, self._name = stream, consumer_group, name
        self._store, self._group, self._batch = store, group, batch
        self._abandoned_ms, self._now_ms = abandoned_ms, now_ms
        self._vocabulary = Vocabulary(group)
        self._joined, self._claim_at_s, self._claim_from = False, 0.0, b"0-0"
        self.counts = FollowerCounts()

    async def follow(self, stop: asyncio.Event) -> None:
        """Fold what comes until `stop` is set; while Redis or the store is away, wait and try again."""
        pause_s = _PAUSE_FIRST_S
        try:
            while not stop.is_set():
                try:
                    await self.turn()
                    pause_s = _PAUSE_FIRST_S
                except Exception as error:  # noqa: BLE001 - whatever it is, the entries behind it are owed
                    self.counts.interrupted += 1
                    expected = isinstance(error, (RedisError, RedisClusterException, StoreError, OSError))
                    tell = _log.warning if expected else _log.error
                    what = str(error) if expected else f"{type(error).__name__}: {error}"
                    tell("action_stream_interrupted", stream=self._stream, error=what, pause_s=pause_s)
                    try:
                        async with asyncio.timeout(pause_s * random.uniform(0.5, 1.5)):
                            await stop.wait()
                    except TimeoutError:
                        pause_s = min(2 * pause_s, _PAUSE_MAX_S)
        finally:
            await self.close()

    async def close(self) -> None:
        await self._redis.aclose()

    async def turn(self, block_ms: int | None = _BLOCK_MS) -> None:
        """Fold what is owed: at first and after a failure what this member read before, then others' and new entries.

        Args:
            block_ms: how long to wait for new entries; None does not wait.

        Raises:
            RedisError, RedisClusterException, StoreError, OSError: the next turn begins anew.
        """
        joined, self._joined = self._joined, False
        if not joined:
            await self._join()
            await self._fold_own()
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._claim_at_s:
            await self._claim()
            self._claim_at_s = now_s + self._abandoned_ms / 1e3
        await self._fold(await self._read(">", block_ms))
        self._joined = True

    async def _join(self) -> None:
        try:
            await self._redis.xgroup_create(self._stream, self._consumer_group, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _read(self, start: bytes | str, block_ms: int | None) -> list[Entry]:
        return read_entries(
            await self._redis.xreadgroup(
                self._consumer_group, self._name, {self._stream: start}, count=self._batch, block=block_ms
            )
        )

    async def _fold_own(self) -> None:
        """Fold what this member read and did not acknowledge."""
        start: bytes | str = "0"
        while entries := await self._read(start, None):
            await self._fold(entries)
            start = entries[-1].number

    async def _claim(self) -> None:
        """Take over and fold what other members abandoned; go on at the next call where this one ended."""
        claimed = read_claimed(
            await self._redis.xautoclaim(
                self._stream, self._consumer_group, self._name, self._abandoned_ms, self._claim_from, count=self._batch
            )
        )
        self._claim_from = claimed.cursor
        self._note_lost(claimed.deleted)
        await self._fold(claimed.entries)
        if claimed.nameless:  # ours now: reading what is ours tells their ids
            await self._fold_own()

    async def _fold(self, entries: list[Entry]) -> None:
        """Fold a batch, set aside what is no action, acknowledge both, and trim."""
        if not entries:
            return
        actions: list[Action] = []
        refused: list[tuple[Entry, Refusal]] = []
        now_ms = self._now_ms()
        for entry in entries:
            if entry.fields is None:
                continue
            match self._vocabulary.read(entry.fields, now_ms):
                case Action() as action:
                    actions.append(action)
                case Refusal() as refusal:
                    refused.append((entry, refusal))
        self._note_lost(sum(entry.fields is None for entry in entries))
        if actions:
            written = await write_events(
                self._store,
                self._group,
                np.array([action.user_id for action in actions], np.uint64),
                np.array([action.event for action in actions], SequenceGroup.dtype),
                now_ms,
            )
            added, repeated, too_old = np.bincount(written.outcomes, minlength=len(Outcome)).tolist()
            self.counts.added += added
            self.counts.repeated += repeated
            self.counts.too_old += too_old
            self.counts.future_dropped += written.dropped
        left = await self._set_aside(refused)
        done = [entry.number for entry in entries if entry.number not in left]
        if done:
            await self._redis.xack(self._stream, self._consumer_group, *done)
        await self._trim()

    async def _set_aside(self, refused: list[tuple[Entry, Refusal]]) -> set[bytes]:
        """Move entries to the stream's neighbour; return the numbers of those that it did not take.

        Those stay unacknowledged, so that they are tried again and nothing behind them waits.
        """
        left: set[bytes] = set()
        for entry, refusal in refused:
            assert entry.fields is not None, "only what could be read was refused"  # noqa: S101
            flat = [part for pair in entry.fields for part in pair]
            reason = f"{refusal.field}: {refusal.reason}"
            try:
                await self._redis.execute_command(
                    "XADD", f"{self._stream}:refused", "MAXLEN", _REFUSED_MAX, "*", *flat, b"reason", reason
                )
                self.counts.refused += 1
            except ResponseError as error:
                left.add(entry.number)
                failure = str(error)
        if refused:
            fields = dict(Counter(refusal.field for _, refusal in refused))
            _log.warning("actions_refused", stream=self._stream, count=len(refused), fields=fields)
        if left:
            _log.error("refused_actions_not_set_aside", stream=self._stream, count=len(left), error=failure)
        return left

    def _note_lost(self, count: int) -> None:
        if count:
            self.counts.lost += count
            _log.warning("stream_entries_deleted_before_they_were_folded", stream=self._stream, count=count)

    async def _trim(self) -> None:
        """Delete what every consumer group of the stream has done with."""
        needed: list[tuple[int, int]] = []
        for found in await self._redis.xinfo_groups(self._stream):
            last, step = found["last-delivered-id"], 1
            if found["pending"]:
                summary = await self._redis.xpending(self._stream, found["name"])
                if summary["min"] is not None:
                    last, step = summary["min"], 0
            milliseconds, sequence = map(int, last.decode().split("-"))
            needed.append((milliseconds, sequence + step))
        if needed:
            oldest = min(needed)
            await self._redis.xtrim(self._stream, minid=f"{oldest[0]}-{oldest[1]}", approximate=False)
