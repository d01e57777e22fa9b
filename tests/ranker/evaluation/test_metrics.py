from __future__ import annotations

import math

import numpy as np
import pytest

from model_store.model.selection import select
from ranker.evaluation.metrics import (
    Decile,
    ReliabilityBin,
    auc,
    calibration_error,
    deciles,
    hits,
    reliability,
    requests_with,
    worst_decile,
)
from ranker.network.calibration import fit_calibration


def test_hit_at_3_is_the_mean_over_the_requests_that_count() -> None:
    scores = np.array([0.9, 0.8, 0.1, 0.7, 0.2, 0.3, 0.4, 0.5, 0.6])
    labels = np.array([[1, 0, 1, 1, 0, 0, 0, 0, 1]]).T
    splits = np.array([0, 4, 7, 9])
    # First request: the best three are rows 0, 1 and 3, with two actions. The second has none. The third has one.
    counted = requests_with(labels, splits)
    assert hits(scores, labels, splits)[counted].mean() == pytest.approx((2 + 1) / 2)
    assert hits(scores, labels, splits, top=1)[counted].mean() == pytest.approx((1 + 1) / 2)


def test_hits_of_every_head_are_counted_in_one_order() -> None:
    utilities = np.array([0.3, 0.9, 0.1, 0.5, 1.0, 2.0])
    save = [0, 1, 1, 0, 1, 0]
    hide = [1, 0, 0, 1, 0, 0]
    found = hits(utilities, np.array([save, hide]).T, np.array([0, 4, 6]))
    # The best three of the first request are rows 1, 3 and 0; the second has two rows, both among its best three.
    assert found.tolist() == [[1, 2], [1, 0]]


def test_equal_scores_stay_in_the_order_of_the_rows_and_what_is_no_number_sinks() -> None:
    labels = np.eye(6)
    ties = np.full(6, 0.5)
    assert hits(ties, labels, np.array([0, 6])).tolist() == [[1, 1, 1, 0, 0, 0]]
    scores = np.array([np.nan, 0.1, np.inf, 0.1, -np.inf, -5.0])
    # As the server selects: an infinite utility is no more to be trusted than none.
    assert hits(scores, labels, np.array([0, 6])).tolist() == [[0, 1, 0, 1, 0, 1]]


def test_the_order_is_the_one_that_the_server_selects() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        scores = rng.choice([0.1, 0.2, 0.3, np.nan, np.inf], 12).astype(np.float32)
        chosen = select(scores, 3)
        assert set(np.flatnonzero(hits(scores, np.eye(12), np.array([0, 12]))[0])) == set(chosen.tolist())


def test_a_request_counts_for_the_actions_that_some_candidate_received() -> None:
    labels = np.array([[0, 1], [1, 0], [0, 0], [0, 1]])
    assert requests_with(labels, np.array([0, 2, 3, 4])).tolist() == [[True, True], [False, False], [False, True]]


def test_auc_counts_pairs_and_halves_ties() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.1])
    labels = np.array([1, 1, 0, 0])
    assert auc(scores, labels) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auc(-scores, labels) == pytest.approx(0.5 / 4)
    assert math.isnan(auc(scores, np.ones(4)))


def test_reliability_bins_say_what_was_promised_and_what_came() -> None:
    bins = reliability(np.array([0.1, 0.3, 0.9, 1.0, np.nan]), np.array([0, 1, 1, 1, 1]), bins=2)
    assert bins == (ReliabilityBin(0.2, 0.5, 2), ReliabilityBin(0.95, 1.0, 2))


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    probabilities = np.array([0.1, 0.1, 0.9, 1.0])
    labels = np.array([0, 1, 1, 1])
    # Two bins: the lower says 0.1 and has 0.5, the upper says 0.95 and has 1.
    assert calibration_error(reliability(probabilities, labels, bins=2)) == pytest.approx(0.5 * 0.4 + 0.5 * 0.05)
    assert math.isnan(calibration_error(()))


def test_deciles_say_of_a_rare_action_what_its_bins_cannot() -> None:
    # 10,000 rows. The last tenth promises 7.4% and gets 2.1%; all others promise and get next to nothing.
    probabilities = np.concatenate([np.linspace(0, 1e-6, 9_000), np.full(1_000, 0.074), [np.nan]])
    labels = np.concatenate([np.zeros(9_000), np.arange(1_000) < 21, [1]])
    assert calibration_error(reliability(probabilities, labels)) < 0.02
    found = deciles(probabilities, labels)
    assert [decile.rows for decile in found] == [1_000] * 10
    assert found[-1].expected == pytest.approx(74)
    assert found[-1].observed == 21
    assert found[-1].off == pytest.approx(21 / 74 - 1)
    assert found[0].off is None  # too few to say anything
    assert worst_decile(found) == found[-1]
    assert worst_decile(found[:-1]) is None
    assert deciles(np.empty(0), np.empty(0)) == ()


def test_a_decile_is_judged_from_more_than_fifty_predicted_actions_on() -> None:
    assert Decile(50.0, 90, 500).off is None
    assert Decile(60.0, 90, 500).off == pytest.approx(0.5)
    assert Decile(0.0, 60, 500).off is None


def test_calibration_recovers_the_line_that_made_the_labels() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=200_000)
    labels = (rng.random(200_000) < 1 / (1 + np.exp(-(0.5 * logits - 2)))).astype(np.float32)
    fitted = fit_calibration(logits, labels)
    assert fitted.slope == pytest.approx(0.5, abs=0.02)
    assert fitted.intercept == pytest.approx(-2, abs=0.02)


def test_calibration_never_reverses_the_order() -> None:
    logits = np.linspace(-3, 3, 1000)
    fitted = fit_calibration(logits, (logits < 0).astype(np.float32))
    assert fitted.slope == 1.0
    assert abs(fitted.intercept) < 0.1


def test_calibration_of_a_head_without_positives_stays_finite() -> None:
    fitted = fit_calibration(np.linspace(-1, 1, 100), np.zeros(100, np.float32))
    assert fitted.slope > 0
    assert -20 < fitted.intercept < -1
