from __future__ import annotations

import numpy as np
import pytest

from ranker.evaluation.bootstrap import Estimate, Resampling, resample


def mean(users: np.ndarray, values: np.ndarray, resamples: int, seed: int = 1) -> Estimate:
    columns = np.stack([values, np.ones(len(values))], axis=1)
    sums = resample(users, columns, resamples, seed)
    return (sums[0] / sums[1]).estimate()


def population(users: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Users with one to six requests each, and a rate of hits of their own; the mean hit of a request is 0.4."""
    requests = rng.integers(1, 7, users)
    rate = np.repeat(rng.beta(2, 3, users), requests)
    return np.repeat(np.arange(users), requests), (rng.random(len(rate)) < rate).astype(np.float64)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for trial in range(300):
        users, values = population(80, rng)
        estimate = mean(users, values, 250, seed=trial)
        assert estimate.low is not None
        assert estimate.high is not None
        held += estimate.low <= 0.4 <= estimate.high
    assert 0.90 < held / 300 < 0.98


def test_requests_of_one_user_are_drawn_together() -> None:
    # Ten users whose twenty requests are all alike know no more than ten requests would.
    values = np.repeat(np.tile([0.0, 1.0], 5), 20)
    by_user = mean(np.repeat(np.arange(10), 20), values, 500)
    by_request = mean(np.arange(200), values, 500)
    widths = [(e.high or 0) - (e.low or 0) for e in (by_user, by_request)]
    assert widths[0] > 3 * widths[1]


def test_the_value_is_the_mean_over_requests_whoever_asked() -> None:
    assert mean(np.array([7, 7, 7, 2]), np.array([1.0, 2.0, 3.0, 0.0]), 50).value == 1.5


def test_equal_columns_differ_by_exactly_nothing_in_every_resample() -> None:
    rng = np.random.default_rng(2)
    hits = rng.integers(0, 4, 500).astype(np.float64)
    sums = resample(rng.integers(0, 90, 500), np.stack([hits, np.ones(500), hits], axis=1), 200, 3)
    difference = sums[0] / sums[1] - sums[2] / sums[1]
    assert difference.estimate() == Estimate(0.0, 0.0, 0.0)


def test_paired_differences_are_surer_than_their_parts() -> None:
    rng = np.random.default_rng(4)
    one = rng.integers(0, 3, 400).astype(np.float64)
    other = one + (rng.random(400) < 0.1)
    sums = resample(np.arange(400), np.stack([one, other, np.ones(400)], axis=1), 400, 1)
    parts = [(sums[i] / sums[2]).estimate() for i in (0, 1)]
    difference = (sums[1] / sums[2] - sums[0] / sums[2]).estimate()
    assert (difference.low or 0) > 0
    assert (parts[0].high or 0) > (parts[1].low or 0)


def test_the_same_seed_gives_the_same_interval_and_another_does_not() -> None:
    users, values = population(40, np.random.default_rng(8))
    assert mean(users, values, 100) == mean(users, values, 100)
    assert mean(users, values, 100) != mean(users, values, 100, seed=2)


@pytest.mark.parametrize(
    ("values", "weights", "resamples", "expected"),
    [
        pytest.param([0.0, 0.0], [0.0, 0.0], 50, Estimate(None, None, None), id="no user counts, so no value"),
        pytest.param(
            [1.0, 0.0], [1.0, 0.0], 50, Estimate(1.0, None, None), id="many resamples draw no user who counts"
        ),
        pytest.param([1.0, 1.0], [1.0, 1.0], 0, Estimate(1.0, None, None), id="no resamples"),
    ],
)
def test_there_is_no_interval_where_there_is_nothing_to_say(
    values: list[float], weights: list[float], resamples: int, expected: Estimate
) -> None:
    sums = resample(np.arange(2), np.array([values, weights]).T, resamples, 1)
    assert (sums[0] / sums[1]).estimate() == expected


def test_draws_do_not_depend_on_how_many_fit_into_memory() -> None:
    users, values = population(30, np.random.default_rng(9))
    whole = resample(users, values[:, None], 40, 6)
    parts = resample(users, values[:, None], 40, 6, weights_max=100)
    np.testing.assert_array_equal(parts.drawn, whole.drawn)
    assert isinstance(whole, Resampling)
