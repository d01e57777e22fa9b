from __future__ import annotations

import numpy as np
import pytest

from loadtest.arrivals import poisson


def test_same_seed_gives_the_same_arrivals():
    assert np.array_equal(poisson(100, 10, seed=3), poisson(100, 10, seed=3))
    assert not np.array_equal(poisson(100, 10, seed=3), poisson(100, 10, seed=4))


def test_arrivals_ascend_within_the_duration():
    times = poisson(1_000, 5, seed=0)
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < 5


def test_gaps_are_exponential_and_counts_poisson():
    rate = 500.0
    times = poisson(rate, 200, seed=1)
    gaps = np.sort(np.diff(times))
    assert len(times) == pytest.approx(rate * 200, abs=5 * np.sqrt(rate * 200))
    # Kolmogorov-Smirnov against 1 - exp(-rate t); 1.95 / sqrt(n) is passed by chance once in a thousand.
    empirical = np.arange(1, len(gaps) + 1) / len(gaps)
    assert np.abs(empirical - (1 - np.exp(-rate * gaps))).max() < 1.95 / np.sqrt(len(gaps))
    per_second = np.bincount(times.astype(int), minlength=200)
    assert per_second.var() == pytest.approx(per_second.mean(), rel=0.5)


def test_a_tiny_rate_may_give_no_arrival():
    assert len(poisson(1e-9, 1, seed=0)) == 0
