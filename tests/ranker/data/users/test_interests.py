from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranker.data.actions import action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.data.embeddings import svd_embeddings
from ranker.data.users.interests import InterestSettings, interests_of, interests_of_log
from tests.ranker.interactions import write_atomic

DAY_MS = 86_400_000


def slow_ward(unit: np.ndarray, distance: float) -> list[list[int]]:
    """Merge the two clusters whose union is tightest, one pair after the other, by Ward's definition."""
    clusters = [[i] for i in range(len(unit))]

    def apart(a, b):
        means = unit[a].mean(axis=0), unit[b].mean(axis=0)
        return np.sqrt(2 * len(a) * len(b) / (len(a) + len(b))) * np.linalg.norm(means[0] - means[1])

    while len(clusters) > 1:
        pairs = [(apart(a, b), i, j) for i, a in enumerate(clusters) for j, b in enumerate(clusters[:i])]
        nearest, i, j = min(pairs)
        if nearest > distance:
            break
        clusters[j] += clusters.pop(i)
    return [sorted(cluster) for cluster in clusters]


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 14), dim=st.integers(2, 5), distance=st.floats(0.1, 3))
def test_clusters_are_those_of_ward_and_medoids_are_the_most_central_of_their_pins(seed, count, dim, distance):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, dim))
    ages_ms = np.sort(rng.integers(0, 90 * DAY_MS, count))
    found = interests_of(vectors, ages_ms, InterestSettings(distance=distance, clusters_max=99, half_life_days=10))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ours = [np.flatnonzero(found.clusters == k).tolist() for k in range(len(found.medoids))]
    assert sorted(ours) == sorted(slow_ward(unit, distance))
    weight = 0.5 ** (ages_ms / (10 * DAY_MS))
    assert found.importances == pytest.approx([weight[members].sum() / weight.sum() for members in ours])
    assert found.importances.sum() == pytest.approx(1)
    assert (np.diff(found.importances) <= 1e-12).all()
    for medoid, members in zip(found.medoids, ours, strict=True):
        spread = {pin: ((unit[members] - unit[pin]) ** 2).sum() for pin in members}
        assert spread[medoid] == pytest.approx(min(spread.values()))


def test_only_the_most_important_clusters_are_kept():
    vectors = np.array([[1, 0], [1, 0.01], [0, 1], [-1, 0], [-1, 0.01], [-1, 0.02]])
    ages_ms = np.array([0, 0, 0, 30, 30, 30]) * DAY_MS
    found = interests_of(vectors, ages_ms, InterestSettings(distance=0.5, clusters_max=2, half_life_days=30))
    # Two new pins weigh 2, one weighs 1, three old ones 1.5, of 4.5 in all.
    assert found.importances == pytest.approx([2 / 4.5, 1.5 / 4.5])
    assert found.clusters.tolist() == [0, 0, -1, 1, 1, 1]
    assert found.medoids.tolist() == [1, 4] or found.medoids.tolist() == [0, 4]


def test_equal_pins_give_the_newest_as_medoid_and_no_age_divides_by_zero():
    vectors, settings = np.ones((3, 2)), InterestSettings(half_life_days=0.001)
    found = interests_of(vectors, np.array([10, 5, 7]) * 10_000 * DAY_MS, settings)
    assert (found.medoids.tolist(), found.importances.tolist()) == ([1], [1.0])


def test_users_are_clustered_by_what_they_liked_before_the_time(tmp_path):
    log = action_log(read_atomic(write_atomic(tmp_path)))
    before_ms = int(log.time_ms[1_500])
    vectors = svd_embeddings(log, before_ms, 0, "toy")
    known = vectors.of(log.pin_ids).any(axis=1)
    found = list(interests_of_log(log, vectors, before_ms, InterestSettings(pins_max=6)))
    liked = log.schema.affinities[log.action] > 0
    for one in found:
        events = [
            e
            for e in log.by_user[log.user_splits[one.user] : log.user_splits[one.user + 1]]
            if log.time_ms[e] < before_ms
        ]
        expected = list(dict.fromkeys(int(log.pin[e]) for e in events[::-1] if liked[e] and known[log.pin[e]]))
        assert one.pins.tolist() == expected[:6]
        assert set(one.interests.medoids.tolist()) <= set(range(len(one.pins)))
    assert len({one.user for one in found}) == len(found) > 10
