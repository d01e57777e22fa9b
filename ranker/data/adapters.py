"""Conversion of published logs to atomic files with their own actions: DeskDrop and an extract of KuaiRand.

Both log single signs (opened, then liked, then saved). All signs of one user on one pin in one sitting become one
interaction with all labels; a sitting continues while each sign follows the last within `SITTING_S`. The interaction
has the time of its last sign, so that no part of it enters a history before it was known.
"""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ranker.data.identifiers import misspelt
from ranker.data.problems import LATEST_MS
from ranker.data.schema import FILE, ActionRule, ActionSchema, write_schema
from ranker.errors import DatasetError

#: The usual limit of a web session. In DeskDrop, 99.9% of the shorter gaps lie within one session that the portal
#: logged, but only 10% of the gaps above six hours.
SITTING_S = 30 * 60


@dataclass(frozen=True, slots=True)
class Signs:
    """Single signs, in any order.

    Attributes:
        users: identifiers.
        pins: identifiers.
        time_ms: int64[E].
        names: names of the S kinds of sign.
        shown: bool[E, S], the signs of each entry.
    """

    users: Sequence[str]
    pins: Sequence[str]
    time_ms: np.ndarray
    names: tuple[str, ...]
    shown: np.ndarray


@dataclass(frozen=True, slots=True)
class Adapter:
    """Reads one published log."""

    name: str
    read: Callable[[Path], Signs]
    schema: ActionSchema


#: Errors raised by a damaged or unexpected source.
_UNREADABLE = (ValueError, EOFError, csv.Error, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error)


def convert(adapter: Adapter, source: Path, folder: Path) -> int:
    """Write `NAME.inter` and `actions.toml` to a new folder; return the number of interactions.

    Raises:
        DatasetError: the source is not the log that the adapter reads, or the folder exists.
    """
    if folder.exists():
        raise DatasetError(f"{folder} already exists; choose a new folder")
    try:
        merged = one_per_sitting(adapter.read(source))
    except _UNREADABLE as error:
        raise DatasetError(f"{source} is not the {adapter.name} log that this command reads: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as temporary:
        staging = Path(temporary) / folder.name
        staging.mkdir()
        with (staging / f"{adapter.name}.inter").open("w", encoding="utf-8") as file:
            file.write("user_id:token\titem_id:token\ttimestamp:float\tsigns:token_seq\n")
            for user, pin, time_ms, shown in zip(
                merged.users, merged.pins, merged.time_ms.tolist(), merged.shown, strict=True
            ):
                signs = " ".join(name for name, on in zip(merged.names, shown.tolist(), strict=True) if on)
                file.write(f"{user}\t{pin}\t{time_ms / 1000:.3f}\t{signs}\n")
        write_schema(staging / FILE, adapter.schema)
        staging.rename(folder)
    return len(merged.users)


def one_per_sitting(signs: Signs) -> Signs:
    """Merge the signs of each user on each pin in one sitting; return them in order of time."""
    if not len(signs.users):
        return signs
    user_ids, user = np.unique(np.asarray(signs.users), return_inverse=True)
    pin_ids, pin = np.unique(np.asarray(signs.pins), return_inverse=True)
    order = np.lexsort((signs.time_ms, pin, user))
    user, pin, time_ms = user[order], pin[order], signs.time_ms[order]
    new = (np.diff(user) != 0) | (np.diff(pin) != 0) | (np.diff(time_ms) > SITTING_S * 1000)
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    last = np.concatenate([starts[1:], [len(order)]]) - 1
    by_time = np.argsort(time_ms[last], kind="stable")
    last = last[by_time]
    return Signs(
        user_ids[user[last]].tolist(),
        pin_ids[pin[last]].tolist(),
        time_ms[last],
        signs.names,
        np.logical_or.reduceat(signs.shown[order], starts)[by_time],
    )


_DESKDROP_EVENTS = {
    "VIEW": "view",
    "LIKE": "like",
    "BOOKMARK": "bookmark",
    "FOLLOW": "follow",
    "COMMENT CREATED": "comment",
}


def _deskdrop(source: Path) -> Signs:
    rows = _read(source, ",", ("timestamp", "eventType", "contentId", "personId"))
    kinds = tuple(_DESKDROP_EVENTS)
    for row in rows:
        if row["eventType"] not in kinds:
            raise row.fault("eventType", f"it must be one of {', '.join(kinds)}")
    kind = np.array([kinds.index(row["eventType"]) for row in rows], np.int64)
    return Signs(
        users=[row.identifier("personId") for row in rows],
        pins=[row.identifier("contentId") for row in rows],
        time_ms=np.array([row.time_ms("timestamp", 1000) for row in rows], np.int64),
        names=tuple(_DESKDROP_EVENTS.values()),
        shown=kind[:, None] == np.arange(len(kinds)),
    )


#: Column of the extract -> sign. `label` is a separate sign: see `KUAIRAND`.
_KUAIRAND_SIGNS = {
    "is_follow": "follow",
    "is_forward": "forward",
    "is_comment": "comment",
    "is_profile_enter": "profile",
    "long_view": "long_view",
    "is_click": "click",
}


def _kuairand(source: Path) -> Signs:
    rows = _read(source, "\t", ("user_id", "video_id", "time_ms", "label", *_KUAIRAND_SIGNS))
    label = _zero_or_one(rows, "label")
    return Signs(
        users=[row.identifier("user_id") for row in rows],
        pins=[row.identifier("video_id") for row in rows],
        time_ms=np.array([row.time_ms("time_ms", 1) for row in rows], np.int64),
        names=("hate", "like", *_KUAIRAND_SIGNS.values()),
        shown=np.stack([~label, label, *(_zero_or_one(rows, name) for name in _KUAIRAND_SIGNS)], axis=-1),
    )


def _zero_or_one(rows: Sequence[_Row], column: str) -> np.ndarray:
    for row in rows:
        if row[column] not in {"0", "1"}:
            raise row.fault(column, "it must be 0 or 1")
    return np.array([row[column] == "1" for row in rows], bool)


@dataclass(frozen=True, slots=True)
class _Row:
    """The fields of one line. An invalid field raises a ValueError that names its place."""

    line: int
    fields: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.fields[column]

    def fault(self, column: str, message: str) -> ValueError:
        return ValueError(f"line {self.line}: column {column!r} holds {self[column]!r}: {message}")

    def identifier(self, column: str) -> str:
        if wrong := misspelt(self[column]):
            raise self.fault(column, f"the identifier {wrong}")
        if not self[column].isprintable():
            raise self.fault(column, "the identifier contains unprintable characters; remove them")
        return self[column]

    def time_ms(self, column: str, factor: int) -> int:
        text = self[column]
        if not (text.isascii() and text.isdigit()) or int(text[:20]) * factor >= LATEST_MS:
            raise self.fault(column, "it is not a Unix time between 1970 and 2200")
        return int(text) * factor


def _read(source: Path, delimiter: str, columns: Sequence[str]) -> list[_Row]:
    """Read the given columns of all lines. Raises one of `_UNREADABLE`."""
    rows = []
    with _opened(source) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(reader, [])
        for column in columns:
            if header.count(column) != 1:
                raise ValueError(f"{'no' if column not in header else 'more than one'} column {column!r}")
        places = [header.index(column) for column in columns]
        for fields in reader:
            if fields and len(fields) != len(header):
                raise ValueError(
                    f"line {reader.line_num}: {len(fields)} fields, but the header names {len(header)} columns"
                )
            if fields:
                read = {column: fields[place] for column, place in zip(columns, places, strict=True)}
                rows.append(_Row(reader.line_num, read))
    if not rows:
        raise ValueError("it has no lines after the header")
    return rows


@contextmanager
def _opened(source: Path) -> Iterator[IO[str]]:
    """Open a table that is plain text, compressed with gzip, or the only file in a zip archive."""
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            if len(names) != 1:
                raise ValueError(
                    f"the archive must contain exactly one file, but contains {', '.join(names) or 'none'}"
                )
            if archive.getinfo(names[0]).flag_bits & 1:
                raise ValueError("the archive is encrypted; unpack it first")
            with archive.open(names[0]) as member, io.TextIOWrapper(member, encoding="utf-8-sig", newline="") as text:
                yield text
    elif source.suffix == ".gz":
        with gzip.open(source, "rt", encoding="utf-8-sig", newline="") as text:
            yield text
    else:
        with source.open(encoding="utf-8-sig", newline="") as text:
            yield text


def _rule(name: str, meaning: str, sign: str | None, affinity: float, *, head: bool = True) -> ActionRule:
    if sign is None:
        return ActionRule(name=name, meaning=meaning, affinity=affinity, head=head)
    return ActionRule(name=name, meaning=meaning, column="signs", any_of=(sign,), affinity=affinity, head=head)


#: Articles on a company's portal, March 2016 to February 2017. Every sign counts as a closeup, because a user who
#: likes or bookmarks an article has looked at it even without a view in the same sitting.
DESKDROP = Adapter(
    "deskdrop",
    _deskdrop,
    ActionSchema(
        actions=(
            _rule("save", "bookmarked", "bookmark", 1.0),
            _rule("follow", "followed: wants to hear of new comments", "follow", 0.8),
            _rule("comment", "commented on", "comment", 0.8),
            _rule("like", "liked", "like", 0.7),
            _rule("closeup", "opened, or acted on in any other way", None, 0.3),
        )
    ),
)

#: Short videos, April 2022. The extract contains only impressions that were liked (label 1) or hated (label 0). The
#: data shows this meaning of the label: rows with label 0 have a median playing time of 4.5 s against 11.8 s, are long
#: views in 22% against 52% of cases, and led to a follow in 1 of 8,083 against 1 of 111 cases. So an impression without
#: a positive action is always a hide: a real, logged negative of the like head.
KUAIRAND = Adapter(
    "kuairand",
    _kuairand,
    ActionSchema(
        actions=(
            # First, because a hated video should be shown less, whatever else happened.
            _rule("hide", "said to dislike it", "hate", 0.0),
            _rule("follow", "followed its author", "follow", 1.0),
            _rule("forward", "forwarded", "forward", 1.0),
            _rule("like", "liked", "like", 0.8),
            _rule("comment", "commented on", "comment", 0.8),
            _rule("profile_visit", "opened its author's profile", "profile", 0.6),
            _rule("long_view", "watched to the end, or for 18 seconds", "long_view", 0.5),
            _rule("closeup", "opened", "click", 0.3),
        )
    ),
)

ADAPTERS = {adapter.name: adapter for adapter in (DESKDROP, KUAIRAND)}
