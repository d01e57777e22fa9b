"""Keeps the vectors of pins up with what users do: those that new actions touch are made anew, by the same network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feature_client.codec import RowState
from feature_client.groups import FeatureGroup
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinEmbeddings
from ranker.data.features import pin_rows
from ranker.data.folding import folded_in
from ranker.embedding.graph.edges import LogEdges
from ranker.embedding.pins.as_of import NetworkVectors, features_as_of, vectors_over


@dataclass(frozen=True, slots=True)
class Round:
    """What has to be written after new actions.

    Attributes:
        users: how many users have new actions.
        touched: how many pins have a new vector: those that these users liked, now or before.
        pin_ids: uint64[N], the pins whose row has changed, in its vector or its counts.
        rows: structured[N] of the group, whole rows.
    """

    users: int
    touched: int
    pin_ids: np.ndarray
    rows: np.ndarray


class Follower:
    """Tells which rows of a group of pins have to be written as a log grows.

    The first round makes all vectors and rows. Later ones make those of touched pins; others, of which only walks of
    several steps lead to what is new, keep theirs until they are touched, or until a new start.

    Args:
        vectors: the network.
        group: the group of pins, with an embedding in the network's space.
    """

    def __init__(self, vectors: NetworkVectors, group: FeatureGroup) -> None:
        self._vectors, self._group = vectors, group
        space = vectors.space
        self._known = PinEmbeddings(np.zeros(0, np.uint64), np.zeros((0, space.dim), np.float16), space)
        self._likes: dict[int, int] = {}
        self._pin_ids, self._rows = np.zeros(0, np.uint64), np.zeros(0, group.dtype)

    def follow(self, log: ActionLog, before_ms: int) -> Round:
        """Return what has changed since the last call.

        Args:
            log: the whole history; only events strictly before `before_ms` are read. Events may come late: what counts
                is whether they were there at the last call.
            before_ms: Unix time in milliseconds.

        Raises:
            DatasetError: the group has fields that the data does not.
        """
        stop = log.before(before_ms)
        liked = log.schema.affinities[log.action[:stop]] > 0
        user_ids, counts = np.unique(log.user_ids[log.user[:stop][liked]], return_counts=True)
        likes = dict(zip(user_ids.tolist(), counts.tolist(), strict=True))
        acting = np.array([user for user, count in likes.items() if self._likes.get(user) != count], np.uint64)
        by_acting = np.isin(log.user_ids[log.user[:stop]], acting) & liked
        touched = np.unique(log.pin_ids[log.pin[:stop][by_acting]])
        known = self._known
        if len(touched):
            trained = self._vectors.trained
            features = features_as_of(trained, log, before_ms)
            edges = LogEdges(log, before_ms)
            known = _with(known, vectors_over(trained, edges, features, self._vectors.task, touched))
        numbers = known.of(log.pin_ids)
        found = pin_rows(log, self._group, numbers, before_ms, folded_in(log, numbers, stop))
        there = np.flatnonzero(found.states == RowState.PRESENT)
        there = there[np.argsort(log.pin_ids[there])]
        pin_ids, rows = log.pin_ids[there], found.rows[there]
        changed = self._changed(pin_ids, rows)
        # Last, so that a round that fails is made again.
        self._known, self._likes, self._pin_ids, self._rows = known, likes, pin_ids, rows
        return Round(len(acting), len(touched), pin_ids[changed], rows[changed])

    def forget_rows(self) -> None:
        """Write all rows in the next round: the last ones may not have reached the store."""
        self._pin_ids, self._rows = self._pin_ids[:0], self._rows[:0]

    def _changed(self, pin_ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return bool[N], the rows that are not as they were in the last round."""
        if not len(self._pin_ids):
            return np.ones(len(pin_ids), bool)
        index = np.searchsorted(self._pin_ids, pin_ids).clip(max=len(self._pin_ids) - 1)
        same: np.ndarray = (self._pin_ids[index] == pin_ids) & (_bytes(self._rows[index]) == _bytes(rows)).all(axis=1)
        return ~same


def _bytes(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.dtype.itemsize)


def _with(known: PinEmbeddings, new: PinEmbeddings) -> PinEmbeddings:
    """Return vectors of both, the new ones for pins that are in both."""
    kept = ~np.isin(known.pin_ids, new.pin_ids)
    pin_ids = np.concatenate([known.pin_ids[kept], new.pin_ids])
    order = np.argsort(pin_ids)
    vectors = np.concatenate([known.vectors[kept], new.vectors])
    return PinEmbeddings(pin_ids[order], vectors[order], known.space)
