"""Fuzz the stream follower with hostile Redis streams: it must store what a slow reader finds, and set the rest aside.

The streams are in a real redis-server. They contain raw and repeated fields, entries left by a dead follower, entries
that were trimmed while pending, destroyed groups, and keys of another type. The slow reader is part of this file: plain
Python, one entry at a time, without code of the follower.
"""

from __future__ import annotations

import asyncio
import logging
import re
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
import structlog
import uvloop
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bench.harness import Claim, Conclusion, Raw
from feature_client.activity.stream import FollowerCounts, StreamFollower
from feature_client.groups import SequenceGroup
from feature_client.stores.memory_store import MemoryStore
from feature_client.stores.store import StoreError
from tests.redis_servers import RedisServer, running

CASES = 20_000
SEED = 0
GROUP = SequenceGroup(name="acts", version=1, actions=("save", "hide"), surfaces=("home", "related"), length_max=4)
NOW_MS = 1_790_000_000_000
_STREAM, _REFUSED = b"acts", b"acts:refused"
_EVENT = struct.Struct("<QqQBB")

Pairs = tuple[tuple[bytes, bytes], ...]
#: The fields (pin_id, time_ms, event_id, action, surface).
Event = tuple[int, int, int, int, int]


class WrongStateError(AssertionError):
    """The store, the stream or the counts differ from the slow reader's result."""


@dataclass(frozen=True, slots=True)
class Case:
    """A stream, the faults that happened to it, and the sequences that were stored before.

    Attributes:
        entries: entries in the order of their addition.
        own: number of first entries that a dead follower of the same name had read.
        gone: number of next entries that a dead follower of another name had read.
        deleted: positions of entries that were deleted after that.
        fault: one of `none`, `group destroyed`, `refused unusable`, `stream deleted`, `another type`.
        before: stored values by user.
    """

    entries: tuple[Pairs, ...]
    own: int
    gone: int
    deleted: frozenset[int]
    fault: str
    before: tuple[tuple[int, bytes], ...]


@dataclass(slots=True)
class StreamTally:
    """The outcomes of the cases and of their entries."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)


# The slow reader.


@dataclass(slots=True)
class ExpectedFold:
    """The expected final state."""

    values: dict[bytes, bytes]
    refused: list[list[bytes]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def slow_read(case: Case) -> ExpectedFold:
    expected = ExpectedFold({_key(user): value for user, value in case.before})
    if case.fault in ("stream deleted", "another type"):
        return expected
    places = range(len(case.entries))
    first, second = case.own, case.own + case.gone
    batches = [places[:first], places[first:second], places[second:]]
    if case.fault == "group destroyed":
        batches = [places]
    else:
        expected.counts["lost"] = len([place for place in case.deleted if place < second])
    for batch in batches:
        _slow_batch([case.entries[place] for place in batch if place not in case.deleted], expected)
    return expected


def _slow_batch(entries: list[Pairs], expected: ExpectedFold) -> None:
    by_user: dict[int, list[Event]] = {}
    for pairs in entries:
        action = _slow_action(pairs)
        if action is None:
            expected.counts["refused"] += 1
            expected.refused.append([part for pair in pairs for part in pair])
        else:
            by_user.setdefault(action[0], []).append(action[1])
    for user, events in by_user.items():
        _slow_fold(user, events, expected)


def _slow_action(pairs: Pairs) -> tuple[int, Event] | None:
    found: dict[str, bytes] = {}
    for name in ("event_id", "user_id", "pin_id", "time_ms", "action", "surface"):
        values = [value for key, value in pairs if key == name.encode()]
        if len(values) != 1:
            return None
        found[name] = values[0]
    numbers = {}
    for name in ("event_id", "user_id", "pin_id", "time_ms"):
        if re.fullmatch(rb"[0-9]{1,20}", found[name]) is None or int(found[name]) >= 2**64:
            return None
        numbers[name] = int(found[name])
    in_time = 631_152_000_000 <= numbers["time_ms"] <= NOW_MS + 60_000
    named = found["action"] in (b"save", b"hide") and found["surface"] in (b"home", b"related")
    if not in_time or not named or numbers["event_id"] == 0:
        return None
    codes = (int(found["action"] == b"hide"), int(found["surface"] == b"related"))
    return numbers["user_id"], (numbers["pin_id"], numbers["time_ms"], numbers["event_id"], *codes)


def _slow_fold(user: int, events: list[Event], expected: ExpectedFold) -> None:
    stored = _slow_sequence(expected.values.get(_key(user)))
    past = [event for event in stored if event[1] <= NOW_MS + 3_600_000]
    dropped = len(stored) - len(past)
    known = {event[2] for event in past}
    new: list[Event] = []
    for event in events:
        if event[2] in known:
            expected.counts["repeated"] += 1
        else:
            known.add(event[2])
            new.append(event)
    everything = sorted([*past, *new], key=lambda event: (event[1], event[2]))[-4:]
    added = [event for event in new if event in everything]
    expected.counts["added"] += len(added)
    expected.counts["too_old"] += len(new) - len(added)
    expected.counts["future_dropped"] += dropped
    if added or dropped:
        expected.values[_key(user)] = GROUP.fingerprint + b"".join(_EVENT.pack(*event) for event in everything)


def _slow_sequence(value: bytes | None) -> list[Event]:
    if value is None or value[:8] != GROUP.fingerprint or (len(value) - 8) % _EVENT.size:
        return []
    events = [_EVENT.unpack_from(value, at) for at in range(8, len(value), _EVENT.size)]
    return [] if any(action > 1 or surface > 1 for *_, action, surface in events) else events


def _key(user: int) -> bytes:
    return b"acts@1:" + struct.pack(">Q", user)


# The streams.

_IDS = st.one_of(st.integers(1, 9), st.sampled_from((2**63, 2**64 - 1)))
_USERS = st.sampled_from((1, 1, 2, 2**64 - 1))
_TIMES = st.one_of(st.integers(NOW_MS - 5, NOW_MS), st.sampled_from((631_152_000_000, NOW_MS + 60_000)))
_WRONG_NUMBERS = st.one_of(
    st.sampled_from((
        b"", b"-1", b"+1", b" 1", b"1 ", b"1_0", b"1.0", b"1e3", b"0x1", b"nan", b"inf", b"-0", b"\xd9\xa1",
        b"\xff\xfe", b"18446744073709551616", b"0", b"00", b"9" * 21, b"9" * 5_000, b"1\x00", b"1\n", b"True", b"None",
    )),
    st.sampled_from((
        NOW_MS // 1000, NOW_MS * 1000, NOW_MS * 1_000_000, NOW_MS + 60_001, 631_151_999_999, 1, 2**63,
    )).map(lambda number: b"%d" % number),
    st.binary(max_size=12),
)  # fmt: skip
_WRONG_NAMES = st.one_of(st.sampled_from((b"", b"dance", b"SAVE", b"save ", b"home", b"\xff")), st.binary(max_size=9))
_NAMES = (b"event_id", b"user_id", b"pin_id", b"time_ms", b"action", b"surface")
_RARELY = st.integers(0, 9).map(lambda drawn: drawn == 0)


@st.composite
def _entry(draw: st.DrawFn) -> Pairs:
    """Mostly an action, sometimes an action with one error, or an unrelated entry."""
    if draw(_RARELY) and draw(st.booleans()):
        return tuple(draw(st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=8)), min_size=1, max_size=4)))
    values: dict[bytes, bytes] = {
        b"event_id": b"%d" % draw(_IDS), b"user_id": b"%d" % draw(_USERS), b"pin_id": b"%d" % draw(st.integers(0, 3)),
        b"time_ms": b"%d" % draw(_TIMES), b"action": draw(st.sampled_from((b"save", b"hide"))),
        b"surface": draw(st.sampled_from((b"home", b"related"))),
    }  # fmt: skip
    wrong = draw(st.integers(0, 19))
    name = draw(st.sampled_from(_NAMES))
    if wrong == 0:
        del values[name]
    if wrong in (1, 2, 3):
        values[name] = draw(_WRONG_NAMES if name in (b"action", b"surface") else _WRONG_NUMBERS)
    pairs = list(values.items())
    if wrong == 4:
        pairs.append((name, draw(st.sampled_from((values[name], b"1")))))
    if wrong == 5:
        pairs.append((draw(st.sampled_from((b"reason", b"note", b"\xff", b""))), b"x"))
    return tuple(draw(st.permutations(pairs)) if wrong == 6 else pairs)


@st.composite
def _stored(draw: st.DrawFn) -> bytes:
    """A stored sequence: valid, with actions in the future, of another group, or truncated."""
    times = st.one_of(_TIMES, st.sampled_from((0, -1, NOW_MS + 3_600_000, NOW_MS + 3_600_001, NOW_MS * 1000, 2**62)))
    codes = st.integers(0, 1)
    ids = st.integers(0, 9)
    events = draw(st.lists(st.tuples(st.integers(0, 3), times, ids, codes, codes), max_size=6))
    value = GROUP.fingerprint + b"".join(_EVENT.pack(*event) for event in events)
    broken = draw(st.integers(0, 19))
    if broken == 0:
        return draw(st.binary(min_size=1, max_size=40))
    if broken == 1:
        return value + b"\x07"
    if broken == 2:
        return value + _EVENT.pack(1, NOW_MS, 5, 2, 0)
    return value


@st.composite
def cases(draw: st.DrawFn) -> Case:
    entries = draw(st.lists(_entry(), min_size=1, max_size=12))
    own = draw(st.integers(0, len(entries))) if draw(st.booleans()) else 0
    gone = draw(st.integers(0, len(entries) - own)) if draw(st.booleans()) else 0
    deleted = draw(st.frozensets(st.integers(0, len(entries) - 1), max_size=3)) if draw(st.booleans()) else frozenset()
    faults = ("none",) * 12 + ("group destroyed", "refused unusable", "stream deleted", "another type")
    before = [(user, draw(_stored())) for user in (1, 2) if draw(st.booleans())]
    return Case(tuple(entries), own, gone, deleted, draw(st.sampled_from(faults)), tuple(before))


# The run.


class Arena:
    """A stream in a redis-server, set up for each case in turn."""

    def __init__(self, server: RedisServer) -> None:
        self._url = server.url
        self._client = server.client()
        for command in ("XRANGE", "XREADGROUP", "XPENDING"):
            self._client.set_response_callback(command, lambda reply, **_: reply)

    def close(self) -> None:
        self._client.close()

    def lay_out(self, case: Case) -> None:
        self._many([
            ["DEL", _STREAM, _REFUSED],
            ["XGROUP", "CREATE", _STREAM, "fold", "0", "MKSTREAM"],
            *(
                ["XADD", _STREAM, f"1-{place}", *(part for pair in pairs for part in pair)]
                for place, pairs in enumerate(case.entries, 1)
            ),
        ])  # fmt: skip
        read = ["XREADGROUP", "GROUP", "fold"]
        self._many([
            *([[*read, "one", "COUNT", case.own, "STREAMS", _STREAM, ">"]] if case.own else []),
            *([[*read, "gone", "COUNT", case.gone, "STREAMS", _STREAM, ">"]] if case.gone else []),
            *([["XDEL", _STREAM, *(f"1-{i + 1}" for i in sorted(case.deleted))]] if case.deleted else []),
        ])  # fmt: skip
        self._many({
            "none": [],
            "group destroyed": [["XGROUP", "DESTROY", _STREAM, "fold"]],
            "refused unusable": [["SET", _REFUSED, "no stream"]],
            "stream deleted": [["DEL", _STREAM]],
            "another type": [["DEL", _STREAM], ["SET", _STREAM, "no stream"]],
        }[case.fault])  # fmt: skip

    async def follow(self, case: Case, store: MemoryStore) -> FollowerCounts:
        follower = StreamFollower(
            self._url, _STREAM.decode(), "fold", "one", store, GROUP, abandoned_ms=0, now_ms=lambda: NOW_MS
        )
        try:
            try:
                await follower.turn(block_ms=None)
            except StoreError:
                if case.fault != "another type":
                    raise
            if case.fault in ("refused unusable", "another type"):
                self._many([["DEL", _REFUSED if case.fault == "refused unusable" else _STREAM]])
                await follower.turn(block_ms=None)
        finally:
            await follower.close()
        return follower.counts

    def look(self) -> tuple[list[list[bytes]], int, int]:
        """Return the fields of the entries that were set aside, and the numbers of pending and remaining entries."""
        refused, pending, left = self._many([
            ["XRANGE", _REFUSED, "-", "+"], ["XPENDING", _STREAM, "fold"], ["XLEN", _STREAM]
        ])  # fmt: skip
        return [fields for _, fields in refused], pending[0], left

    def _many(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        with self._client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            replies: list[Any] = pipe.execute()
        return replies


def check(case: Case, arena: Arena, runner: asyncio.Runner, tally: StreamTally) -> None:
    """Follow one stream and compare. Raises WrongStateError, or any unexpected exception of the follower."""
    tally.cases += 1
    expected = slow_read(case)
    store = MemoryStore({_key(user): value for user, value in case.before})
    arena.lay_out(case)
    counts = runner.run(arena.follow(case, store))
    if store.values != expected.values:
        raise WrongStateError(f"the store holds {store.values}, the slow reader found {expected.values}")
    refused, pending, left = arena.look()
    as_they_came = [fields[:-2] for fields in refused]
    if sorted(as_they_came) != sorted(expected.refused) or any(fields[-2] != b"reason" for fields in refused):
        raise WrongStateError(f"the follower set aside {refused}, the slow reader {expected.refused}")
    if pending or left:
        raise WrongStateError(f"{pending} entries are pending and {left} remain")
    found = {name: getattr(counts, name) for name in FollowerCounts.__slots__ if name != "interrupted"}
    if found != {name: expected.counts[name] for name in found}:
        raise WrongStateError(f"the follower counted {found}, the slow reader {dict(expected.counts)}")
    tally.outcomes.update(found)
    tally.outcomes[f"fault: {case.fault}"] += 1


def fuzz(count: int, tally: StreamTally, server: RedisServer) -> None:
    """Check `count` cases. Raise the error of the smallest failing case."""
    arena = Arena(server)
    quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
    before = structlog.get_config()
    structlog.configure(wrapper_class=quiet, cache_logger_on_first_use=False)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

            @seed(SEED)
            @settings(
                max_examples=count, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
            )  # fmt: skip
            @given(cases())
            def one(case: Case) -> None:
                check(case, arena, runner, tally)

            one()
    finally:
        structlog.configure(**before)
        arena.close()


def measure(*, quick: bool = False) -> Iterator[Raw]:
    """Run all cases, or find the smallest failing one. Raises BenchmarkError without a redis-server."""
    tally, wrong = StreamTally(), []
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pinrank-fuzz-") as folder, running(Path(folder)) as server:
        version = redis.Redis(port=server.port).info("server")["redis_version"]
        try:
            fuzz(200 if quick else CASES, tally, server)
        except Exception as error:  # noqa: BLE001 - any exception is a finding
            wrong.append(f"{type(error).__name__}: {error}")
    yield {
        "seed": SEED, "redis": version, "cases": tally.cases, "outcomes": dict(tally.outcomes), "wrong": wrong,
        "seconds": time.perf_counter() - start_s,
    }  # fmt: skip


def conclude(raw: Raw) -> Conclusion:
    claims = (
        Claim("cases", raw["cases"], CASES, "streams", "at_least"),
        Claim(
            "streams folded otherwise than the slow reader says",
            len(raw["wrong"]),
            0,
            "streams",
            "at_most",
        ),
    )
    summary: dict[str, float] = {f"entries {what}": count for what, count in raw["outcomes"].items() if ":" not in what}
    summary |= {"cases": raw["cases"], "seconds": raw["seconds"]}
    return Conclusion(summary, claims)
