"""The best mixture of orders by a linear program over each request's assignments: slow, and independent of the dual."""

from __future__ import annotations

import numpy as np
from scipy.optimize import OptimizeResult, linprog
from scipy.sparse import csr_matrix, vstack

from ranker.tuning.orders import ScoredRequests


def best_mixture(requests: ScoredRequests, objective: np.ndarray, constraints: np.ndarray, thetas: np.ndarray) -> float:
    """Return the most that mixtures of orders are worth, NaN if none meets the thetas.

    Args:
        requests: the requests; no row may be other than finite.
        objective: float64[P], the weights of the objective.
        constraints: float64[C, P], those of each constraint.
        thetas: float64[C].
    """
    counts = np.diff(requests.row_splits)
    worth = [1 / np.log2(np.arange(count) + 2) for count in counts]
    columns, row_of, position_of, first = [], [], [], 0
    for request, count in enumerate(counts):
        u = requests.utilities[requests.row_splits[request] :][:count]
        columns.append(np.einsum("rp,k->prk", u, worth[request]).reshape(u.shape[1], -1))
        places = first + np.arange(count)
        row_of.append(np.repeat(places, count))
        position_of.append(np.tile(places, count))
        first += count
    values = np.concatenate(columns, axis=1) / requests.requests
    each = np.arange(values.shape[1])
    once = [
        csr_matrix((np.ones(len(each)), (np.concatenate(of), each)), (first, len(each))) for of in (row_of, position_of)
    ]
    found: OptimizeResult = linprog(
        -objective @ values, -constraints @ values, -thetas, vstack(once), np.ones(2 * first), (0, None), method="highs"
    )
    assert found.status in (0, 2), found.message  # solved, or infeasible
    return float("nan") if found.status else float(-found.fun)
