from __future__ import annotations

from pathlib import Path

import numpy as np

from ranker.baselines.item_knn import item_knn_scores
from ranker.data.actions import RATINGS, ActionLog, action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.data.embeddings import space_of, svd_embeddings
from ranker.data.requests import Split, producer_until_ms
from ranker.export.manifest import draft_manifest
from ranker.training.examples import ExampleBuilder, Examples, Sampling
from tests.ranker.interactions import write_atomic

HEADS = ("save", "hide")
SPLIT = Split(train_slices=2, validation_slices=1, test_slices=3)


def built(folder: Path) -> tuple[ActionLog, Examples]:
    log = action_log(read_atomic(write_atomic(folder, per_user=20)))
    embeddings = svd_embeddings(log, producer_until_ms(log, SPLIT), 1, name="toy")
    manifest = draft_manifest("toy", space_of("toy"), RATINGS, HEADS, sequence_length=100)
    sampling = Sampling(candidates=10, requests_max=12)
    return log, ExampleBuilder(log, embeddings, manifest, SPLIT, sampling, 2).build("test")


def slow_score(log: ActionLog, user: int, acted: set[int], candidate: int, head: str, before_ms: int) -> float:
    past = range(log.before(before_ms))
    users_of = {pin: {int(log.user[e]) for e in past if log.pin[e] == pin} for pin in (*acted, candidate)}
    gave = {int(log.user[e]) for e in past if log.pin[e] == candidate and log.label(head)[e]}
    size = max(1, len(users_of[candidate]))
    return float(sum(len(users_of[p] & gave) / np.sqrt(max(1, len(users_of[p])) * size) for p in acted))


def test_scores_are_cosines_of_the_users_that_pins_share(tmp_path: Path) -> None:
    log, examples = built(tmp_path)
    found = item_knn_scores(log, examples, HEADS, 5)
    splits = examples.batch.row_splits
    assert len(np.unique(examples.snapshot_ms)) > 1
    assert (found > 0).any(axis=0).all()
    for number in range(examples.batch.requests):
        user, as_of_ms = int(examples.users[number]), int(examples.snapshot_ms[number])
        own = [e for e in range(len(log.pin)) if log.user[e] == user][: int(examples.activity[number])]
        acted = {int(log.pin[e]) for e in own[-5:]}
        for row in range(splits[number], splits[number + 1], 3):
            for column, head in enumerate(HEADS):
                expected = slow_score(log, user, acted, int(examples.pins[row]), head, as_of_ms)
                assert found[row, column] == np.float32(expected) or abs(found[row, column] - expected) < 1e-5


def test_events_after_the_slice_began_change_nothing(tmp_path: Path) -> None:
    log, examples = built(tmp_path)
    first = examples.snapshot_ms.min()
    early = examples.take(np.flatnonzero(examples.snapshot_ms == first))
    before = item_knn_scores(log, early, HEADS, 100)
    log.labels[log.before(int(first)) :] = True
    np.testing.assert_array_equal(item_knn_scores(log, early, HEADS, 100), before)
