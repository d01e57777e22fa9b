"""Ratings to actions: what each interaction counts as, and the whole history as one columnar log."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranker.atomic import AtomicDataset
from ranker.errors import DatasetError, SettingError

#: Every action that a head can predict.
HEADS = ("save", "like", "hide", "closeup")
#: The actions of a sequence, strongest first; an event stands there as its strongest.
ACTIONS = ("save", "like", "closeup", "hide")

MEANINGS = {
    "save": "rated at the top of the scale",
    "like": "rated well; every save is a like too",
    "hide": "rated badly",
    "closeup": "rated at all: the user looked closely",
}


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Which ratings are which actions; any rating is a closeup."""

    save_at: float = 5.0
    like_at: float = 4.0
    hide_at: float = 2.0

    def __post_init__(self) -> None:
        if not self.hide_at < self.like_at <= self.save_at:
            raise SettingError(
                f"thresholds must rise: hide_at ({self.hide_at:g}) < like_at ({self.like_at:g}) "
                f"<= save_at ({self.save_at:g})"
            )


@dataclass(frozen=True, slots=True)
class ActionLog:
    """Everything that happened, oldest first.

    Attributes:
        user_ids: uint64[U], ascending; `user` counts into it.
        pin_ids: uint64[P], ascending; `pin` counts into it.
        user: int64[E].
        pin: int64[E].
        time_ms: int64[E], ascending.
        labels: bool[E, 4], one column per action of `HEADS`.
        action: uint8[E], the strongest action's position in `ACTIONS`.
        by_user: int64[E], event numbers grouped by user, each user's oldest first.
        user_splits: int64[U + 1]; user u's events are `by_user[user_splits[u]:user_splits[u + 1]]`.
    """

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
        """The actions that occur at all, in the order of `HEADS`; the others cannot be learned."""
        return tuple(head for column, head in enumerate(HEADS) if self.labels[:, column].any())

    def before(self, time_ms: int) -> int:
        """Return how many events happened strictly before a time."""
        return int(np.searchsorted(self.time_ms, time_ms))


def action_labels(rating: np.ndarray | None, count: int, thresholds: Thresholds) -> np.ndarray:
    """Return bool[count, 4] in the order of `HEADS`; without ratings everything is a closeup and nothing else."""
    labels = np.zeros((count, len(HEADS)), bool)
    labels[:, HEADS.index("closeup")] = True
    if rating is not None:
        labels[:, HEADS.index("save")] = rating >= thresholds.save_at
        labels[:, HEADS.index("like")] = rating >= thresholds.like_at
        labels[:, HEADS.index("hide")] = rating <= thresholds.hide_at
    return labels


def strongest_action(labels: np.ndarray) -> np.ndarray:
    """Return uint8[E], the position in `ACTIONS` of each event's strongest action: save, like, hide, else closeup."""
    save, like, hide = (labels[:, HEADS.index(name)] for name in ("save", "like", "hide"))
    positions = [np.uint8(ACTIONS.index(name)) for name in ("save", "like", "hide")]
    return np.select([save, like, hide], positions, np.uint8(ACTIONS.index("closeup"))).astype(np.uint8)


def action_log(dataset: AtomicDataset, thresholds: Thresholds | None = None) -> ActionLog:
    """Turn interactions into the action log. Raises DatasetError when there are none."""
    if not len(dataset.users):
        raise DatasetError(f"dataset {dataset.name!r} holds no interactions")
    user_ids, user = np.unique(dataset.users, return_inverse=True)
    pin_ids, pin = np.unique(dataset.pins, return_inverse=True)
    labels = action_labels(dataset.rating, len(user), thresholds or Thresholds())
    counts = np.bincount(user, minlength=len(user_ids))
    return ActionLog(
        user_ids=user_ids,
        pin_ids=pin_ids,
        user=user,
        pin=pin,
        time_ms=dataset.time_ms,
        labels=labels,
        action=strongest_action(labels),
        by_user=np.argsort(user, kind="stable"),
        user_splits=np.concatenate([[0], np.cumsum(counts)]),
    )
