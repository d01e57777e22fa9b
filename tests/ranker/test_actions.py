from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from ranker.actions import ACTIONS, HEADS, Thresholds, action_labels, action_log, strongest_action
from ranker.atomic import AtomicDataset
from ranker.errors import DatasetError, SettingError


def dataset_of(events: Sequence[tuple[int, int, float, int]], *, rated: bool = True) -> AtomicDataset:
    """Make a dataset of (user, pin, rating, time in ms), already in order of time."""
    users, pins, ratings, times = (np.array(column) for column in zip(*events, strict=True))
    return AtomicDataset(
        "toy", "0" * 64, users.astype(np.uint64), pins.astype(np.uint64),
        ratings.astype(np.float32) if rated else None, times.astype(np.int64), {}, {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rating", "labels", "strongest"),
    [
        (5, {"save", "like", "closeup"}, "save"),
        (4, {"like", "closeup"}, "like"),
        (3, {"closeup"}, "closeup"),
        (2, {"hide", "closeup"}, "hide"),
        (1, {"hide", "closeup"}, "hide"),
    ],
)
def test_a_rating_means_several_labels_and_one_strongest_action(rating: int, labels: set[str], strongest: str) -> None:
    found = action_labels(np.array([rating]), 1, Thresholds())
    assert {head for head, on in zip(HEADS, found[0].tolist(), strict=True) if on} == labels
    assert ACTIONS[strongest_action(found)[0]] == strongest


def test_thresholds_can_be_moved_but_must_rise() -> None:
    labels = action_labels(np.array([8, 6, 3]), 3, Thresholds(save_at=8, like_at=6, hide_at=3))
    assert labels[:, HEADS.index("save")].tolist() == [True, False, False]
    assert labels[:, HEADS.index("hide")].tolist() == [False, False, True]
    with pytest.raises(SettingError, match=r"hide_at \(4\) < like_at \(4\)"):
        Thresholds(hide_at=4)


def test_without_ratings_everything_is_a_closeup_and_no_other_head_remains() -> None:
    log = action_log(dataset_of([(1, 2, 0, 0), (1, 3, 0, 1)], rated=False))
    assert log.heads == ("closeup",)
    assert [ACTIONS[a] for a in log.action] == ["closeup", "closeup"]


def test_heads_that_never_occur_are_left_out() -> None:
    assert action_log(dataset_of([(1, 2, 4, 0), (1, 3, 3, 1)])).heads == ("like", "closeup")


def test_the_log_groups_events_by_user_oldest_first() -> None:
    log = action_log(dataset_of([(9, 5, 5, 0), (4, 5, 4, 1), (9, 6, 3, 2)]))
    assert log.user_ids.tolist() == [4, 9]
    assert log.pin_ids.tolist() == [5, 6]
    assert log.by_user.tolist() == [1, 0, 2]
    assert log.user_splits.tolist() == [0, 1, 3]
    assert [log.before(t) for t in (0, 1, 2, 3)] == [0, 1, 2, 3]


def test_a_dataset_without_interactions_is_refused() -> None:
    empty = np.empty(0)
    with pytest.raises(DatasetError, match="holds no interactions"):
        action_log(AtomicDataset("toy", "", empty, empty, None, empty, {}, {}))
