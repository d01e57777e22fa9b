"""Checks actions and reports of what was seen against the answers that they name."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from impressions.inspection.columns import Answers
from impressions.inspection.problem import NAMED, Problem
from impressions.reading import LogFile

#: How many pairs of an action and a shown pin are compared at once.
_PAIRS_MAX = 4_000_000

#: What may be wrong: the column, what, and what to do.
_FAULTS = {
    "other_user": (
        "user_id", "was another user's",
        "the frontend mixes up its answers: send the request_id of the answer that this user got",
    ),
    "not_shown": (
        "pin_id", "did not show this pin", "send the request_id of the answer that showed the pin, or none"
    ),
    "other_position": (
        "position", "did not show the pin at this position", "count from 0, in the order of the answer"
    ),
    "beyond": (
        "positions", "returned fewer pins than a position says", "count from 0, in the order of the answer"
    ),
}  # fmt: skip


class References:
    """The rows of actions and seen that name a request: first all of them come, and then the answers.

    Holds about 50 bytes for each row.
    """

    def __init__(self) -> None:
        self._files: list[str] = []
        self._tables: list[str] = []
        self._parts: list[dict[str, np.ndarray]] = []
        self._rows: dict[str, np.ndarray] = {}

    def add(self, file: LogFile, rows: pa.Table) -> None:
        """Take the rows of a file of actions or of seen."""
        ids = rows["request_id"].fill_null(0).to_numpy()
        at = np.flatnonzero(ids)
        users, stated = rows["user_id"].fill_null(0).to_numpy(), rows["user_id"].is_valid().to_numpy()
        if file.table == "actions":
            pins = rows["pin_id"].to_numpy()
            positions = rows["position"].cast(pa.int64()).fill_null(-1).to_numpy()
        else:
            pins = np.zeros(len(ids), np.uint64)
            positions = _highest(rows["positions"])
        self._parts.append(
            {
                "request_id": ids[at],
                "user_id": users[at],
                "stated": stated[at],
                "pin_id": pins[at],
                "position": positions[at],
                "row": at.astype(np.int32),
                "file": np.full(len(at), len(self._files), np.int32),
            }
        )
        self._files.append(file.where)
        self._tables.append(file.table)

    def compare(self, answers: Answers) -> None:
        """Compare the rows with some of the answers, after all rows have come."""
        rows = self._sorted()
        ids = answers.request_ids
        first, stop = (np.searchsorted(rows["request_id"], ids, side=side) for side in ("left", "right"))
        counts = stop - first
        answer = np.repeat(np.arange(len(ids)), counts)
        own = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        rows["known"][own] = True
        lengths, position = answers.lengths("pin_ids"), rows["position"][own]
        acted = rows["acted"][own]
        other = rows["stated"][own] & (rows["user_id"][own] != answers.numbers("user_id")[answer])
        rows["other_user"][own[other]] = True
        rows["beyond"][own[~acted & ~other & (position >= lengths[answer])]] = True
        left = np.flatnonzero(acted & ~other)
        step = max(1, _PAIRS_MAX // max(1, int(lengths.max(initial=1))))
        starts, pins = np.cumsum(lengths) - lengths, answers.flat("pin_ids")
        for begin in range(0, len(left), step):
            some = left[begin : begin + step]
            self._compare_pins(own[some], starts[answer[some]], lengths[answer[some]], pins)

    def problems(self) -> Iterator[Problem]:
        """Yield what contradicts the answers, after all of them have come."""
        rows = self._sorted()
        for fault, (field, what, fix) in _FAULTS.items():
            at = self._in_order(rows[fault])
            for i in at[:NAMED]:
                told = f"request {rows['request_id'][i]} {what}"
                yield Problem(self._files[rows["file"][i]], int(rows["row"][i]), field, told, fix)
            if len(at) > NAMED:
                last = self._files[rows["file"][at[NAMED]]]
                yield Problem(last, None, field, f"{len(at) - NAMED:,} more rows, also of other files: {what}", fix)

    def notes(self) -> Iterator[str]:
        """Yield how many rows name requests that the log does not have, which may be as it should."""
        rows = self._sorted()
        for table, acted in (("actions", True), ("seen", False)):
            these = rows["acted"] == acted
            at = self._in_order(these & ~rows["known"])
            if len(at):
                i, requests = at[0], len(np.unique(rows["request_id"][at]))
                yield (
                    f"{table}: {len(at):,} of the {np.count_nonzero(these):,} rows with a request_id name {requests:,} "
                    f"requests that the log does not have, e.g. {self._files[rows['file'][i]]}, row {rows['row'][i]}: "
                    f"request {rows['request_id'][i]}. That is normal if impressions.share is below 1, if the server "
                    "dropped rows, or if older files were deleted; otherwise, look which request_id the frontend sends"
                )

    def _compare_pins(self, own: np.ndarray, starts: np.ndarray, lengths: np.ndarray, pins: np.ndarray) -> None:
        rows = self._rows
        which = np.repeat(np.arange(len(own)), lengths)
        place = np.arange(len(which)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        equal = pins[starts[which] + place] == rows["pin_id"][own][which]
        position = rows["position"][own]
        shown, there = np.zeros(len(own), bool), position < 0
        shown[which[equal]] = True
        there[which[equal & (place == position[which])]] = True
        rows["not_shown"][own[~shown]] = True
        rows["other_position"][own[shown & ~there]] = True

    def _sorted(self) -> dict[str, np.ndarray]:
        """Return the rows by request id."""
        if not self._rows:
            kinds = {
                "request_id": np.uint64, "user_id": np.uint64, "stated": np.bool_, "pin_id": np.uint64,
                "position": np.int64,
            }  # fmt: skip
            parts = [*self._parts, {name: np.empty(0, kinds.get(name, np.int32)) for name in (*kinds, "row", "file")}]
            self._parts = []
            order = np.argsort(np.concatenate([part["request_id"] for part in parts]), kind="stable")
            rows = {name: np.concatenate([part.pop(name) for part in parts])[order] for name in (*kinds, "row", "file")}
            rows["acted"] = np.array([table == "actions" for table in self._tables] or [False])[rows["file"]]
            rows.update({name: np.zeros(len(order), bool) for name in (*_FAULTS, "known")})
            self._rows = rows
        return self._rows

    def _in_order(self, found: np.ndarray) -> np.ndarray:
        """Return the places of rows in the order of files."""
        at = np.flatnonzero(found)
        return at[np.lexsort((self._rows["row"][at], self._rows["file"][at]))]


def _highest(positions: pa.ChunkedArray) -> np.ndarray:
    """Return int64, the highest position of each report; -1 of one without positions."""
    lists = positions.combine_chunks()
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    highest = np.full(len(lengths), -1)
    values = pc.list_flatten(lists).to_numpy().astype(np.int64)
    np.maximum.at(highest, np.repeat(np.arange(len(lengths)), lengths), values)
    return highest
