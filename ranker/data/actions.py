"""The whole history as one columnar log of actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranker.data.recbole import AtomicDataset
from ranker.data.schema import CLOSEUPS, RATINGS, ActionRule, ActionSchema, read_schema
from ranker.errors import DatasetError

__all__ = ["CLOSEUPS", "RATINGS", "ActionLog", "ActionRule", "ActionSchema", "action_log", "read_schema"]


@dataclass(frozen=True, slots=True)
class ActionLog:
    """Everything that happened, oldest first.

    Attributes:
        schema: which actions there are.
        user_ids: uint64[U], ascending; `user` counts into it.
        pin_ids: uint64[P], ascending; `pin` counts into it.
        user: int64[E].
        pin: int64[E].
        time_ms: int64[E], ascending.
        labels: bool[E, A], one column per action of the schema, in its order.
        action: uint8[E], the strongest action's position in the schema.
        by_user: int64[E], event numbers grouped by user, each user's oldest first.
        user_splits: int64[U + 1]; user u's events are `by_user[user_splits[u]:user_splits[u + 1]]`.
    """

    schema: ActionSchema
    user_ids: np.ndarray
    pin_ids: np.ndarray
    user: np.ndarray
    pin: np.ndarray
    time_ms: np.ndarray
    labels: np.ndarray
    action: np.ndarray
    by_user: np.ndarray
    user_splits: np.ndarray

    @property
    def heads(self) -> tuple[str, ...]:
        """The schema's heads that occur at all, in its order; the others cannot be learned."""
        return tuple(head for head in self.schema.heads if self.label(head).any())

    def label(self, action: str) -> np.ndarray:
        """Return bool[E], which events are an action. Raises DatasetError for one that the schema does not have."""
        column: np.ndarray = self.labels[:, self.schema.position(action)]
        return column

    def before(self, time_ms: int) -> int:
        """Return how many events happened strictly before a time."""
        return int(np.searchsorted(self.time_ms, time_ms))


def strongest_action(labels: np.ndarray) -> np.ndarray:
    """Return uint8[E], the first action that each row of bool[E, A] has; every row must have one."""
    return np.asarray(labels.argmax(axis=1), np.uint8)


def action_log(dataset: AtomicDataset) -> ActionLog:
    """Turn interactions into the action log. Raises DatasetError when there are none."""
    if not len(dataset.users):
        raise DatasetError(f"dataset {dataset.name!r} holds no interactions")
    user_ids, user = np.unique(dataset.users, return_inverse=True)
    pin_ids, pin = np.unique(dataset.pins, return_inverse=True)
    counts = np.bincount(user, minlength=len(user_ids))
    return ActionLog(
        schema=dataset.schema,
        user_ids=user_ids,
        pin_ids=pin_ids,
        user=user,
        pin=pin,
        time_ms=dataset.time_ms,
        labels=dataset.labels,
        action=strongest_action(dataset.labels),
        by_user=np.argsort(user, kind="stable"),
        user_splits=np.concatenate([[0], np.cumsum(counts)]),
    )
