"""How good scores are, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOP = 3
BINS = 15


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The rows whose probability falls into one of the equal bins of [0, 1]: what was said, and what came."""

    mean_probability: float
    observed_share: float
    count: int


def hits(scores: np.ndarray, labels: np.ndarray, row_splits: np.ndarray, top: int = TOP) -> np.ndarray:
    """Count how many of each request's k best-scored pins received each action.

    The order is the server's: descending, equal scores in the order of the rows, scores that are no number last.

    Args:
        scores: float[N], what the candidates are ordered by.
        labels: [N, H] of 0 and 1.
        row_splits: int[R + 1].
        top: k.

    Returns:
        float64[R, H], whole numbers in [0, k].
    """
    starts, counts = row_splits[:-1].astype(np.int64), np.diff(row_splits).astype(np.int64)
    request = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-np.where(np.isfinite(scores), scores, -np.inf), request))
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    best = order[rank < top]
    found = [np.bincount(request[best], column[best], len(counts)) for column in labels.T]
    return np.stack(found, axis=-1)


def requests_with(labels: np.ndarray, row_splits: np.ndarray) -> np.ndarray:
    """Return bool[R, H], the requests in which some candidate received each action of [N, H]: those that HIT@k counts.

    The others score 0 whatever the order. Leaving them out multiplies every model's HIT@k by the same factor, so that
    no relative difference depends on it.
    """
    before = np.concatenate([np.zeros((1, labels.shape[1])), np.cumsum(labels, axis=0, dtype=np.float64)])
    return np.asarray(np.diff(before[row_splits], axis=0) > 0)


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


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> tuple[ReliabilityBin, ...]:
    """Return the bins that hold any row, lowest first; rows whose probability is no number are in none."""
    finite = np.isfinite(probabilities)
    said, came = probabilities[finite].astype(np.float64), labels[finite].astype(np.float64)
    place = np.clip((said * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = np.flatnonzero(count)
    mean = np.bincount(place, said, bins)[filled] / count[filled]
    share = np.bincount(place, came, bins)[filled] / count[filled]
    return tuple(ReliabilityBin(float(m), float(s), int(c)) for m, s, c in zip(mean, share, count[filled], strict=True))


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the expected calibration error: the bins' |mean probability - observed share|, weighted by their rows.

    NaN when there is no row.
    """
    rows = sum(b.count for b in bins)
    gap = sum(abs(b.mean_probability - b.observed_share) * b.count for b in bins)
    return gap / rows if rows else float("nan")
