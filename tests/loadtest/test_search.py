from __future__ import annotations

import pytest

from loadtest.search import HighestRate, RateSearch, Try


def search(limit_per_s, first_per_s=100.0):
    """Search a server that holds every rate up to a limit; what was found, and every rate that was tried."""
    tried, policy = [], RateSearch(first_per_s)
    while isinstance(decision := policy.next(), Try):
        tried.append(decision.rate_per_s)
        policy.tell(decision.rate_per_s, held=decision.rate_per_s <= limit_per_s)
    assert isinstance(decision, HighestRate)
    return decision.rate_per_s, tried


@pytest.mark.parametrize("limit_per_s", [3.0, 99.0, 100.0, 101.0, 777.0, 40_000.0])
def test_the_limit_is_found_to_three_percent_with_few_tries(limit_per_s):
    found_per_s, tried = search(limit_per_s)
    assert 0.96 * limit_per_s <= found_per_s <= limit_per_s
    assert len(tried) <= 16


def test_rates_double_until_one_fails():
    assert search(350.0)[1][:4] == [100.0, 200.0, 400.0, 300.0]


def test_rates_halve_until_one_holds():
    assert search(30.0)[1][:4] == [100.0, 50.0, 25.0, 37.5]


def test_the_gap_is_halved_until_it_is_three_percent():
    assert search(350.0) == (350.0, [100.0, 200.0, 400.0, 300.0, 350.0, 375.0, 362.5, 356.25])


def test_a_gap_as_wide_as_the_tolerance_ends_the_search():
    policy = RateSearch(300.0, tolerance=0.25)
    policy.tell(300.0, held=True)
    policy.tell(400.0, held=False)
    assert policy.next() == HighestRate(300.0)


def test_a_server_that_holds_nothing_ends_the_search_with_nothing():
    found_per_s, tried = search(0.0)
    assert found_per_s == 0
    assert len(tried) == 16


def test_a_server_without_limit_ends_the_search_too():
    assert len(search(float("inf"))[1]) == 16
