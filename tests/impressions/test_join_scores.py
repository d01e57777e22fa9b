"""The join of answers in which some pins have no scores, and of values that are not numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from impressions.dataset import read_manifest, read_slates
from tests.impressions.logs import Row, action, impression, seen
from tests.impressions.random_logs import BASE_MS, Log, attributed_of, content, joined, seen_of


def trimmed(request_id: int, *pins: int, scored: int, user_id: int = 7) -> Row:
    """Return an answer in which only the first pins have scores, as servers trim requests under overload."""
    lacking = len(pins) - scored
    row = impression(request_id, BASE_MS, user_id, pins, candidates=len(pins), degradation=[("pins_trimmed", lacking)])
    for name, each in (("utilities", 1), ("party_utilities", 2), ("probabilities", 2), ("attribute_values", 1)):
        row[name][scored * each :] = [math.nan] * (lacking * each)
    return row


def test_an_answer_that_was_trimmed_keeps_the_pins_with_scores_and_what_became_of_them(tmp_path: Path) -> None:
    rows = [trimmed(1, 10, 11, 12, scored=2), impression(2, BASE_MS, 8, [10, 11], candidates=2)]
    events = [
        action(1, 7, 11, BASE_MS + 1, request_id=1, position=1),
        action(2, 7, 12, BASE_MS + 2, request_id=1, position=2),
        action(3, 7, 12, BASE_MS + 3),
        action(4, 8, 10, BASE_MS + 4),
        action(5, 7, 13, BASE_MS + 5, request_id=1),
    ]
    manifest = joined(Log(rows, events, [seen(1, 0, 2)]), tmp_path / "out")
    counts = manifest.counts
    assert (counts.requests, counts.pins, counts.cut_requests, counts.cut_pins) == (2, 4, 1, 1)
    assert (counts.left_out, counts.seen_beyond_answer) == ({}, 0)
    assert counts.unattributed == {"pin_not_shown": 1, "pin_without_scores": 2}
    assert attributed_of(tmp_path / "out") == {(7, 1): (1, 1), (8, 4): (2, 0)}
    (slates,) = read_slates(tmp_path / "out")
    assert slates.row_splits.tolist() == [0, 2, 4]
    assert slates.candidates.tolist() == [3, 2]  # so `explore evaluate` leaves the first one out, and says so
    assert slates.pin_ids.tolist() == [10, 11, 10, 11]
    assert slates.seen.tolist() == [True, False, True, True]
    assert slates.labels[:, slates.actions.index("save")].tolist() == [False, True, True, False]
    for name in ("probabilities", "party_utilities", "utilities", "attribute_values"):
        assert np.isfinite(getattr(slates, name)).all()
    whole = impression(1, BASE_MS, 7, [10, 11])
    np.testing.assert_array_equal(slates.probabilities[:2].ravel(), np.float32(whole["probabilities"]))
    assert slates.party_utilities[:2].ravel().tolist() == whole["party_utilities"]


def test_an_answer_without_any_score_is_left_out(tmp_path: Path) -> None:
    rows = [trimmed(1, 10, 11, scored=0), trimmed(2, 10, scored=1), impression(3, BASE_MS, 7, [])]
    counts = joined(Log(rows, [], []), tmp_path / "out").counts
    assert (counts.requests, counts.pins, counts.cut_requests) == (2, 1, 0)
    assert counts.left_out == {"scores that are not finite": 1}


def test_a_pin_without_one_of_its_scores_has_none(tmp_path: Path) -> None:
    """Models differ in heads and parties, so lists of a row need not be as long as those of the next."""
    one_head = impression(1, BASE_MS, 7, [10, 11, 12], heads=["save"], probabilities=[0.5, math.nan, math.nan])
    other = impression(2, BASE_MS, 7, [10, 11, 12])
    other["probabilities"][-1] = math.inf
    one_party = impression(3, BASE_MS, 7, [10, 11, 12], parties=["pinner"], party_weights=[1.0])
    one_party["party_utilities"] = [1.0, 1.0, math.nan]
    amid = impression(4, BASE_MS, 7, [10, 11, 12])
    amid["probabilities"][2] = math.nan
    counts = joined(Log([one_head, other, one_party, amid], [], []), tmp_path / "out").counts
    assert {s: len(p) for s, p in seen_of(tmp_path / "out").items()} == {1: 1, 2: 2, 3: 2}
    assert (counts.cut_requests, counts.cut_pins) == (3, 4)
    assert counts.left_out == {"scores that are not finite": 1}


@pytest.mark.parametrize("field", ["attribute_values", "query_vector", "utilities"])
def test_a_row_with_a_value_that_is_not_a_number_may_be_repeated(tmp_path: Path, field: str) -> None:
    row = impression(1, BASE_MS, 7, [10, 11], **{field: [0.5, math.nan]})
    other = impression(2, BASE_MS, 7, [10])
    once = joined(Log([row, other], [], []), tmp_path / "once")
    twice = joined(Log([row, other, other, row], [], []), tmp_path / "twice")
    assert twice == once
    assert once.counts.left_out == {}
    differs = {**row, field: [0.25, math.nan]}
    assert joined(Log([row, other, differs], [], []), tmp_path / "o").counts.left_out == {"rows that differ": 1}


def test_which_of_two_equal_zeros_a_row_has_does_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    rows = [impression(1, BASE_MS, 7, [10], attribute_values=[zero]) for zero in (0.0, -0.0)]
    other = impression(2, BASE_MS, 7, [10])
    for name, some in (("one", [*rows, other]), ("other", [*rows[::-1], other])):
        joined(Log(some, [], []), tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "other")
    assert read_manifest(tmp_path / "one").counts.left_out == {"rows that differ": 1}
