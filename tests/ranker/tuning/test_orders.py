from __future__ import annotations

import numpy as np
import pytest

from model_store.model.discount import discounts
from model_store.model.selection import select
from model_store.model.utility import load_utility
from ranker.tuning.orders import ScoredRequests
from tests import tiny

PARTIES = ("pinner", "creator")


def requests_of(*utilities, top_k=0):
    splits = np.cumsum([0, *(len(rows) for rows in utilities)])
    rows = np.concatenate([np.reshape(rows, (-1, 2)) for rows in utilities]).astype(np.float64)
    return ScoredRequests(PARTIES, np.arange(len(utilities)), splits, rows, top_k)


@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.0, 1.0), (1.0, -2.0), (0.0, 0.0)])
def test_orders_are_those_of_a_server(weights):
    rng = np.random.default_rng(0)
    # Few distinct values, so that many sums are equal; some are not finite.
    parts = [rng.integers(0, 3, (rng.integers(0, 9), 2)) / 4 for _ in range(60)]
    for part in parts:
        part[rng.random(part.shape) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
    requests = requests_of(*parts)
    table = load_utility(tiny.UTILITY.encode(), tiny.manifest())
    table.surfaces["home"].weights[:] = weights
    found = requests.served(np.array(weights))
    for part, values in zip(parts, found, strict=True):
        order = select(table.combine("home", part))
        worth = np.where(np.isfinite(part).all(axis=1, keepdims=True), part, 0)[order]
        np.testing.assert_allclose(values, discounts(len(part)) @ worth, atol=1e-12)


def test_a_pin_that_is_not_finite_for_one_party_sinks_and_is_worth_nothing():
    requests = requests_of([[np.nan, 9], [1, 1], [2, 2]])
    assert requests.served(np.array([0.0, 1.0]))[0].tolist() == pytest.approx([2 + 1 / np.log2(3)] * 2)


def test_only_the_first_positions_count_if_asked_for():
    requests = requests_of([[3, 0], [2, 5], [1, 7]], [[4, 4]], top_k=1)
    assert requests.served(np.array([1.0, 0.0])).tolist() == [[3, 0], [4, 4]]
    assert requests.best(np.array([1.0, 0.0])).tolist() == [3.5, 2]


def test_a_request_without_candidates_is_worth_nothing():
    assert requests_of([[1, 2]], []).served(np.ones(2)).tolist() == [[1, 2], [0, 0]]


def test_requests_are_taken_in_the_order_given():
    requests = requests_of([[1, 1], [2, 2]], [], [[3, 3]])
    taken = requests.take(np.array([2, 0]))
    assert taken.row_splits.tolist() == [0, 1, 3]
    assert taken.utilities[:, 0].tolist() == [3, 1, 2]
    assert taken.users.tolist() == [2, 0]


def test_no_order_is_worth_more_than_the_best():
    rng = np.random.default_rng(1)
    requests = requests_of(*(rng.normal(size=(4, 2)) for _ in range(5)))
    weights = np.array([1.0, 0.7])
    best = requests.best(weights) @ weights
    for _ in range(200):
        worth = [discounts(4) @ requests.utilities[start : start + 4][rng.permutation(4)] for start in range(0, 20, 4)]
        assert np.mean(worth, axis=0) @ weights <= best + 1e-12
