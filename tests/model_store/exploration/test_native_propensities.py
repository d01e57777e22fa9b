"""The native propensities of many answers equal those in NumPy, and wrong arguments are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model_store.exploration import propensities as module
from model_store.exploration.explorer import Explored
from model_store.exploration.orders import BEST_MAX, OrderExplorer
from model_store.exploration.propensities import propensities, propensities_in_numpy
from model_store.exploration.regret import TunedOrder
from model_store.exploration.weights import WeightsExplorer
from model_store.model.selection import select
from model_store.model.utility import weighted_sum

ODD = (np.nan, np.inf, -np.inf, 1e300, -1e300, 0.0, -0.0, 1e-46)


def weights_explorer(rng, tuned, share, regret_max):
    """Up to 32 arms, some near the tuned weights, some far from them, some beyond the bound, some equal."""
    count = int(rng.choice([1, 4, 32]))
    spread = rng.choice([0.0, 0.02, 0.3, 3.0], count)[:, None]
    arms = tuned + spread * rng.normal(size=(count, len(tuned)))
    shares = rng.dirichlet(np.ones(count))
    return WeightsExplorer(7, share, regret_max, tuned, tuple(f"arm{i}" for i in range(count)), arms, shares)


def order_explorer(rng, tuned, share, regret_max):
    temperature, floor = float(rng.choice([1e-9, 0.01, 0.5, 10.0])), float(rng.choice([0, 0.3]))
    return OrderExplorer(7, share, regret_max, tuned, int(rng.integers(2, BEST_MAX + 1)), temperature, floor)


def case(kind, seed, rows):
    """Draw an explorer, and answers of it: the tuned one, explored ones, and some that it never gives."""
    rng = np.random.default_rng(seed)
    party_count = int(rng.integers(1, 5))
    tuned = np.round(rng.normal(size=party_count), 1)
    share, regret_max = float(rng.choice([0.01, 0.5, 1.0])), float(rng.choice([0.001, 0.01, 0.1, 1.0]))
    explorer = {"weights": weights_explorer, "order": order_explorer}[kind](rng, tuned, share, regret_max)
    parties = rng.normal(size=(rows, party_count))
    if rng.random() < 0.5:
        parties = np.round(parties, 1)  # ties
    odd = rng.random(rows) < rng.choice([0, 0.1, 1.0])
    parties[odd, int(rng.integers(party_count))] = rng.choice(ODD, int(odd.sum()))
    answers = []
    for top in {0, int(rng.integers(1, rows + 1)), 1}:
        utilities = weighted_sum(parties, tuned)
        orders = [select(utilities, top), select(rng.permutation(utilities), top)]
        for request_id in range(1, 30):
            decision = explorer.explore(request_id, np.arange(1, rows + 1, dtype=np.uint64), parties, utilities, top)
            if isinstance(decision, Explored):
                orders.append(decision.order)
        answers += [(explorer, parties, order) for order in orders[:5]]
    return answers


def check_same(answers):
    for ours, reference in zip(propensities(answers), propensities_in_numpy(answers), strict=True):
        # An order that one of both counts elsewhere makes a difference of a whole chance, far above 1e-12.
        assert ours.order == pytest.approx(reference.order, rel=1e-12, abs=1e-300)
        np.testing.assert_allclose(ours.positions, reference.positions, rtol=1e-12, atol=1e-300)
        assert 0 <= ours.order <= 1
        assert ours.positions.max() <= 1


@settings(max_examples=200, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["weights", "order"]), min_size=1, max_size=3),
    seed=st.integers(0, 1 << 32),
    rows=st.integers(1, 200),
)
@example(kinds=["weights", "order"], seed=1, rows=1)
@example(kinds=["weights"], seed=3, rows=3_000)
def test_both_ways_give_the_same_propensities(kinds, seed, rows):
    check_same([one for number, kind in enumerate(kinds) for one in case(kind, seed + number, rows)])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 32), above=st.booleans())
def test_an_arm_exactly_at_the_bound_counts_as_it_is_answered(seed, above):
    """A regret that another order of additions would round to the other side."""
    rng = np.random.default_rng(seed)
    parties, tuned = rng.normal(size=(40, 2)), np.array([1.0, 0.5])
    arms = tuned + 0.2 * rng.normal(size=(1, 2))
    whole = TunedOrder(weighted_sum(parties, tuned), 0, 1.0)
    order = select(weighted_sum(parties, arms[0]))
    regret_max = float(whole.regrets(order)) / whole.regret_max
    if above:
        regret_max = float(np.nextafter(regret_max, 0))
    explorer = WeightsExplorer(7, 1.0, regret_max, tuned, ("arm",), arms, np.ones(1))
    check_same([(explorer, parties, order), (explorer, parties, whole.order)])
    decision = explorer.explore(1, np.arange(1, 41, dtype=np.uint64), parties, weighted_sum(parties, tuned))
    answer = decision.order if isinstance(decision, Explored) else whole.order
    assert explorer.propensities(parties, answer).order == 1


def explorers():
    rng, tuned = np.random.default_rng(1), np.array([1.0, 0.5])
    return [weights_explorer(rng, tuned, 0.5, 0.1), order_explorer(rng, tuned, 0.5, 0.1)]


@pytest.mark.parametrize("way", [propensities, propensities_in_numpy])
@pytest.mark.parametrize("explorer", explorers(), ids=["weights", "order"])
@pytest.mark.parametrize("order", [[], [0, 1, 5], [-1], [2, 2], [0, 1, 2, 3, 4, 0]])
def test_an_order_that_is_none_of_the_candidates_is_refused_and_named(way, explorer, order):
    parties = np.random.default_rng(2).normal(size=(5, 2))
    right = (explorer, parties, np.arange(5))
    with pytest.raises(ValueError, match="answer 1: its order must hold 1 to 5 positions of its candidates, each at"):
        way([right, (explorer, parties, np.array(order, np.int64)), right])


@pytest.mark.parametrize("explorer", explorers(), ids=["weights", "order"])
def test_utilities_of_another_number_of_parties_are_refused(explorer):
    with pytest.raises(ValueError, match=r"answer 0: \(5, 3\) utilities of 2 parties"):
        explorer.propensities(np.zeros((5, 3)), np.arange(5))


@pytest.mark.parametrize("best", [1, BEST_MAX + 1])
def test_more_than_the_memory_of_native_code_is_refused(best):
    with pytest.raises(ValueError, match=f"best is {best}; it must be 2 to 8"):
        OrderExplorer(7, 0.5, 0.1, np.ones(2), best, 1.0, 0.0)


def test_without_the_library_numpy_does_it(monkeypatch):
    answers = case("order", 4, 20)
    expected = [one.order for one in propensities(answers)]
    monkeypatch.setattr(module, "_native", lambda: None)
    assert [one.order for one in propensities(answers)] == pytest.approx(expected, rel=1e-12)


def test_no_answers_have_no_propensities():
    assert propensities([]) == propensities_in_numpy([]) == []
