"""Random small logs, their joins, and what stands in these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from impressions.dataset import Manifest, read_requests, read_unattributed
from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from tests.impressions.logs import Row, action, impression, log_of, seen

WINDOW = Window(after_ms=1_000, skew_ms=20)
BASE_MS = 1_700_000_000_000


@dataclass
class Log:
    """Rows of a log, whose times count from `BASE_MS`."""

    impressions: list[Row]
    actions: list[Row]
    seen: list[Row]


def answer(
    number: int, time_ms: int, user: int, shown: list[int], surface: str, unscored: set[int], attribute: float
) -> Row:
    """Return a row of the log in which the pins at some positions have no scores, and one may lack its attribute."""
    row = impression(number, time_ms, user, shown, surface=surface)
    for position in unscored & set(range(len(shown))):
        row["utilities"][position] = row["party_utilities"][2 * position] = math.nan
        row["probabilities"][2 * position : 2 * position + 2] = [math.nan, math.nan]
    row["attribute_values"][:1] = [attribute][: len(shown)]
    return row


def logs() -> st.SearchStrategy[Log]:
    """Return small logs in which users, pins, requests and times often collide."""
    times = st.integers(0, 3_000).map(lambda ms: BASE_MS + ms)
    users, pins = st.integers(1, 3), st.integers(1, 6)
    answers = st.builds(
        answer,
        st.integers(1, 12),
        times,
        users,
        st.lists(pins, max_size=4),
        st.sampled_from(["home", "related"]),
        st.sets(st.sampled_from([3, 3, 2, 1, 0]), max_size=2),
        st.sampled_from([0.5, math.nan]),
    )
    actions = st.builds(
        action,
        st.integers(1, 10),
        users,
        pins,
        times,
        action=st.sampled_from(["save", "hide", "closeup"]),
        received_ms=times,
        request_id=st.one_of(st.none(), st.integers(1, 14)),
        position=st.one_of(st.none(), st.integers(0, 4)),
    )
    reports = st.builds(
        seen, st.integers(1, 14), st.integers(0, 4), st.integers(0, 4), user_id=st.one_of(st.none(), users)
    )
    return st.builds(
        Log, st.lists(answers, min_size=1, max_size=14), st.lists(actions, max_size=16), st.lists(reports, max_size=4)
    )


def joined(log: Log, folder: Path, wanted: Wanted | None = None) -> Manifest:
    return join_log(log_of(log.impressions, log.actions, log.seen), folder, wanted or Wanted(WINDOW)).manifest


def attributed_of(folder: Path) -> dict[tuple[int, int], tuple[int, int]]:
    """Return the request and the position of each attributed action by (user, event)."""
    return {
        (row["user_id"], outcome["event_id"]): (row["request_id"], outcome["position"])
        for part in read_requests(folder)
        for row in part.to_pylist()
        for outcome in row["outcomes"]
    }


def reasons_of(folder: Path) -> dict[tuple[int, int], str]:
    return {(row["user_id"], row["event_id"]): row["reason"] for row in read_unattributed(folder).to_pylist()}


def seen_of(folder: Path) -> dict[int, list[bool]]:
    return {row["request_id"]: row["seen"] for part in read_requests(folder) for row in part.to_pylist()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
