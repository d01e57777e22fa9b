"""The log's actions and reports of what was looked at, as arrays in which each counts once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from impressions.dataset import JoinError, flat, row_splits
from impressions.joining.attribution import Actions, Requests, Window, positions_in
from impressions.schema import FINGERPRINT_KEY, TABLES, fingerprint

#: Times in milliseconds beyond the year 9999 are errors, and would overflow when they are subtracted.
_TIME_MS_MAX = 253_402_300_800_000

#: Fields of an action in the order of their significance, when the same event was sent with different content.
_CONTENT = ("time_ms", "pin_ids", "action", "surface", "request_ids", "positions")


def checked(tables: Iterable[pa.Table], name: str, columns: tuple[str, ...] | None = None) -> Iterable[pa.Table]:
    """Yield the tables of a log, which have all columns, or these.

    Raises:
        JoinError: a table has other columns than this version writes, or a null or a time that cannot be.
    """
    expected = TABLES[name]
    for table in tables:
        # Types read from Parquet differ in the names of list items, so files carry the fingerprint of their table.
        stated = (table.schema.metadata or {}).get(FINGERPRINT_KEY, fingerprint(table.schema).encode()).decode()
        if stated != fingerprint(expected) or tuple(table.column_names) not in {columns, tuple(expected.names)}:
            raise JoinError(_other_columns(table.schema, stated, expected, name))
        for field in map(expected.field, table.column_names):
            if not field.nullable and table[field.name].null_count:
                raise JoinError(f"table {name} of the log has a row without {field.name}; remove or repair its file")
            if field.name.endswith("_ms") and table.num_rows:
                span = pc.min_max(table[field.name]).as_py()
                for time_ms in (span["min"], span["max"]):
                    if not 0 <= time_ms < _TIME_MS_MAX:
                        raise JoinError(
                            f"table {name} of the log has the {field.name} {time_ms}, which is no Unix time in "
                            "milliseconds; correct the clock or the file that it comes from"
                        )
        yield table


def _other_columns(found: pa.Schema, stated: str, expected: pa.Schema, name: str) -> str:
    theirs, ours = ({field.name: str(field) for field in schema} for schema in (found, expected))
    differing = sorted({name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)})
    return (
        f"table {name} of the log has fingerprint {stated}, and this version joins {fingerprint(expected)} "
        f"(columns that differ: {', '.join(differing) or 'only their order'}); join it with the version of pinrank "
        "that wrote it, or move its files out of the log"
    )


@dataclass(frozen=True, slots=True)
class ActionCounts:
    """How many rows repeated an action, and how many of these actions were sent with another content."""

    repeated: int
    changed: int


def distinct_actions(tables: Iterable[pa.Table]) -> tuple[Actions, ActionCounts]:
    """Return each action of a user and event id once: the one received first, if it was sent with several contents.

    Cost: about 80 bytes a row while it sorts them.

    Raises:
        JoinError: a table is not of the log's schema.
    """
    names, surfaces = _Vocabulary(), _Vocabulary()
    parts = [_columns(table, names, surfaces) for table in checked(tables, "actions")]
    if not parts:
        parts.append(dict.fromkeys(_FIELDS, np.empty(0, np.int64)))
    rows = {field: np.concatenate([part.pop(field) for part in parts]) for field in _FIELDS}
    rows["action"], rows["surface"] = names.sorted_codes(rows["action"]), surfaces.sorted_codes(rows["surface"])
    keys = [rows[field] for field in ("user_ids", "event_ids", "received_ms", *_CONTENT)]
    order = np.lexsort(keys[::-1])
    first = np.ones(len(order), bool)
    first[1:] = False
    for field in ("user_ids", "event_ids"):
        first[1:] |= rows[field][order[1:]] != rows[field][order[:-1]]
    changed = np.zeros(len(order), bool)
    for field in _CONTENT:
        changed[1:] |= ~first[1:] & (rows[field][order[1:]] != rows[field][order[:-1]])
    events = np.unique(np.cumsum(first)[changed])
    kept = order[first]
    kept = kept[np.lexsort([rows[field][kept] for field in ("event_ids", "user_ids", "time_ms")])]
    counts = ActionCounts(len(order) - len(kept), len(events))
    return Actions(
        **{field: column[kept] for field, column in rows.items()}, names=names.sorted(), surfaces=surfaces.sorted()
    ), counts


_FIELDS = ("event_ids", "user_ids", "received_ms", *_CONTENT)


def _columns(table: pa.Table, names: _Vocabulary, surfaces: _Vocabulary) -> dict[str, np.ndarray]:
    return {
        "event_ids": table["event_id"].to_numpy(),
        "user_ids": table["user_id"].to_numpy(),
        "pin_ids": table["pin_id"].to_numpy(),
        "action": names.codes(table["action"]),
        "surface": surfaces.codes(table["surface"]),
        "time_ms": table["time_ms"].to_numpy(),
        "received_ms": table["received_ms"].to_numpy(),
        "request_ids": table["request_id"].fill_null(0).to_numpy(),
        "positions": table["position"].cast(pa.int64()).fill_null(-1).to_numpy(),
    }


class _Vocabulary:
    """Numbers for names, as they come; and afterwards in alphabetic order, so that no file's order matters."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def codes(self, column: pa.ChunkedArray) -> np.ndarray:
        """Return int32[N]."""
        plain = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        encoded = plain.unify_dictionaries().combine_chunks()
        known = [self._numbers.setdefault(name, len(self._numbers)) for name in encoded.dictionary.to_pylist()]
        numbers: np.ndarray = np.asarray(known, np.int32)[encoded.indices.to_numpy(zero_copy_only=False)]
        return numbers

    def sorted(self) -> tuple[str, ...]:
        return tuple(sorted(self._numbers))

    def sorted_codes(self, codes: np.ndarray) -> np.ndarray:
        places = {name: place for place, name in enumerate(self.sorted())}
        if not places:
            return codes.astype(np.int32)
        found: np.ndarray = np.array([places[name] for name in self._numbers], np.int32)[codes]
        return found


def within_span(actions: Actions, wanted: np.ndarray, requests: Requests, window: Window, span: Span) -> Actions:
    """Return the actions that could belong to wanted requests: by their time, or because they name one.

    Args:
        actions: all actions.
        wanted: bool[R], which requests are wanted.
        requests: the R requests.
        window: how long after a request an action counts.
        span: the wanted times of requests.
    """
    numbers = requests.numbers(actions.request_ids)
    named = (numbers >= 0) & (actions.request_ids != 0)
    named[named] = wanted[numbers[named]]
    kept = named | span.widened(window.skew_ms, window.after_ms).holds(actions.time_ms)
    columns = {field: getattr(actions, field)[kept] for field in _FIELDS}
    return Actions(**columns, names=actions.names, surfaces=actions.surfaces)


@dataclass(frozen=True, slots=True)
class Span:
    """A time span in Unix milliseconds; `until_ms` is excluded, and None means no limit."""

    since_ms: int | None = None
    until_ms: int | None = None

    def widened(self, before_ms: int, after_ms: int) -> Span:
        return Span(
            None if self.since_ms is None else self.since_ms - before_ms,
            None if self.until_ms is None else self.until_ms + after_ms,
        )

    def holds(self, time_ms: np.ndarray) -> np.ndarray:
        """Return bool[N], which times lie in the span."""
        inside = np.ones(len(time_ms), bool)
        if self.since_ms is not None:
            inside &= time_ms >= self.since_ms
        if self.until_ms is not None:
            inside &= time_ms < self.until_ms
        return inside


@dataclass(frozen=True, slots=True)
class SeenPins:
    """What users looked at, of R requests with N pins.

    Attributes:
        splits: int64[R + 1], where the pins of each request begin.
        reported: bool[R], whether there is a report.
        seen: bool[N], what the reports say.
        unknown_requests: how many requests that are not among the R have a report.
        beyond_answer: how many positions were reported that the answers did not have.
        other_users: how many pairs of a request and another user than its own have a report, which does not count.
    """

    splits: np.ndarray
    reported: np.ndarray
    seen: np.ndarray
    unknown_requests: int
    beyond_answer: int
    other_users: int

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """Return bool[n], whether each pin of the requests int64[r] was seen; all of a request without a report."""
        parts = [
            self.seen[self.splits[number] : self.splits[number + 1]] | ~self.reported[number] for number in numbers
        ]
        return np.concatenate([np.empty(0, bool), *parts])


def seen_pins(
    tables: Iterable[pa.Table], requests: Requests, counts: np.ndarray, usable: np.ndarray, elsewhere: np.ndarray
) -> SeenPins:
    """Return the union of the positions that the reports of each request name, without those of other users.

    Args:
        tables: the reports.
        requests: the R requests.
        counts: int64[R], how many pins each showed.
        usable: bool[R], which requests are not left out; what was seen of the others is ignored.
        elsewhere: uint64[E], ascending, ids of requests of the log that are not among the R.

    Raises:
        JoinError: a table is not of the log's schema.
    """
    splits = np.concatenate([[0], np.cumsum(counts)])
    reported, seen = np.zeros(len(counts), bool), np.zeros(splits[-1], bool)
    unknown, beyond, others = np.empty(0, np.uint64), np.empty((0, 2), np.int64), np.empty((0, 2), np.uint64)
    for table in checked(tables, "seen"):
        ids = table["request_id"].to_numpy()
        numbers = requests.numbers(ids)
        unknown = np.union1d(unknown, ids[(numbers < 0) & (positions_in(elsewhere, ids) < 0)])
        users, stated = table["user_id"].fill_null(0).to_numpy(), table["user_id"].is_valid().to_numpy()
        foreign = (numbers >= 0) & stated & (users != requests.user_ids[numbers])
        others = np.unique(np.concatenate([others, np.stack([ids[foreign], users[foreign]], axis=1)]), axis=0)
        numbers[foreign] = -1
        reported[numbers[numbers >= 0]] = True
        owners = np.repeat(numbers, np.diff(row_splits(table["positions"])))
        counted = (owners >= 0) & usable[owners]
        places, owners = flat(table["positions"]).astype(np.int64)[counted], owners[counted]
        inside = places < counts[owners]
        outside = np.stack([owners[~inside], places[~inside]], axis=1)
        beyond = np.unique(np.concatenate([beyond, outside]), axis=0)
        seen[splits[owners[inside]] + places[inside]] = True
    return SeenPins(splits, reported, seen, len(unknown), len(beyond), len(others))
