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


@dataclass(frozen=True, slots=True)
class TreeTraining:
    """What the trees learned from.

    Attributes:
        requests: number of requests.
        rows: number of rows.
        requests_of_network: about how many requests a network learns from on the same data.
    """

    requests: int
    rows: int
    requests_of_network: int

    @property
    def fewer(self) -> bool:
        """Whether the trees learned from a sample only: by more than sampling explains."""
        return self.requests < 0.9 * self.requests_of_network

    def __str__(self) -> str:
        if not self.fewer:
            return f"LightGBM learned from {self.requests:,} requests with {self.rows:,} rows, as many as a network."
        return (
            f"LightGBM learned from a sample of {self.requests:,} of the about {self.requests_of_network:,} requests "
            f"({self.rows:,} rows) that the training of a network may use; with more, it may be better."
        )


def one_order(heads: tuple[str, ...], scores: np.ndarray) -> BaselineScores:
    """Return the scores of a baseline that ranks alike for every head, from float32[N]."""
    return BaselineScores(heads, np.repeat(scores[:, None], len(heads), axis=1), order=scores)
