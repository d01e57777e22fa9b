from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from model_store.model.discount import discounts
from server.request.parties import PartyMean, PartyTotals, party_means, party_values
from server.request.windows import Window


def totals(*values):
    found = PartyTotals(("pinner", "creator"))
    for value in values:
        found.add(np.array(value, float))
    return found


def test_an_answer_is_worth_the_discounted_utilities_of_its_pins():
    utilities = np.array([[1.0, 4.0], [2.0, 5.0], [np.nan, 6.0]])
    scores = SimpleNamespace(order=np.array([1, 2]), party_utilities=utilities)
    first, second = discounts(2)
    assert party_values(scores).tolist() == [2 * first, pytest.approx(5 * first + 6 * second)]


def test_means_and_standard_errors_are_over_requests():
    rng = np.random.default_rng(3)
    values = rng.normal(5, 2, (50, 2))
    found = party_means([totals(*values[:20]), totals(*values[20:])])
    for party, column in zip(("pinner", "creator"), values.T, strict=True):
        assert found[party].requests == 50
        assert found[party].mean == pytest.approx(column.mean())
        assert found[party].error == pytest.approx(column.std(ddof=1) / math.sqrt(50))


def test_what_is_gained_and_lost_only_grows():
    found = totals([3.0, -1.0], [-2.0, -4.0])
    assert (found.gained.tolist(), found.lost.tolist()) == ([3.0, 0.0], [2.0, 5.0])
    assert party_means([found])["pinner"].mean == 0.5
    assert found.squares.tolist() == [13.0, 17.0]


def test_one_request_says_nothing_about_the_next():
    assert party_means([totals([1.0, 2.0])])["creator"] == PartyMean(1, 2.0, math.inf)


def test_a_window_forgets_what_is_older():
    window = Window(4.0)
    window.note_parties(0.0, "home", ("pinner",), np.array([9.0]))
    window.note_parties(5.0, "home", ("pinner",), np.array([1.0]))
    window.note_parties(5.5, "related", ("ad",), np.array([2.0]))
    both, late = window.seen(5.5).parties, window.seen(6.5).parties
    assert both["home"]["pinner"].mean == 5.0
    assert late["home"]["pinner"] == PartyMean(1, 1.0, math.inf)
    assert late["related"]["ad"].mean == 2.0


def test_requests_that_are_all_alike_have_no_error_whatever_rounding_does():
    values = [[0.7, 0.1]] * 7  # 7 squares of 0.7 sum to a little less than 7 times the square of their mean
    assert [one.error for one in party_means([totals(*values)]).values()] == [0.0, pytest.approx(0.0, abs=1e-9)]


def test_two_requests_have_an_error():
    assert party_means([totals([1.0, 0.0], [3.0, 0.0])])["pinner"] == PartyMean(2, 2.0, 1.0)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_utilities_whose_squares_overflow_say_nothing_for_certain():
    assert party_means([totals([1e300, 0.0], [2e300, 0.0])])["pinner"].error == math.inf
