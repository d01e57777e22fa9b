"""Logistic calibration: converts the logits of a head to calibrated probabilities."""

from __future__ import annotations

import numpy as np

from model_store.bundle.manifest import Calibration

_STEPS = 50
_TOLERANCE = 1e-9
#: Pulls towards slope 1 and intercept 0 with the weight of a few rows, so that a head without evidence stays finite.
_RIDGE = 1.0


def fit_calibration(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Calibration:
    """Fit sigmoid(slope * logit + intercept) to labels by Newton's method (Platt scaling).

    Args:
        logits: float[N], of one head.
        labels: float[N] of 0 and 1.
        weights: float[N], how much each row counts; None counts all alike.

    Returns:
        The fit. If the best slope is not positive, calibration would reverse the order; then slope 1 and the best
        intercept for it.
    """
    logits, labels = logits.astype(np.float64), labels.astype(np.float64)
    counts = np.ones(len(logits)) if weights is None else weights.astype(np.float64)
    line = np.stack([logits, np.ones_like(logits)], axis=-1)
    slope, intercept = _newton(line, labels, counts, np.array([1.0, 0.0]), 0.0)
    if slope <= 0:
        slope, (intercept,) = 1.0, _newton(np.ones((len(logits), 1)), labels, counts, np.zeros(1), logits)
    return Calibration(slope=float(slope), intercept=float(intercept))


def _newton(
    inputs: np.ndarray, labels: np.ndarray, counts: np.ndarray, prior: np.ndarray, offset: np.ndarray | float
) -> np.ndarray:
    """Return float64[K] coefficients of a logistic regression with an offset and a ridge towards `prior`."""
    coefficients = prior.copy()
    for _ in range(_STEPS):
        probabilities = 0.5 * np.tanh(0.5 * (inputs @ coefficients + offset)) + 0.5
        gradient = inputs.T @ (counts * (probabilities - labels)) + _RIDGE * (coefficients - prior)
        curvature = (inputs * (counts * probabilities * (1 - probabilities))[:, None]).T @ inputs
        step = np.linalg.solve(curvature + _RIDGE * np.eye(len(prior)), gradient)
        coefficients -= np.clip(step, -2.0, 2.0)  # a full step may overshoot
        if np.abs(step).max() < _TOLERANCE:
            break
    return coefficients
