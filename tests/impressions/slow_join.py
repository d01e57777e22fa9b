"""The join as nested loops over dictionaries: slow, and short enough to check by reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.impressions.logs import Row


@dataclass
class SlowJoin:
    """What became of each distinct action and each pin."""

    #: The request and the position by (user, event).
    attributed: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    #: The reason by (user, event).
    unattributed: dict[tuple[int, int], str] = field(default_factory=dict)
    #: By request, whether each pin was seen.
    seen: dict[int, list[bool]] = field(default_factory=dict)


def slow_join(
    impressions: Sequence[Row], actions: Sequence[Row], seen: Sequence[Row], window_ms: int, skew_ms: int
) -> SlowJoin:
    result = SlowJoin()
    by_id: dict[int, list[Row]] = {}
    for row in impressions:
        if row not in by_id.setdefault(row["request_id"], []):
            by_id[row["request_id"]].append(row)
    requests = {number: rows[0] for number, rows in by_id.items() if len(rows) == 1 and _scored(rows[0]) is not None}
    first: dict[tuple[int, int], Row] = {}
    for row in actions:
        event = (row["user_id"], row["event_id"])
        if event not in first or _age(row) < _age(first[event]):
            first[event] = row
    for event, row in first.items():
        found = _direct(row, by_id, requests, window_ms, skew_ms)
        if row.get("request_id") is None:
            found = _newest(row, requests, window_ms, skew_ms)
        if not isinstance(found, str) and found[1] >= (_scored(requests[found[0]]) or 0):
            found = "pin_without_scores"
        if isinstance(found, str):
            result.unattributed[event] = found
        else:
            result.attributed[event] = found
    for number, request in requests.items():
        own = (None, request["user_id"])
        reports = [row["positions"] for row in seen if row["request_id"] == number and row["user_id"] in own]
        places = range(_scored(request) or 0)
        result.seen[number] = [not reports or any(place in report for report in reports) for place in places]
    return result


def _scored(row: Row) -> int | None:
    """Return how many of a request's pins have scores; None if they are not its first ones, at least one."""
    pins = len(row["pin_ids"])
    fit = [
        all(
            math.isfinite(value)
            for name in ("probabilities", "party_utilities", "utilities")
            for value in row[name][pin * len(row[name]) // pins : (pin + 1) * len(row[name]) // pins]
        )
        for pin in range(pins)
    ]
    count = fit.count(True)
    return count if fit[:count] == [True] * count and (count or not pins) else None


def _age(row: Row) -> tuple[object, ...]:
    wanted = ("received_ms", "time_ms", "pin_id", "action", "surface")
    return (
        *(row[name] for name in wanted),
        row.get("request_id") or 0,
        -1 if (p := row.get("position")) is None else p,
    )


def _direct(
    row: Row, by_id: dict[int, list[Row]], requests: dict[int, Row], window_ms: int, skew_ms: int
) -> tuple[int, int] | str:
    number = row.get("request_id")
    if number not in by_id:
        return "no_such_request"
    if number not in requests:
        return "request_left_out"
    request = requests[number]
    if request["user_id"] != row["user_id"]:
        return "other_user"
    places = [place for place, pin in enumerate(request["pin_ids"]) if pin == row["pin_id"]]
    if not places:
        return "pin_not_shown"
    if row.get("position") is not None:
        if row["position"] not in places:
            return "other_position"
        places = [row["position"]]
    delay = row["time_ms"] - request["time_ms"]
    if delay < -skew_ms:
        return "before_shown"
    if delay > window_ms:
        return "after_window"
    return number, places[0]


def _newest(row: Row, requests: dict[int, Row], window_ms: int, skew_ms: int) -> tuple[int, int] | str:
    shown = [
        (request["time_ms"], number, request["pin_ids"].index(row["pin_id"]))
        for number, request in requests.items()
        if request["user_id"] == row["user_id"] and row["pin_id"] in request["pin_ids"]
    ]
    if not shown:
        return "pin_not_shown"
    before = [found for found in shown if found[0] <= row["time_ms"]]
    if before:
        newest = max(before)
        if row["time_ms"] - newest[0] <= window_ms:
            return newest[1:]
    after = [found for found in shown if found[0] > row["time_ms"]]
    if after:
        next_one = min(after)
        if next_one[0] - row["time_ms"] <= skew_ms:
            return next_one[1:]
    return "after_window" if before else "before_shown"
