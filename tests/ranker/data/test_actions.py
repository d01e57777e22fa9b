from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from ranker.data.actions import RATINGS, ActionSchema, action_log, strongest_action
from ranker.data.atomic.recbole import AtomicDataset
from ranker.errors import DatasetError


def dataset_of(events: Sequence[tuple[int, int, float, int]], schema: ActionSchema = RATINGS) -> AtomicDataset:
    """Make a dataset of (user, pin, rating, time in ms), already in order of time."""
    users, pins, ratings, times = (np.array(column) for column in zip(*events, strict=True))
    return AtomicDataset(
        name="toy",
        sha256="0" * 64,
        users=users.astype(np.uint64),
        pins=pins.astype(np.uint64),
        time_ms=times.astype(np.int64),
        schema=schema,
        labels=schema.labels({"rating": ratings.astype(np.float32)}, len(users)),
        titles={},
        tokens={},
    )


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
    found = RATINGS.labels({"rating": np.array([rating], np.float32)}, 1)
    assert {name for name, on in zip(RATINGS.names, found[0].tolist(), strict=True) if on} == labels
    assert RATINGS.names[strongest_action(found)[0]] == strongest


def test_heads_that_never_occur_are_left_out() -> None:
    assert action_log(dataset_of([(1, 2, 4, 0), (1, 3, 3, 1)])).heads == ("like", "closeup")


def test_the_log_groups_events_by_user_oldest_first() -> None:
    log = action_log(dataset_of([(9, 5, 5, 0), (4, 5, 4, 1), (9, 6, 3, 2)]))
    assert log.user_ids.tolist() == [4, 9]
    assert log.pin_ids.tolist() == [5, 6]
    assert log.by_user.tolist() == [1, 0, 2]
    assert log.user_splits.tolist() == [0, 1, 3]
    assert [log.before(t) for t in (0, 1, 2, 3)] == [0, 1, 2, 3]
    assert log.label("like").tolist() == [True, True, False]


def test_a_dataset_without_interactions_is_refused() -> None:
    empty = np.empty(0)
    labels = np.empty((0, 4), bool)
    with pytest.raises(DatasetError, match="has no interactions"):
        action_log(AtomicDataset("toy", "", empty, empty, empty, RATINGS, labels, {}, {}))
