"""The join: which request each action belongs to, whatever the order, files and repetitions of the log are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from impressions.dataset import JoinError, read_manifest, read_requests, read_slates
from impressions.joining import attribution, buckets
from impressions.joining.join import Wanted, join_log
from impressions.joining.records import Span
from tests.impressions.logs import action, impression, log_of, reader, seen, table
from tests.impressions.random_logs import (
    BASE_MS,
    WINDOW,
    Log,
    attributed_of,
    content,
    joined,
    logs,
    reasons_of,
    seen_of,
)
from tests.impressions.slow_join import slow_join


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make buckets and comparisons so small that a log of a few rows needs several."""
    monkeypatch.setattr(buckets, "REQUESTS_PER_BUCKET", 3)
    monkeypatch.setattr(attribution, "_PAIRS_MAX", 5)


many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(log=logs())
@pytest.mark.usefixtures("small_parts")
def test_each_action_goes_where_nested_loops_send_it(log: Log, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("joined") / "out"
    expected = slow_join(log.impressions, log.actions, log.seen, WINDOW.after_ms, WINDOW.skew_ms)
    if not expected.seen:
        with pytest.raises(JoinError, match="are left out because of (rows that differ|scores)"):
            joined(log, folder)
        return
    manifest = joined(log, folder)
    assert attributed_of(folder) == expected.attributed
    assert reasons_of(folder) == expected.unattributed
    assert seen_of(folder) == expected.seen
    counts = manifest.counts
    assert counts.actions == counts.attributed + sum(counts.unattributed.values())
    assert counts.attributed == len(expected.attributed)
    assert [r["request_id"] for p in read_requests(folder) for r in p.to_pylist()] == [
        number
        for _, number in sorted({(row["time_ms"], row["request_id"]) for row in log.impressions})
        if number in expected.seen
    ]


@many
@given(log=logs(), data=st.data())
@pytest.mark.usefixtures("small_parts")
def test_order_files_and_repetitions_of_a_log_change_no_byte(
    log: Log, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    shuffled: dict[str, list[pa.Table]] = {}
    for name in ("impressions", "actions", "seen"):
        rows = getattr(log, name)
        again = data.draw(st.lists(st.sampled_from(rows), max_size=3)) if rows else []
        rows = data.draw(st.permutations([*rows, *again]))
        cut = data.draw(st.integers(0, len(rows)))
        shuffled[name] = [table(name, rows[:cut]), table(name, rows[cut:])]
    try:
        joined(log, folder / "one")
    except JoinError:
        with pytest.raises(JoinError):
            join_log(reader(shuffled), folder / "other", Wanted(WINDOW))
        return
    join_log(reader(shuffled), folder / "other", Wanted(WINDOW))
    assert content(folder / "one") == content(folder / "other")


@many
@given(log=logs(), since=st.integers(0, 3_000), length=st.integers(1, 2_000), surface=st.sampled_from([None, "home"]))
def test_a_join_of_a_span_or_surface_is_that_part_of_the_whole_join(
    log: Log, since: int, length: int, surface: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    span = Span(BASE_MS + since, BASE_MS + since + length)
    wanted = Wanted(WINDOW, span, None if surface is None else (surface,))
    try:
        joined(log, folder / "whole")
        part = joined(log, folder / "part", wanted)
    except JoinError:
        return

    def kept(name: str) -> dict[int, str]:  # as text, in which NaN equals NaN
        return {
            row["request_id"]: repr({key: row[key] for key in row if key != "group"})
            for found in read_requests(folder / name, since_ms=span.since_ms, until_ms=span.until_ms)
            for row in found.to_pylist()
            if surface in (None, read_manifest(folder / name).groups[row["group"]].surface)
        }

    assert kept("part") == kept("whole")
    assert part.counts.requests == len(kept("whole"))
    whole = reasons_of(folder / "whole")
    events: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for row in log.actions:
        events[bool(row["request_id"])].add((row["user_id"], row["event_id"]))
    named = events[True] - events[False]  # an event may be sent again without its request, and either may count
    for event, reason in reasons_of(folder / "part").items():
        # Without a request, an action far from the span may have a pin that was only shown out of the span.
        assert reason in ("not_selected", whole.get(event)) or event not in named


def test_late_rows_give_what_one_join_of_all_rows_gives(tmp_path: Path) -> None:
    early = Log([impression(1, BASE_MS, 7, [10, 11])], [action(1, 7, 10, BASE_MS + 5)], [])
    late = Log(
        [*early.impressions, impression(2, BASE_MS + 50, 7, [11, 12])],
        [*early.actions, action(2, 7, 11, BASE_MS + 60), action(3, 7, 12, BASE_MS + 70, request_id=2)],
        [seen(1, 0)],
    )
    joined(early, tmp_path / "grown")
    first = content(tmp_path / "grown")
    joined(late, tmp_path / "grown")
    joined(late, tmp_path / "at once")
    assert content(tmp_path / "grown") == content(tmp_path / "at once") != first
    assert attributed_of(tmp_path / "grown") == {(7, 1): (1, 0), (7, 2): (2, 0), (7, 3): (2, 1)}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, (1, 1), id="newest request of the user"),
        pytest.param({"request_id": 1}, (1, 1), id="named request"),
        pytest.param({"request_id": 1, "position": 1}, (1, 1), id="named request and position"),
        pytest.param({"request_id": 9}, "no_such_request", id="a request that never was"),
        pytest.param({"request_id": 2}, "other_user", id="another user's request"),
        pytest.param({"request_id": 1, "pin_id": 99}, "pin_not_shown", id="another pin"),
        pytest.param({"pin_id": 99}, "pin_not_shown", id="another pin and no request"),
        pytest.param({"request_id": 1, "position": 0}, "other_position", id="another position"),
        pytest.param({"request_id": 1, "position": 7}, "other_position", id="a position beyond the answer"),
        pytest.param({"time_ms": BASE_MS - 20}, (1, 1), id="within the clock skew"),
        pytest.param({"time_ms": BASE_MS - 21}, "before_shown", id="beyond the clock skew"),
        pytest.param({"request_id": 1, "time_ms": BASE_MS - 20}, (1, 1), id="named, within the clock skew"),
        pytest.param({"request_id": 1, "time_ms": BASE_MS - 21}, "before_shown", id="named, beyond the clock skew"),
        pytest.param({"time_ms": BASE_MS + 1_000}, (1, 1), id="the end of the window"),
        pytest.param({"time_ms": BASE_MS + 1_001}, "after_window", id="past the window"),
        pytest.param({"request_id": 1, "time_ms": BASE_MS + 1_001}, "after_window", id="named, past the window"),
    ],
)
def test_an_action_belongs_to_a_request_or_has_a_reason(
    tmp_path: Path, fields: dict[str, int], expected: tuple[int, int] | str
) -> None:
    rows = [impression(1, BASE_MS, 7, [10, 11]), impression(2, BASE_MS, 8, [10, 11])]
    event = {**action(1, 7, 11, BASE_MS + 5), **fields}
    joined(Log(rows, [event], []), tmp_path / "out")
    found = attributed_of(tmp_path / "out") | reasons_of(tmp_path / "out")
    assert found == {(7, 1): expected}


def test_an_action_whose_producers_clock_jumped_is_counted_by_its_receipt(tmp_path: Path) -> None:
    day_ms = 86_400_000
    rows = [impression(1, BASE_MS, 7, [10, 11])]
    jumped = [
        action(1, 7, 10, BASE_MS + day_ms, received_ms=BASE_MS + 500),
        action(2, 7, 10, BASE_MS - day_ms, received_ms=BASE_MS + 500, request_id=1),
        action(3, 7, 10, BASE_MS + day_ms),
    ]
    manifest = joined(Log(rows, jumped, []), tmp_path / "out")
    assert manifest.counts.jumped_clocks == 2
    assert manifest.counts.unattributed == {"before_shown": 1, "after_window": 2}


def test_delays_are_reported_by_action(tmp_path: Path) -> None:
    events = [action(n, 7, 10, BASE_MS + n, action="save") for n in range(1, 101)]
    events += [action(200, 7, 10, BASE_MS - 10, action="hide")]
    manifest = joined(Log([impression(1, BASE_MS, 7, [10])], events, []), tmp_path / "out")
    assert manifest.delays_ms["save"] == {"p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert manifest.delays_ms["hide"]["max"] == 0
    assert manifest.counts.before_shown_within_skew == 1


def test_the_newest_request_before_an_action_beats_one_within_the_clock_skew_after_it(tmp_path: Path) -> None:
    rows = [impression(1, BASE_MS, 7, [10]), impression(2, BASE_MS + 110, 7, [10])]
    joined(Log(rows, [action(1, 7, 10, BASE_MS + 100)], []), tmp_path / "out")
    assert attributed_of(tmp_path / "out") == {(7, 1): (1, 0)}


def test_an_event_that_was_sent_again_with_other_content_counts_as_first_received(tmp_path: Path) -> None:
    first = action(1, 7, 10, BASE_MS + 5, received_ms=BASE_MS + 6)
    later = action(1, 7, 11, BASE_MS + 4, received_ms=BASE_MS + 7)
    same = {**first, "received_ms": BASE_MS + 9}
    log = Log([impression(1, BASE_MS, 7, [10, 11])], [later, first, same], [])
    result = join_log(log_of(log.impressions, log.actions), tmp_path / "out", Wanted(WINDOW))
    assert attributed_of(tmp_path / "out") == {(7, 1): (1, 0)}
    assert (result.repeated_actions, result.manifest.counts.changed_actions) == (2, 1)


def test_a_request_with_scores_that_are_not_finite_before_others_is_left_out_and_its_actions_say_so(
    tmp_path: Path,
) -> None:
    broken = impression(2, BASE_MS, 7, [10, 11], utilities=[math.nan, 1.0])
    log = Log([impression(1, BASE_MS, 7, [10, 11]), broken], [action(1, 7, 10, BASE_MS, request_id=2)], [])
    manifest = joined(log, tmp_path / "out")
    assert manifest.counts.left_out == {"scores that are not finite": 1}
    assert reasons_of(tmp_path / "out") == {(7, 1): "request_left_out"}


def test_reports_of_unknown_requests_and_positions_are_counted(tmp_path: Path) -> None:
    rows = [impression(1, BASE_MS, 7, [10, 11, 12]), impression(2, BASE_MS, 7, [10, 11])]
    manifest = joined(Log(rows, [], [seen(1, 0), seen(1, 2, 9), seen(5, 0), seen(5, 1)]), tmp_path / "out")
    assert seen_of(tmp_path / "out") == {1: [True, False, True], 2: [True, True]}
    counts = manifest.counts
    assert (counts.reported_requests, counts.seen_without_request, counts.seen_beyond_answer) == (1, 1, 1)


def test_reports_of_other_users_are_dropped_and_counted_once(tmp_path: Path) -> None:
    rows = [
        impression(1, BASE_MS, 7, [10, 11, 12]),
        impression(2, BASE_MS, 8, [10, 11]),
        impression(3, BASE_MS, 0, [9]),
    ]
    forged = [seen(1, 1, user_id=8), seen(1, 2, user_id=8), seen(1, 1, 2, 9, user_id=9), seen(2, 0, user_id=7)]
    own = [seen(1, 0, user_id=7), seen(3, 0), seen(5, 0, user_id=3)]
    manifest = joined(Log(rows, [], [*forged, *own, forged[0]]), tmp_path / "out")
    assert seen_of(tmp_path / "out") == {1: [True, False, False], 2: [True, True], 3: [True]}
    counts = manifest.counts
    assert (counts.reported_requests, counts.seen_of_other_users) == (2, 3)
    assert (counts.seen_without_request, counts.seen_beyond_answer) == (1, 0)


def test_repeated_reports_of_an_answer_change_nothing(tmp_path: Path) -> None:
    rows = [impression(1, BASE_MS, 7, [10, 11, 12])]
    report = seen(1, 0, 2, user_id=7)
    for name, reports in {"once": [report], "often": [report] * 5_000}.items():
        join_log(log_of(rows, [], reports), tmp_path / name, Wanted(WINDOW))
    assert content(tmp_path / "once") == content(tmp_path / "often")


def test_slates_hold_what_was_logged_and_what_became_of_it(tmp_path: Path) -> None:
    rows = [
        impression(2, BASE_MS + 1, 8, [12, 10], arm="a", party_weights=[1.0, 0.7], order_propensity=0.25),
        impression(1, BASE_MS, 7, [10, 11, 12]),
        impression(3, BASE_MS, 7, [10], surface="related"),
        impression(4, BASE_MS + 2, 7, [10], model="toy@2", heads=["save"], probabilities=[0.5]),
    ]
    events = [
        action(1, 7, 11, BASE_MS + 5, action="save", request_id=1),
        action(2, 7, 11, BASE_MS + 6, action="closeup", request_id=1),
        action(3, 8, 10, BASE_MS + 7, action="hide", request_id=2),
    ]
    joined(Log(rows, events, [seen(2, 1)]), tmp_path / "out")
    home, newer, related = read_slates(tmp_path / "out")
    assert [(s.surface, s.model, s.requests) for s in (home, newer, related)] == [
        ("home", "toy@1", 2),
        ("home", "toy@2", 1),
        ("related", "toy@1", 1),
    ]
    assert home.request_ids.tolist() == [1, 2]
    assert home.arms.tolist() == ["", "a"]
    assert home.row_splits.tolist() == [0, 3, 5]
    assert home.pin_ids.tolist() == [10, 11, 12, 12, 10]
    assert home.actions == ("save", "hide", "closeup")
    assert home.labels.astype(int).tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert home.seen.tolist() == [True, True, True, False, True]
    assert home.order_propensities.tolist() == [1.0, 0.25]
    assert home.party_weights.tolist() == [[1.0, 0.5], [1.0, 0.7]]
    np.testing.assert_allclose(home.probabilities[0], [0.3, 0.4], rtol=1e-6)
    assert newer.probabilities.shape == (1, 1)
    assert [s.model for s in read_slates(tmp_path / "out", model="toy@2")] == ["toy@2"]
    (later,) = read_slates(tmp_path / "out", "home", "toy@1", since_ms=BASE_MS + 1)
    assert later.request_ids.tolist() == [2]
    assert read_slates(tmp_path / "out", until_ms=BASE_MS) == []
    with pytest.raises(JoinError, match="has no request of surface search and model"):
        read_slates(tmp_path / "out", "search")
