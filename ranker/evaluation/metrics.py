"""Metrics of scores, head by head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model_store.model.selection import order_rows

TOP = 3
BINS = 15
DECILES = 10
#: With fewer actions than this, chance alone moves the number of actions by more than a third.
DECILE_ACTIONS_MIN = 50.0


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The rows with probabilities in one of the equal bins of [0, 1]: their mean prediction and observed share."""

    mean_probability: float
    observed_share: float
    count: int


@dataclass(frozen=True, slots=True)
class Decile:
    """A tenth of all rows in the order of their probability: how many actions were predicted, and how many came."""

    expected: float
    observed: int
    rows: int

    @property
    def off(self) -> float | None:
        """How many more actions came than predicted, relative to the prediction; None where there are too few."""
        return self.observed / self.expected - 1 if self.expected > DECILE_ACTIONS_MIN else None

    @property
    def factor(self) -> float:
        """How many times more, or fewer, actions came than predicted: at least 1, infinite if none came."""
        if min(self.expected, self.observed) <= 0:
            return math.inf
        return max(self.observed / self.expected, self.expected / self.observed)


def hits(scores: np.ndarray, labels: np.ndarray, row_splits: np.ndarray, top: int = TOP) -> np.ndarray:
    """Count how many of the k best pins of each request received each action.

    The order is that of the server: descending, equal scores in the order of the rows, non-finite scores last.

    Args:
        scores: float[N], scores of the candidates.
        labels: [N, H] of 0 and 1.
        row_splits: int[R + 1].
        top: k.

    Returns:
        float64[R, H], whole numbers in [0, k].
    """
    starts, counts = row_splits[:-1].astype(np.int64), np.diff(row_splits).astype(np.int64)
    request = np.repeat(np.arange(len(counts)), counts)
    order = order_rows(scores, request)
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    best = order[rank < top]
    found = [np.bincount(request[best], column[best], len(counts)) for column in labels.T]
    return np.stack(found, axis=-1)


def requests_with(labels: np.ndarray, row_splits: np.ndarray) -> np.ndarray:
    """Return bool[R, H], whether some candidate of the request received the action: the requests that HIT@k counts.

    All other requests score 0 in any order. Leaving them out multiplies the HIT@k of every model by the same factor, so
    relative differences do not depend on it.
    """
    before = np.concatenate([np.zeros((1, labels.shape[1])), np.cumsum(labels, axis=0, dtype=np.float64)])
    return np.asarray(np.diff(before[row_splits], axis=0) > 0)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the probability that a row with the action outscores one without it; equal scores count half.

    NaN if all rows have or all rows lack the action.
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
    """Return the non-empty bins, lowest first; rows with a non-finite probability are in no bin."""
    finite = np.isfinite(probabilities)
    said, came = probabilities[finite].astype(np.float64), labels[finite].astype(np.float64)
    place = np.clip((said * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = np.flatnonzero(count)
    mean = np.bincount(place, said, bins)[filled] / count[filled]
    share = np.bincount(place, came, bins)[filled] / count[filled]
    return tuple(ReliabilityBin(float(m), float(s), int(c)) for m, s, c in zip(mean, share, count[filled], strict=True))


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the expected calibration error: |mean probability - observed share| per bin, weighted by its rows.

    NaN if there are no rows.
    """
    rows = sum(b.count for b in bins)
    gap = sum(abs(b.mean_probability - b.observed_share) * b.count for b in bins)
    return gap / rows if rows else float("nan")


def deciles(probabilities: np.ndarray, labels: np.ndarray) -> tuple[Decile, ...]:
    """Divide the rows into tenths by probability, lowest first; rows with a non-finite probability are in none.

    Unlike the bins of `reliability`, tenths say something about a rare action too: all its probabilities lie in the
    lowest bin.
    """
    finite = np.flatnonzero(np.isfinite(probabilities))
    order = finite[np.argsort(probabilities[finite], kind="stable")]
    return tuple(
        Decile(float(probabilities[part].sum(dtype=np.float64)), int(labels[part].sum(dtype=np.float64)), len(part))
        for part in np.array_split(order, DECILES)
        if len(part)
    )


def worst_decile(found: Sequence[Decile]) -> Decile | None:
    """Return the decile whose number of actions differs most from the prediction; None if all have too few."""
    judged = [decile for decile in found if decile.off is not None]
    return max(judged, key=lambda decile: abs(decile.off or 0.0), default=None)
