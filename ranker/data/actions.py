"""The whole history as a columnar log of actions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ranker.data.atomic.described import Described, Values
from ranker.data.atomic.recbole import AtomicDataset
from ranker.data.schema import CLOSEUPS, RATINGS, ActionRule, ActionSchema, read_schema
from ranker.errors import DatasetError

__all__ = ["CLOSEUPS", "RATINGS", "ActionLog", "ActionRule", "ActionSchema", "action_log", "read_schema"]


@dataclass(frozen=True, slots=True)
class ActionLog:
    """All events, oldest first.

    Attributes:
        schema: the actions.
        user_ids: uint64[U], ascending; `user` holds positions in it.
        pin_ids: uint64[P], ascending; `pin` holds positions in it.
        user: int64[E].
        pin: int64[E].
        time_ms: int64[E], ascending.
        labels: bool[E, A], one column per action, in the order of the schema.
        action: uint8[E], position of the strongest action in the schema.
        by_user: int64[E], event numbers grouped by user, oldest first for each user.
        user_splits: int64[U + 1]; user u's events are `by_user[user_splits[u]:user_splits[u + 1]]`.
        described: the columns of the data that are features.
        pin_values: features of pins.
        user_values: features of users.
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
    described: Described = field(default_factory=Described)
    pin_values: Values = field(default_factory=Values.none)
    user_values: Values = field(default_factory=Values.none)

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads of the schema that occur in the data, in its order; the others cannot be learned."""
        return tuple(head for head in self.schema.heads if self.label(head).any())

    def label(self, action: str) -> np.ndarray:
        """Return bool[E], which events are an action. Raises DatasetError if the schema has no such action."""
        column: np.ndarray = self.labels[:, self.schema.position(action)]
        return column

    def before(self, time_ms: int) -> int:
        """Return how many events happened strictly before a time."""
        return int(np.searchsorted(self.time_ms, time_ms))


def strongest_action(labels: np.ndarray) -> np.ndarray:
    """Return uint8[E], the first action of each row of bool[E, A]; every row must have one."""
    return np.asarray(labels.argmax(axis=1), np.uint8)


def action_log(dataset: AtomicDataset) -> ActionLog:
    """Convert interactions to an action log. Raises DatasetError if there are none."""
    if not len(dataset.users):
        raise DatasetError(f"dataset {dataset.name!r} has no interactions")
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
        described=dataset.described,
        pin_values=dataset.pin_values,
        user_values=dataset.user_values,
    )
