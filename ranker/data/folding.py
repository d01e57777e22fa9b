"""Vectors of pins that a producer did not know, derived from the users who acted on them."""

from __future__ import annotations

import numpy as np

from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinEmbeddings

_FOLD_IN_ROUNDS = 2


def folded_in(log: ActionLog, vectors: np.ndarray, stop: int) -> np.ndarray:
    """Give each pin that the producer did not know a vector in its space, derived from the users who acted on it.

    A user is the mean of the pins acted on, and a new pin is the mean of its users, both weighted by affinity. A
    producer does this between two fits, so that the space does not change. A second round reaches users who know only
    new pins.

    Args:
        log: the history.
        vectors: float16[P, D], zeros for unknown pins; the others do not change.
        stop: the number of events to read.

    Returns:
        float32[P, D].
    """
    user, pin = log.user[:stop], log.pin[:stop]
    weight = log.schema.affinities[log.action[:stop]]
    found = vectors.astype(np.float32)
    new = np.flatnonzero(~np.any(vectors, axis=1))
    if not len(new):
        return found
    # Only events on new pins, and all events of their users, decide about the new pins.
    on_new = np.isin(pin, new)
    of_users = np.isin(user, user[on_new])
    for _ in range(_FOLD_IN_ROUNDS):
        users = means_of(user[of_users], pin[of_users], weight[of_users], found, len(log.user_ids))
        found[new] = means_of(pin[on_new], user[on_new], weight[on_new], users, len(log.pin_ids))[new]
    return found


def folded_vectors(log: ActionLog, vectors: PinEmbeddings, before_ms: int) -> PinEmbeddings:
    """Return vectors with those that `folded_in` gives newer pins, as float16 and in the same space.

    Args:
        log: the history; only events strictly before `before_ms` are read.
        vectors: which stay as they are.
        before_ms: Unix time in milliseconds.
    """
    known = vectors.of(log.pin_ids)
    folded = folded_in(log, known, log.before(before_ms)).astype(np.float16)
    new = np.flatnonzero(folded.any(axis=1) & ~known.any(axis=1))
    kept = ~np.isin(vectors.pin_ids, log.pin_ids[new])  # some have zeros
    pin_ids = np.concatenate([vectors.pin_ids[kept], log.pin_ids[new]])
    order = np.argsort(pin_ids)
    held = np.concatenate([vectors.vectors[kept], folded[new]])
    return PinEmbeddings(pin_ids[order], held[order], vectors.space)


def means_of(of: np.ndarray, over: np.ndarray, weight: np.ndarray, vectors: np.ndarray, count: int) -> np.ndarray:
    """Return float32[count, D], of length one or zero: the mean of the vectors that the events of each entity lead to.

    Cost: a `bincount` over all events per dimension, about 0.1 s for a million events.
    """
    counts = weight != 0
    of, over, weight = of[counts], over[counts], weight[counts]
    # A contiguous column fits a core's cache; every event reads one number of it.
    columns = [np.bincount(of, weight * column[over], count) for column in np.ascontiguousarray(vectors.T, np.float32)]
    folded = np.stack(columns, axis=-1)
    means: np.ndarray = folded / np.maximum(np.linalg.norm(folded, axis=1, keepdims=True), 1e-12)
    return means.astype(np.float32)
