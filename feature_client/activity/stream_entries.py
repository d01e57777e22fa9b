"""Parsing of stream entries from replies, and their conversion to actions. Pure, and defined for every entry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feature_client.action_times import time_problem
from feature_client.groups import SequenceGroup

#: How many bytes of a value a reason quotes.
_SHOWN_MAX = 40
_FIELDS = (b"event_id", b"user_id", b"pin_id", b"action", b"surface", b"time_ms")
#: The number of digits of 2^64.
_DIGITS_MAX = 20


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """One entry.

    Attributes:
        number: its id in the stream.
        fields: names and values in the order in which they were added, including repeated names; None if the entry was
            deleted or trimmed after it was read, so that only its id is left.
    """

    number: bytes
    fields: tuple[tuple[bytes, bytes], ...] | None


@dataclass(frozen=True, slots=True)
class Action:
    """A valid action: the user, and the event as a row of `SequenceGroup.dtype`."""

    user_id: int
    event: tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason why an entry is not a valid action.

    Attributes:
        field: the name of the wrong field.
        reason: what is wrong with it, with the start of its value.
    """

    field: str
    reason: str


def read_entries(reply: Any) -> list[StreamEntry]:
    """Return the entries in a checked reply to XREADGROUP: nothing, or pairs of a stream's name and its entries."""
    return [_entry(item) for _, items in reply or () for item in items]


@dataclass(frozen=True, slots=True)
class ClaimedEntries:
    """The result of XAUTOCLAIM.

    Attributes:
        cursor: where the next call continues; `0-0` is the start.
        entries: entries of other members that belong to this member now.
        nameless: how many deleted entries, without their ids, belong to this member now. Only Redis before 7 has them.
        deleted: how many deleted entries Redis removed from the pending list itself. Only Redis from 7 on does this.
    """

    cursor: bytes
    entries: list[StreamEntry]
    nameless: int
    deleted: int


def read_claimed(reply: Any) -> ClaimedEntries:
    """Parse a checked reply to XAUTOCLAIM."""
    cursor, items, *more = reply
    there = [item for item in items if item is not None]
    return ClaimedEntries(
        cursor, [_entry(item) for item in there], len(items) - len(there), len(more[0]) if more else 0
    )


def _entry(item: Any) -> StreamEntry:
    number, flat = item
    return StreamEntry(number, None if flat is None else tuple(zip(flat[::2], flat[1::2], strict=True)))


class Vocabulary:
    """The names of a group's actions and surfaces in entries, and the codes under which they are stored."""

    def __init__(self, group: SequenceGroup, lasts_s: float | None = None) -> None:
        """Create the vocabulary of a group, whose sequences take no actions older than `lasts_s`."""
        self._lasts_s = lasts_s
        self._codes: Mapping[bytes, Mapping[bytes, int]] = {
            b"action": {name.encode(): i for i, name in enumerate(group.actions)},
            b"surface": {name.encode(): i for i, name in enumerate(group.surfaces)},
        }

    def read(self, fields: Sequence[tuple[bytes, bytes]], now_ms: int) -> Action | Refusal:
        """Convert the fields of an entry to an action. Fields that an action does not have are ignored."""
        counts = Counter(name for name, _ in fields)
        for name in _FIELDS:
            if counts[name] != 1:
                return Refusal(name.decode(), "missing" if not counts[name] else f"occurs {counts[name]} times")
        values = dict(fields)
        numbers: dict[bytes, int] = {}
        for name in (b"event_id", b"user_id", b"pin_id", b"time_ms"):
            digits = values[name]
            # int() alone would also accept signs, spaces and underscores.
            if not digits.isdigit() or len(digits) > _DIGITS_MAX or int(digits) >= 1 << 64:
                return Refusal(
                    name.decode(), f"{_shown(digits)} is not a whole number from 0 to 2^64 - 1 in decimal digits"
                )
            numbers[name] = int(digits)
        if not numbers[b"event_id"]:
            return Refusal("event_id", "0; give every action a unique id")
        if problem := time_problem(numbers[b"time_ms"], now_ms, self._lasts_s):
            return Refusal("time_ms", problem)
        codes: dict[bytes, int] = {}
        for name, known in self._codes.items():
            if values[name] not in known:
                there_are = b", ".join(known).decode()
                return Refusal(name.decode(), f"unknown {name.decode()} {_shown(values[name])}; known: {there_are}")
            codes[name] = known[values[name]]
        event = (numbers[b"pin_id"], numbers[b"time_ms"], numbers[b"event_id"], codes[b"action"], codes[b"surface"])
        return Action(numbers[b"user_id"], event)


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return repr(value[:_SHOWN_MAX].decode("utf-8", "backslashreplace")) + ("..." if len(value) > _SHOWN_MAX else "")
    return repr(value)[:_SHOWN_MAX]
