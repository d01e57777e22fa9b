"""The dual against a linear program over all mixtures of orders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranker.tuning.dual import Dual, Optimum, Shortfall
from ranker.tuning.orders import ScoredRequests
from tests.ranker.tuning.randomised_orders import best_mixture


def scored(rng, requests, rows_max, parties, *, equal=False):
    counts = np.full(requests, rows_max) if equal else rng.integers(1, rows_max + 1, requests)
    scale = np.array([1.0, 30.0, 0.01, 5.0])[:parties]
    utilities = rng.normal(size=(counts.sum(), parties)) * scale + scale * rng.uniform(-1, 1, parties)
    splits = np.concatenate([[0], np.cumsum(counts)])
    return ScoredRequests(("pinner", "creator", "merchant", "ad")[:parties], np.arange(requests), splits, utilities)


def dual_of(requests):
    return Dual(requests.best, len(requests.parties) - 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 40),
    rows=st.integers(1, 12),
    parties=st.integers(2, 4),
    ask=st.floats(-0.5, 0.8),
)
def test_the_dual_equals_the_best_mixture_of_orders(seed, requests, rows, parties, ask):
    rng = np.random.default_rng(seed)
    instance = scored(rng, requests, rows, parties)
    dual = dual_of(instance)
    free = instance.best(np.eye(parties)[0])[1:]
    thetas = free + ask * rng.uniform(0.3, 1, parties - 1) * (dual.most - free)
    truth = best_mixture(instance, np.eye(parties)[0], np.eye(parties)[1:], thetas)
    found = dual.solve(thetas)
    if isinstance(found, Shortfall):
        assert np.isnan(truth)
        return
    assert found.bound == pytest.approx(truth, abs=1e-6)
    assert found.reached == pytest.approx(truth, abs=1e-6)
    assert found.gap <= 1e-6
    assert (found.multipliers >= 0).all()


def test_the_largest_instance_agrees_within_a_millionth():
    instance = scored(np.random.default_rng(5), 40, 12, 4, equal=True)
    dual = dual_of(instance)
    free = instance.best(np.eye(4)[0])[1:]
    thetas = free + 0.25 * (dual.most - free)
    found = dual.solve(thetas)
    assert isinstance(found, Optimum)
    assert found.bound == pytest.approx(best_mixture(instance, np.eye(4)[0], np.eye(4)[1:], thetas), abs=1e-6)
    assert found.multipliers.min() > 0


def test_a_multiplier_is_what_one_more_unit_costs():
    instance = scored(np.random.default_rng(1), 30, 10, 2)
    dual = dual_of(instance)
    free = instance.best(np.array([1.0, 0.0]))[1:]
    theta = free + 0.3 * (dual.most - free)
    found = dual.solve(theta)
    assert isinstance(found, Optimum)
    step = 1e-3 * (dual.most - free)
    truths = [best_mixture(instance, np.eye(2)[0], np.eye(2)[1:], theta + side * step) for side in (-1, 1)]
    slopes = [(found.bound - truths[1]) / step[0], (truths[0] - found.bound) / step[0]]  # the value is concave in theta
    assert slopes[1] - 1e-9 <= found.multipliers[0] <= slopes[0] + 1e-9


def test_a_theta_that_is_met_anyway_has_no_multiplier():
    instance = scored(np.random.default_rng(2), 20, 8, 3)
    found = dual_of(instance).solve(instance.best(np.eye(3)[0])[1:] - 0.1)
    assert isinstance(found, Optimum)
    assert found.multipliers.tolist() == [0, 0]
    assert found.bound == pytest.approx(instance.best(np.eye(3)[0])[0])


def test_thetas_of_solved_problems_do_not_change_later_ones():
    instance = scored(np.random.default_rng(3), 20, 8, 3)
    dual = dual_of(instance)
    free = instance.best(np.eye(3)[0])[1:]
    wanted = free + 0.2 * (dual.most - free)
    first = dual.solve(wanted)
    for share in (0.9, 0.05, 0.4):
        dual.solve(free + share * (dual.most - free))
    again = dual.solve(wanted)
    assert isinstance(first, Optimum)
    assert isinstance(again, Optimum)
    assert again.bound == pytest.approx(first.bound, abs=1e-8)


def test_the_most_of_one_party_beside_the_others_is_the_edge_of_what_is_possible():
    instance = scored(np.random.default_rng(4), 15, 8, 3)
    dual = dual_of(instance)
    free = instance.best(np.eye(3)[0])[1:]
    thetas = free + 0.3 * (dual.most - free)
    most = dual.most_beside(0, thetas)
    assert most == pytest.approx(best_mixture(instance, np.eye(3)[1], np.eye(3)[[2]], thetas[1:]), abs=1e-6)
    just, beyond = thetas.copy(), thetas.copy()
    just[0], beyond[0] = most - 1e-6, most + 1e-4
    assert isinstance(dual.solve(just), Optimum)
    assert isinstance(dual.solve(beyond), Shortfall)


def test_a_shortfall_says_what_is_attainable_alone_and_together():
    # One request, two pins: the first is all the creator's, the second all the merchant's.
    requests = ScoredRequests(
        ("pinner", "creator", "merchant"), np.array([1]), np.array([0, 2]), np.array([[1.0, 1, 0], [1.0, 0, 1]])
    )
    first, second = 1.0, 1 / np.log2(3)
    found = dual_of(requests).solve(np.array([0.95, 0.95]))
    assert isinstance(found, Shortfall)
    assert found.alone.tolist() == pytest.approx([first, first])
    assert found.together.tolist() == pytest.approx([(first + second) / 2] * 2)  # each first in half of the answers
