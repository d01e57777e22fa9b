"""What a baseline says about the rows of a test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Names in tables, JSON and lineage.
DOT_PRODUCT = "dot product"
ITEM_KNN = "item kNN"
TREES = "LightGBM"
RANKING_TREES = "LightGBM ranking"


@dataclass(frozen=True, slots=True)
class BaselineScores:
    """Scores of N rows.

    Attributes:
        heads: the heads that the baseline ranks for.
        by_head: float32[N, H], in the order of `heads`; higher is better.
        probabilities: whether `by_head` holds probabilities, of which a utility can be made.
        order: float32[N], the final order of a baseline that has only one; None otherwise.
    """

    heads: tuple[str, ...]
    by_head: np.ndarray
    probabilities: bool = False
    order: np.ndarray | None = None


def one_order(heads: tuple[str, ...], scores: np.ndarray) -> BaselineScores:
    """Return the scores of a baseline that ranks alike for every head, from float32[N]."""
    return BaselineScores(heads, np.repeat(scores[:, None], len(heads), axis=1), order=scores)
