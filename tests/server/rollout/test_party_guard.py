"""What the guard thinks of a label whose parties get less."""

from __future__ import annotations

import math

import numpy as np
import pytest

from model_store.model.utility import load_utility
from server.request.parties import PartyMean, PartyTotals, party_means
from server.rollout.guard import Breach
from server.rollout.party_guard import PartyOfSurface, compared, judge_parties
from tests import tiny


def party(own, default=None, theta=None):
    return PartyOfSurface("home", "creator", own, default, theta)


def mean(value, error=0.125, requests=100):
    return PartyMean(requests, value, error)


@pytest.mark.parametrize(
    ("given", "breach"),
    [
        pytest.param(party(mean(0.5), theta=1.0), None, id="below theta within 4 standard errors"),
        pytest.param(
            party(mean(0.25, 0.18), theta=1.0),
            "the utility of creator on home is 0.25 (standard error 0.18, 100 requests) per request, "
            "but at_least requires 1",
            id="below theta",
        ),
        pytest.param(party(mean(0.25, requests=99), theta=1.0), None, id="too few of its own"),
        pytest.param(party(mean(0.25, math.inf, 1), theta=1.0), None, id="one request"),
        pytest.param(party(mean(0.25)), None, id="nothing to compare with"),
        pytest.param(party(mean(2.0, 0.0), mean(2.5, 0.0)), None, id="the largest loss"),
        pytest.param(
            party(mean(1.96, 0.0), mean(2.5, 0.0)),
            "the utility of creator on home is 1.96 (standard error 0, 100 requests) per request, against the default "
            "label's 2.5 (standard error 0, 100 requests); the limit is 20% less",
            id="lost more",
        ),
        pytest.param(party(mean(1.0, 0.1), mean(2.0, 0.2)), None, id="lost more within noise"),
        pytest.param(party(mean(1.0, 0.0), mean(2.0, 0.0, 99)), None, id="too few of the default's"),
        pytest.param(party(mean(-1.1, 0.0), mean(-1.0, 0.0)), None, id="a negative mean, within its amount"),
        pytest.param(
            party(mean(-1.3, 0.0), mean(-1.0, 0.0)),
            "the utility of creator on home is -1.3 (standard error 0, 100 requests) per request, against the default "
            "label's -1 (standard error 0, 100 requests); the limit is 20% less",
            id="a negative mean, beyond",
        ),
        pytest.param(party(mean(9.0, 0.0), mean(1.0, 0.0), theta=1.0), None, id="more than enough"),
    ],
)
def test_a_party_that_gets_too_little_beyond_chance_is_a_breach(given, breach):
    assert judge_parties([given], 100, 0.2) == (None if breach is None else Breach(breach))


def test_rounding_is_forgiven_in_proportion_to_the_theta():
    for theta in (1e-6, 1e6):
        assert judge_parties([party(mean(theta * (1 - 1e-10), 0.0), None, theta=theta)], 100, 0.0) is None
        assert judge_parties([party(mean(theta * (1 - 1e-8), 0.0), None, theta=theta)], 100, 0.0) is not None


@pytest.mark.parametrize("value", [0.1, 0.7, 2.77])
def test_equal_values_whose_sum_rounds_miss_neither_a_theta_nor_the_default_label(value):
    def means(requests):
        totals = PartyTotals(("creator",))
        for _ in range(requests):
            totals.add(np.array([value]))
        return party_means([totals])["creator"]

    for own, default in ((1000, 1777), (1777, 1000), (3000, 1000)):
        assert judge_parties([party(means(own), means(default), theta=value)], 100, 0.0) is None


def test_parties_with_other_expressions_are_not_compared():
    table = load_utility(tiny.UTILITY.encode(), tiny.manifest())
    changed = tiny.UTILITY.replace("2 * hide", "3 * hide").replace(
        "creator = 0.5 }", "creator = 0.5 }\nat_least = { creator = 0.25 }"
    )
    other = load_utility(changed.encode(), tiny.manifest())
    means = {"home": {"pinner": mean(1.0), "creator": mean(2.0)}}
    assert compared(means, means, other, table) == [
        PartyOfSurface("home", "pinner", mean(1.0), None, None),
        PartyOfSurface("home", "creator", mean(2.0), mean(2.0), 0.25),
    ]
    assert compared(means, {}, table, table)[0].default is None
