"""What a join refuses, and what it leaves as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from impressions.dataset import JoinError, read_slates
from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from impressions.joining.records import Span
from tests.impressions.logs import Row, impression, log_of, reader, table
from tests.impressions.random_logs import (
    BASE_MS,
    WINDOW,
    Log,
    content,
    joined,
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"propensities": [1.0, 0.0]}, "request 5 of the log has a value in propensities that must be above 0"),
        ({"propensities": [1.0, 1.5]}, "request 5 of the log has a value in propensities that must be above 0"),
        ({"propensities": [1.0, math.nan]}, "request 5 of the log has a value in propensities that must be above 0"),
        ({"order_propensity": 0.0}, "request 5 of the log has an order_propensity that must be above 0"),
        ({"order_propensity": math.nan}, "request 5 of the log has an order_propensity that must be above 0"),
        ({"party_weights": [1.0, math.inf]}, "request 5 of the log has a party weight that is not finite"),
        ({"places": [3, 3]}, "request 5 of the log has places that repeat or that its request does not have"),
        ({"places": [0, 5]}, "request 5 of the log has places that repeat or that its request does not have"),
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
    # Requests shortly before and after the span are read, too.
    with pytest.raises(JoinError, match=r"no impressions between --since and --until; .* 2023-11-14T22:13:20"):
        joined(log, tmp_path / "out", Wanted(WINDOW, Span(BASE_MS - 1, BASE_MS)))
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
