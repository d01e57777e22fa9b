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
#: How long any command may take.
_TIMEOUT_S = 5.0
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
        """
        self._server = RedisStore(url, timeout_s=_TIMEOUT_S)
        self._stream, self._consumer_group, self._name = stream, consumer_group, name
        self._store, self._group, self._batch = store, group, batch
        self._abandoned_ms, self._now_ms = abandoned_ms, now_ms
        self._vocabulary = Vocabulary(group)
        self._joined, self._claim_at_s, self._claim_from = False, 0.0, b"0-0"
        self.counts = FollowerCounts()

    async def follow(self, stop: asyncio.Event) -> None:
        """Fold what comes until `stop` is set; while Redis or the store is away, wait and try again.

        Raises:
            StoreConfigError: the stream's URL cannot be used, or Redis refuses its user or password.
        """
        pause_s = _PAUSE_FIRST_S
        try:
            await self._server.start()
            while not stop.is_set():
                try:
                    await self.turn()
                    pause_s = _PAUSE_FIRST_S
                except Exception as error:  # noqa: BLE001 - whatever it is, the entries behind it are owed
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
        """Send a command of the stream's, or of another key's, to the server that holds it."""
        return await self._server.ask((key or self._stream).encode(), *command)

    async def turn(self, block_ms: int | None = _BLOCK_MS) -> None:
        """Fold what is owed: at first and after a failure what this member read before, then others' and new entries.

        Args:
            block_ms: how long to wait for new entries; None does not wait.

        Raises:
            StoreError: the next turn begins anew.
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
        """Fold what this member read and did not acknowledge."""
        start: bytes | str = "0"
        while entries := await self._read(start, None):
            await self._fold(entries)
            start = entries[-1].number

    async def claim_abandoned(self) -> None:
        """Take over and fold what other members abandoned; go on at the next call where this one ended."""
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
        if claimed.nameless:  # ours now: reading what is ours tells their ids
            await self._fold_own()

    async def _fold(self, entries: list[StreamEntry]) -> None:
        """Fold a batch, set aside what is no action, acknowledge both, and trim."""
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
            )
            added, repeated, too_old = np.bincount(written.outcomes, minlength=len(ActionOutcome)).tolist()
            self.counts.added += added
            self.counts.repeated += repeated
            self.counts.too_old += too_old
            self.counts.future_dropped += written.dropped
        left = await self._set_aside(refused)
        done = [entry.number for entry in entries if entry.number not in left]
        if done:
            await self._ask("XACK", self._stream, self._consumer_group, *done)
        await self._trim()

    async def _set_aside(self, refused: list[tuple[StreamEntry, Refusal]]) -> set[bytes]:
        """Move entries to the stream's neighbour; return the numbers of those that it did not take.

        Those stay unacknowledged, so that they are tried again and nothing behind them waits.
        """
        left: set[bytes] = set()
        neighbour = f"{self._stream}:refused"
        for entry, refusal in refused:
            assert entry.fields is not None, "only what could be read was refused"  # noqa: S101
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
