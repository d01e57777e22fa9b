"""How good scores are, head by head. Every function takes one head's column."""

from __future__ import annotations

import numpy as np

TOP = 3
BINS = 15


def hit_at(scores: np.ndarray, labels: np.ndarray, row_splits: np.ndarray, top: int = TOP) -> float:
    """Return HIT@k: how many of a request's k best-scored pins received the action, averaged over requests.

    Requests in which no candidate received it do not count. Equal scores count in the order of the rows.

    Args:
        scores: float[N].
        labels: float[N] of 0 and 1.
        row_splits: int[R + 1].
        top: k.

    Returns:
        A mean in [0, k]; NaN when no request counts.
    """
    counts = np.diff(row_splits)
    request = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-scores, request))
    rank = np.arange(len(order)) - np.repeat(row_splits[:-1], counts)
    hits = np.bincount(request, labels[order] * (rank < top), len(counts))
    counted = np.bincount(request, labels, len(counts)) > 0
    return float(hits[counted].mean()) if counted.any() else float("nan")


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the chance that a row with the action outscores one without; equal scores count half.

    NaN when all rows are of one kind.
    """
    positive = labels > 0
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    _, value, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(counts) - (counts - 1) / 2
    wins = middle_rank[value][positive].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error: |mean probability - share with the action|, over equal bins of [0, 1]."""
    if not len(labels):
        return float("nan")
    place = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, probabilities.astype(np.float64) - labels, bins)
    return float(np.abs(gap).sum() / len(labels))
