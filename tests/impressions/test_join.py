"""The join: which request each action belongs to, whatever the order, files and repetitions of the log are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from impressions.dataset import JoinError, Manifest, read_manifest, read_requests, read_slates, read_unattributed
from impressions.joining import attribution, buckets
from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from impressions.joining.records import Span
from tests.impressions.logs import Row, action, impression, log_of, reader, seen, table
from tests.impressions.slow_join import slow_join

WINDOW = Window(after_ms=1_000, skew_ms=20)
BASE_MS = 1_700_000_000_000


@dataclass
class Log:
    """Rows of a log, whose times count from `BASE_MS`."""

    impressions: list[Row]
    actions: list[Row]
    seen: list[Row]


def logs() -> st.SearchStrategy[Log]:
    """Return small logs in which users, pins, requests and times often collide."""
    times = st.integers(0, 3_000).map(lambda ms: BASE_MS + ms)
    users, pins = st.integers(1, 3), st.integers(1, 6)
    answers = st.builds(
        lambda number, time_ms, user, shown, surface: impression(number, time_ms, user, shown, surface=surface),
        st.integers(1, 12),
        times,
        users,
        st.lists(pins, max_size=4),
        st.sampled_from(["home", "related"]),
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
    reports = st.builds(seen, st.integers(1, 14), st.integers(0, 4), st.integers(0, 4))
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
        with pytest.raises(JoinError, match="are left out because of rows that differ"):
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

    def kept(name: str) -> dict[int, Any]:
        return {
            row["request_id"]: {key: row[key] for key in row if key != "group"}
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


def test_a_request_with_scores_that_are_not_finite_is_left_out_and_its_actions_say_so(tmp_path: Path) -> None:
    broken = impression(2, BASE_MS, 7, [10, 11], utilities=[1.0, math.nan])
    log = Log([impression(1, BASE_MS, 7, [10, 11]), broken], [action(1, 7, 10, BASE_MS, request_id=2)], [])
    manifest = joined(log, tmp_path / "out")
    assert manifest.counts.left_out == {"scores that are not finite": 1}
    assert reasons_of(tmp_path / "out") == {(7, 1): "request_left_out"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"propensities": [1.0, 0.0]}, "request 5 of the log has a value in propensities that must be above 0"),
        ({"propensities": [1.0, 1.5]}, "request 5 of the log has a value in propensities that must be above 0"),
        ({"propensities": [1.0, math.nan]}, "request 5 of the log has a value in propensities that must be above 0"),
        ({"order_propensity": 0.0}, "request 5 of the log has an order_propensity that must be above 0"),
        ({"order_propensity": math.nan}, "request 5 of the log has an order_propensity that must be above 0"),
        ({"party_weights": [1.0, math.inf]}, "request 5 of the log has a party weight that is not finite"),
        ({"probabilities": [0.1]}, "request 5 of the log has probabilities of a length that does not fit"),
        ({"request_id": 0}, "a request of the log has id 0"),
        ({"time_ms": -1}, "table impressions of the log has the time_ms -1"),
    ],
)
def test_a_row_that_cannot_be_is_refused_by_name_and_the_old_dataset_stays(
    tmp_path: Path, fields: Row, message: str
) -> None:
    good = impression(4, BASE_MS, 7, [10, 11])
    joined(Log([good], [], []), tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(JoinError, match=message):
        joined(Log([good, {**impression(5, BASE_MS, 7, [10, 11]), **fields}], [], []), tmp_path / "out")
    assert content(tmp_path / "out") == before


def _renamed(found: pa.Table) -> pa.Table:
    return found.rename_columns(["id" if name == "request_id" else name for name in found.column_names])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, r"fingerprint .* \(columns that differ: id, request_id\); join it with the version"),
        (lambda found: found.select(found.column_names[::-1]), "columns that differ: only their order"),
    ],
)
def test_a_log_of_another_schema_is_refused_with_the_columns_that_differ(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    other = change(table("impressions", [impression(1, BASE_MS, 7, [10])]))
    with pytest.raises(JoinError, match=message):
        join_log(reader({"impressions": [other]}), tmp_path / "out", Wanted(WINDOW))
    assert not (tmp_path / "out").exists()


def test_a_log_without_impressions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JoinError, match=r"the log has no impressions; check the address"):
        join_log(log_of([]), tmp_path / "out", Wanted(WINDOW))
    log = Log([impression(1, BASE_MS, 7, [10])], [], [])
    with pytest.raises(JoinError, match=r"no impressions between --since and --until; .* 2023-11-14T22:13:20"):
        joined(log, tmp_path / "out", Wanted(WINDOW, Span(BASE_MS + 9_000)))
    with pytest.raises(JoinError, match=r"none is of surface search \(the log has home\); correct or omit --surface"):
        joined(log, tmp_path / "out", Wanted(WINDOW, surfaces=("search",)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wanted(Window(0, 0)), "--window must be longer than 0"),
        (lambda: Wanted(Window(-5, 0)), "--window must be longer than 0"),
        (lambda: Wanted(Window(5, -1)), "--clock-skew must not be negative"),
        (lambda: Wanted(Window(5, 0), Span(10, 10)), "--since must be before --until"),
    ],
)
def test_windows_and_spans_that_hold_nothing_are_refused(make: Callable[[], Wanted], message: str) -> None:
    with pytest.raises(JoinError, match=message):
        make()


def test_reports_of_unknown_requests_and_positions_are_counted(tmp_path: Path) -> None:
    rows = [impression(1, BASE_MS, 7, [10, 11, 12]), impression(2, BASE_MS, 7, [10, 11])]
    manifest = joined(Log(rows, [], [seen(1, 0), seen(1, 2, 9), seen(5, 0), seen(5, 1)]), tmp_path / "out")
    assert seen_of(tmp_path / "out") == {1: [True, False, True], 2: [True, True]}
    counts = manifest.counts
    assert (counts.reported_requests, counts.seen_without_request, counts.seen_beyond_answer) == (1, 1, 1)


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


def test_a_folder_that_is_no_joined_dataset_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(JoinError, match=r"is not a joined dataset.*pinrank impressions join LOG --window 30m --out"):
        read_slates(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(JoinError, match="manifest.json is damaged"):
        read_slates(tmp_path)
    (tmp_path / "manifest.json").write_text('{"fingerprint": "old"}')
    with pytest.raises(JoinError, match="joined by another version of pinrank"):
        read_slates(tmp_path)


def test_a_join_writes_over_nothing_that_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(JoinError, match=r"holds notes.txt, which no join wrote"):
        joined(Log([impression(1, BASE_MS, 7, [10])], [], []), tmp_path)
    with pytest.raises(JoinError, match=r"notes.txt is a file"):
        joined(Log([impression(1, BASE_MS, 7, [10])], [], []), tmp_path / "notes.txt")
