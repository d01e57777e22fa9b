from __future__ import annotations

import math
import random

import pytest

from feature_client.estimates import DecayingMean, DecayingSum, RunningQuantile


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_running_quantile_finds_the_quantile_from_anywhere(quantile):
    rng, estimate = random.Random(1), RunningQuantile(quantile, 1e-6, step=0.02)
    below = 0
    for i in range(20_000):
        value = rng.lognormvariate(0, 1)
        below += i >= 5_000 and value <= estimate.value
        estimate.observe(value)
    assert below / 15_000 == pytest.approx(quantile, abs=0.02)


def test_running_quantile_moves_by_a_fixed_step_however_far_a_value_lies():
    near, far = RunningQuantile(0.9, 1.0), RunningQuantile(0.9, 1.0)
    near.observe(1.01)
    far.observe(1e9)
    assert near.value == far.value == pytest.approx(math.exp(0.05 * 0.9))
    near.observe(near.value)  # what is equal lies below
    assert near.value == pytest.approx(math.exp(0.05 * 0.9 - 0.05 * 0.1))


def test_decaying_mean_begins_with_the_first_value_and_forgets_it_step_by_step():
    mean = DecayingMean(0.25)
    assert math.isnan(mean.value)
    for value, expected in ((8.0, 8.0), (0.0, 6.0), (6.0, 6.0), (2.0, 5.0)):
        mean.observe(value)
        assert mean.value == expected


def test_decaying_mean_counts_its_initial_value_like_an_observation():
    mean = DecayingMean(0.5, initial=4.0)
    mean.observe(0.0)
    assert mean.value == 2.0


def test_decaying_sum_keeps_one_part_in_e_after_its_memory():
    used = DecayingSum(memory_s=2.0)
    assert used.at(5.0) == 0.0
    used.add(1.0, 1.0)
    assert used.at(1.0) == 1.0
    assert used.at(3.0) == pytest.approx(1 / math.e)
    used.add(1.0, 3.0)
    assert used.at(5.0) == pytest.approx((1 / math.e + 1) / math.e)


def test_decaying_sum_takes_time_that_runs_backwards_for_no_time():
    used = DecayingSum(memory_s=1.0)
    used.add(1.0, 2.0)
    used.add(1.0, 1.0)
    assert used.at(1.0) == used.at(2.0) == 2.0
    assert used.at(3.0) == pytest.approx(2 / math.e)


@pytest.mark.parametrize(("now_s", "exceeded"), [(0.0, True), (0.69, True), (0.70, False)])
def test_decaying_sum_exceeds_half_of_itself_until_half_of_it_is_forgotten(now_s, exceeded):
    total = DecayingSum(1.0)
    total.add(2.0, 0.0)
    assert total.at_most == 2.0
    assert total.exceeds(1.0, now_s) is exceeded
    assert not total.exceeds(2.0, 0.0)
