from __future__ import annotations

import math

import numpy as np
import pytest

from ranker.calibration import fit_calibration
from ranker.metrics import auc, calibration_error, hit_at


def test_hit_at_counts_actions_among_the_best_of_each_request_that_has_any() -> None:
    scores = np.array([0.9, 0.8, 0.1, 0.7, 0.2, 0.3, 0.4, 0.5, 0.6])
    labels = np.array([1, 0, 1, 1, 0, 0, 0, 0, 1])
    splits = np.array([0, 4, 7, 9])
    # First request: the best three are rows 0, 1 and 3, with two actions. The second has none. The third has one.
    assert hit_at(scores, labels, splits) == pytest.approx((2 + 1) / 2)
    assert hit_at(scores, labels, splits, top=1) == pytest.approx((1 + 1) / 2)
    assert math.isnan(hit_at(scores, np.zeros(9), splits))


def test_auc_counts_pairs_and_halves_ties() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.1])
    labels = np.array([1, 1, 0, 0])
    assert auc(scores, labels) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auc(-scores, labels) == pytest.approx(0.5 / 4)
    assert math.isnan(auc(scores, np.ones(4)))


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    probabilities = np.array([0.1, 0.1, 0.9, 1.0])
    labels = np.array([0, 1, 1, 1])
    # Two bins: the lower says 0.1 and has 0.5, the upper says 0.95 and has 1.
    assert calibration_error(probabilities, labels, bins=2) == pytest.approx(0.5 * 0.4 + 0.5 * 0.05)


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
