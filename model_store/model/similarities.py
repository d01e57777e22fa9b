"""How similar a candidate is to its user, the query and each kind of past action: the products a ranker starts from.

One function computes them from the assembled tensors of a request, so that training, serving and the baselines that a
network is held against read the same numbers. A network has to learn these products from the vectors; a tree cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kernels.engine import FeatureBatch

#: The newest actions that have columns of their own.
NEWEST = 5


def similarity_names(actions: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns of `similarities` for these kinds of action: K = 6 + 2A names.

    `user` and `query` are dot products. All others are cosines between the candidate and the pins of the sequence: over
    all of them, over the newest five, and over those of one kind of action.
    """
    groups = ("sequence", f"newest_{NEWEST}", *actions)
    return ("user", "query", *(f"{group}_{statistic}" for group in groups for statistic in ("max", "mean")))


def similarities(
    pins: np.ndarray,
    user: np.ndarray,
    query: np.ndarray,
    sequence: np.ndarray,
    sequence_actions: np.ndarray,
    actions: int,
) -> np.ndarray:
    """Compare the candidates of one request with its user, its query and its sequence.

    Args:
        pins: float32[N, D], vectors of the candidates.
        user: float32[D], in the same space.
        query: float32[D], zeros without a query.
        sequence: float32[L, D], vectors of the pins of the newest actions, newest first, zeros past the end.
        sequence_actions: int64[L], the code of each action plus one, 0 past the end.
        actions: A, the number of kinds of action.

    Returns:
        float32[N, 6 + 2A], in the order of `similarity_names`. A cosine with a vector of zeros is 0, and so are the
        columns of a sequence, or a kind of action, without entries. What is not finite in a vector stays not finite.

    Cost: one product of [N, D] with [D, L]; memory for N * L numbers.
    """
    found = np.zeros((len(pins), 6 + 2 * actions), np.float32)
    found[:, 0] = pins @ user
    found[:, 1] = pins @ query
    length = int(np.count_nonzero(sequence_actions))  # entries are newest first, and the padding follows them
    if not length:
        return found
    cosines = _unit(pins) @ _unit(sequence[:length]).T
    kinds = sequence_actions[:length]
    members = [np.ones(length, bool), np.arange(length) < NEWEST, *(kinds == code + 1 for code in range(actions))]
    for place, member in enumerate(members):
        if member.any():
            own = cosines[:, member]
            found[:, 2 + 2 * place] = own.max(axis=1)
            found[:, 3 + 2 * place] = own.mean(axis=1)
    return found


def similarities_of_batch(batch: FeatureBatch, actions: int) -> np.ndarray:
    """Return `similarities` of all requests of a batch, float32[N, 6 + 2A].

    Args:
        batch: with the tensors `user_embedding`, `query`, `sequence_embeddings`, `sequence_actions` and
            `pin_embedding`.
        actions: A, the number of kinds of action.
    """
    request, pins = batch.request, batch.candidate["pin_embedding"]
    found = np.empty((batch.rows, 6 + 2 * actions), np.float32)
    for number in range(batch.requests):
        rows = slice(int(batch.row_splits[number]), int(batch.row_splits[number + 1]))
        found[rows] = similarities(
            pins[rows],
            request["user_embedding"][number],
            request["query"][number],
            request["sequence_embeddings"][number],
            request["sequence_actions"][number],
            actions,
        )
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return float32[N, D], scaled to length one; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths == 0, 1, lengths), np.float32)
