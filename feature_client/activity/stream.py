"""The follower of a Redis stream: it folds actions into users' stored sequences, for producers that do not use our RPC.

An entry has the fields of `pinrank.v1.Action` by name; numbers are decimal text. Entries are acknowledged after they
are folded. An entry that is read again after a crash changes nothing, because its event id is already stored.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog
from redis.exceptions import ResponseError

from feature_client.action_times import clock_ms
from feature_client.activity.stream_entries import Action, Refusal, StreamEntry, Vocabulary, read_claimed, read_entries
from feature_client.activity.writer import ActionOutcome, write_events
from feature_client.groups import SequenceGroup
from feature_client.stores.redis.resp import Reply
from feature_client.stores.redis.store import RedisStore
from feature_client.stores.store import Store, StoreError, StoreUnavailableError

_log = structlog.get_logger(__name__)

#: How long one read waits for new entries.
_BLOCK_MS = 200
#: The time limit of a command.
_TIMEOUT_S = 5.0
_PAUSE_FIRST_S, _PAUSE_MAX_S = 0.1, 5.0
#: How many refused entries are kept.
_REFUSED_MAX = 10_000


@dataclass(slots=True)
class FollowerCounts:
    """Counts of entries since the start."""

    added: int = 0
    repeated: int = 0
    too_old: int = 0
    #: Moved to the stream `<stream>:refused` because they are not valid actions of the group.
    refused: int = 0
    #: Deleted or trimmed by others after they were read and before they were folded.
    lost: int = 0
    #: Stored actions in the future that were dropped from the sequences that were written.
    future_dropped: int = 0
    #: How often following failed and started again.
    interrupted: int = 0


class StreamFollower:
    """A member of a stream's consumer group. Any number can share the work, and nothing is lost if one dies."""

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
        lasts_s: float | None = None,
    ) -> None:
        """Prepare a member; `follow` connects it.

        Args:
            url: the Redis server or cluster that holds the stream: `redis://` or `redis+cluster://`.
            stream: the key of the stream.
            consumer_group: the consumer group. It is created at the start of the stream if it does not exist.
            name: the name of this member. A new member with the name of an earlier one takes over its unacknowledged
                entries.
            store: a started store that holds the sequences.
            group: the group of the sequences.
            batch: how many entries to read at once.
            abandoned_ms: how long an entry must be read but unacknowledged before another member can take it over.
            now_ms: returns the Unix time in milliseconds.
            lasts_s: the retention of the sequences, which is also the greatest age of an action; None for ever.
        """
        self._server = RedisStore(url, timeout_s=_TIMEOUT_S)
        self._stream, self._consumer_group, self._name = stream, consumer_group, name
        self._store, self._group, self._batch = store, group, batch
        self._abandoned_ms, self._now_ms = abandoned_ms, now_ms
        self._vocabulary, self._lasts_s = Vocabulary(group, lasts_s), lasts_s
        self._joined, self._claim_at_s, self._claim_from = False, 0.0, b"0-0"
        self.counts = FollowerCounts()

    async def follow(self, stop: asyncio.Event) -> None:
        """Fold entries until `stop` is set. While Redis or the store is unavailable, wait and try again.

        Raises:
            StoreConfigError: the stream URL cannot be used, or Redis refuses its user or password.
        """
        pause_s = _PAUSE_FIRST_S
        try:
            await self._server.start()
            while not stop.is_set():
                try:
                    await self.turn()
                    pause_s = _PAUSE_FIRST_S
                except Exception as error:  # noqa: BLE001 - after any error, the entries that follow must still be folded
                    self.counts.interrupted += 1
                    if isinstance(error, StoreError):
                        _log.warning(
                            "action_stream_interrupted", stream=self._stream, error=str(error), pause_s=pause_s
                        )
                    else:
                        _log.error("action_stream_failed", stream=self._stream, pause_s=pause_s, exc_info=error)
                    try:
                        async with asyncio.timeout(pause_s * random.uniform(0.5, 1.5)):
                            await stop.wait()
                    except TimeoutError:
                        pause_s = min(2 * pause_s, _PAUSE_MAX_S)
        finally:
            await self.close()

    async def close(self) -> None:
        await self._server.close()

    async def _ask(self, *command: bytes | str | int, key: str | None = None) -> Reply:
        """Send a command to the node that serves the key, by default that of the stream."""
        return await self._server.ask((key or self._stream).encode(), *command)

    async def turn(self, block_ms: int | None = _BLOCK_MS) -> None:
        """Fold abandoned and new entries; initially and after a failure, first those that this member read before.

        Args:
            block_ms: how long to wait for new entries; None does not wait.

        Raises:
            StoreError: the turn failed, and the next one starts again.
        """
        joined, self._joined = self._joined, False
        if not joined:
            await self._join()
            await self._fold_own()
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._claim_at_s:
            await self.claim_abandoned()
            self._claim_at_s = now_s + self._abandoned_ms / 1e3
        await self._fold(await self._read(">", block_ms))
        self._joined = True

    async def _join(self) -> None:
        if not self._server.nodes:
            await self._server.start()
        try:
            await self._ask("XGROUP", "CREATE", self._stream, self._consumer_group, "0", "MKSTREAM")
        except StoreUnavailableError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _read(self, start: bytes | str, block_ms: int | None) -> list[StreamEntry]:
        block: tuple[str | int, ...] = () if block_ms is None else ("BLOCK", block_ms)
        return read_entries(
            await self._ask(
                "XREADGROUP", "GROUP", self._consumer_group, self._name, "COUNT", self._batch, *block,
                "STREAMS", self._stream, start,
            )
        )  # fmt: skip

    async def _fold_own(self) -> None:
        """Fold the entries that this member read and did not acknowledge."""
        start: bytes | str = "0"
        while entries := await self._read(start, None):
            await self._fold(entries)
            start = entries[-1].number

    async def claim_abandoned(self) -> None:
        """Take over and fold a batch of entries that other members abandoned; the next call continues from there."""
        claimed = read_claimed(
            await self._ask(
                "XAUTOCLAIM",
                self._stream,
                self._consumer_group,
                self._name,
                self._abandoned_ms,
                self._claim_from,
                "COUNT",
                self._batch,
            )
        )
        self._claim_from = claimed.cursor
        self._note_lost(claimed.deleted)
        await self._fold(claimed.entries)
        if claimed.nameless:  # they belong to this member now, and reading its own entries returns their ids
            await self._fold_own()

    async def _fold(self, entries: list[StreamEntry]) -> None:
        """Fold a batch, set aside entries that are not valid actions, acknowledge both, and trim the stream."""
        if not entries:
            return
        actions: list[Action] = []
        refused: list[tuple[StreamEntry, Refusal]] = []
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
                lasts_s=self._lasts_s,
            )
            outcomes = np.bincount(written.outcomes, minlength=len(ActionOutcome)).tolist()
            self.counts.added += outcomes[ActionOutcome.ADDED]
            self.counts.repeated += outcomes[ActionOutcome.REPEATED]
            self.counts.too_old += outcomes[ActionOutcome.TOO_OLD]
            self.counts.future_dropped += written.dropped
        left = await self._set_aside(refused)
        done = [entry.number for entry in entries if entry.number not in left]
        if done:
            await self._ask("XACK", self._stream, self._consumer_group, *done)
        await self._trim()

    async def _set_aside(self, refused: list[tuple[StreamEntry, Refusal]]) -> set[bytes]:
        """Move entries to the stream `<stream>:refused`; return the ids of those that could not be written there.

        Those stay unacknowledged and are tried again later; the entries that follow do not wait for them.
        """
        left: set[bytes] = set()
        neighbour = f"{self._stream}:refused"
        for entry, refusal in refused:
            assert entry.fields is not None, "only entries with fields are refused"  # noqa: S101
            flat = [part for pair in entry.fields for part in pair]
            reason = f"{refusal.field}: {refusal.reason}"
            try:
                await self._ask(
                    "XADD", neighbour, "MAXLEN", _REFUSED_MAX, "*", *flat, b"reason", reason.encode(), key=neighbour
                )
                self.counts.refused += 1
            except StoreUnavailableError as error:
                if not isinstance(error.__cause__, ResponseError):
                    raise
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
        """Delete the entries that no consumer group of the stream needs any more."""
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
