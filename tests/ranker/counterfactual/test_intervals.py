from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student

from ranker.counterfactual.estimators import ESTIMATORS, LoggedActions, Terms, on_policy
from ranker.counterfactual.intervals import (
    Resampled,
    _student_quantile,
    bootstrap,
    clipped_bounds,
    empirical_bernstein,
    overlap,
)
from ranker.errors import PropensityError
from ranker.evaluation.bootstrap import Resampling


def weighted(weights, users=None):
    weights = np.asarray(weights, np.float64)
    count = len(weights)
    return LoggedActions(
        rewards=np.ones(count),
        logged=np.full(count, 0.01),
        evaluated=0.01 * weights,
        users=np.arange(count) if users is None else np.asarray(users),
        requests=np.arange(count),
    )


def test_equal_weights_have_as_many_effective_users_as_users():
    found = overlap(weighted(np.ones(40)))
    assert found.effective_users == pytest.approx(40)
    assert found.largest_share == pytest.approx(1 / 40)
    assert found.support.value == pytest.approx(1)


def test_effective_users_are_counted_by_user_and_not_by_request():
    found = overlap(weighted([1, 1, 1, 1, 4], users=[3, 3, 3, 3, 9]))
    assert found.effective_users == pytest.approx((4 + 4) ** 2 / (4**2 + 4**2))
    assert found.largest_share == pytest.approx(0.5)


def test_without_any_weight_there_is_no_effective_user():
    found = overlap(weighted([0, 0, 0]))
    assert (found.effective_users, found.largest_share, found.support.value) == (0, 0, 0)


def log(seed, users=200, per_user=3):
    """Two choices, with means by user: A earns 0.2 to 0.6, B 0.1 more; logging takes A in 3 of 4 cases."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), per_user)
    base = np.repeat(rng.uniform(0.2, 0.6, users), per_user)
    takes_b = rng.random(len(user)) < 0.25
    rewards = (rng.random(len(user)) < base + 0.1 * takes_b).astype(np.float64)
    return LoggedActions(rewards, np.where(takes_b, 0.25, 0.75), takes_b.astype(np.float64), user, np.arange(len(user)))


def test_a_seed_repeats_the_interval_and_equal_terms_differ_by_exactly_nothing():
    logged = log(1)
    terms = {"ips": ESTIMATORS["ips"].terms(logged, 10), "again": ESTIMATORS["ips"].terms(logged, 10)}
    found = bootstrap(logged.users, terms, 200, seed=3)
    assert found["ips"].estimate() == bootstrap(logged.users, terms, 200, seed=3)["ips"].estimate()
    assert found["ips"].estimate() != bootstrap(logged.users, terms, 200, seed=4)["ips"].estimate()
    difference = (found["ips"] - found["again"]).estimate()
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert found["ips"].estimate().value == pytest.approx(terms["ips"].value())


def test_few_users_with_most_of_the_weight_widen_the_interval():
    """The interval is a quantile of Student's t times the spread of the resamples: of few degrees with heavy users."""
    drawn = np.linspace(-3, 3, 6001)
    resampled = Resampling(np.array(1.0), drawn)
    even = Resampled(resampled, np.tile([1.0, -1.0], 5000)).estimate()
    assert (even.low, even.high) == pytest.approx((1 - 1.96 * drawn.std(), 1 + 1.96 * drawn.std()), abs=2e-3)
    influences = np.concatenate([np.full(20, 10.0), np.full(480, -0.4)])
    heavy = Resampled(resampled, influences).estimate()
    degrees = 2 * 500 / (np.mean(influences**4) / np.mean(influences**2) ** 2 - 1)
    assert heavy.high == pytest.approx(1 + student.ppf(0.975, degrees) * drawn.std(), abs=2e-3)
    assert heavy.high - 1 == pytest.approx(1 - heavy.low)


def test_an_interval_needs_a_value_in_most_resamples():
    drawn = np.linspace(-3, 3, 101)
    drawn[:6] = np.nan
    found = Resampled(Resampling(np.array(1.0), drawn), np.tile([1.0, -1.0], 50)).estimate()
    assert (found.value, found.low, found.high) == (1.0, None, None)
    drawn[:3] = 0.0
    assert Resampled(Resampling(np.array(1.0), drawn), np.tile([1.0, -1.0], 50)).estimate().high is not None


@pytest.mark.parametrize("degrees", [10, 20, 60, 500])
def test_the_expansion_of_students_quantile_is_close(degrees):
    assert _student_quantile(degrees) == pytest.approx(student.ppf(0.975, degrees), rel=2e-3)


def test_influences_are_what_the_estimate_changes_by_without_a_user():
    logged = log(5, users=400)
    terms = ESTIMATORS["snips"].terms(logged, 10)
    found = bootstrap(logged.users, {"snips": terms}, 100)["snips"].influences
    for user in (0, 17, 399):
        kept = logged.users != user
        without = Terms(terms.modelled[kept], terms.weighted[kept], terms.normalisers[kept]).value()
        assert terms.value() - without == pytest.approx(found[user], rel=0.05, abs=1e-6)


def test_influences_of_what_is_modelled_and_of_what_is_weighted_add_up():
    rng = np.random.default_rng(2)
    terms = Terms(rng.random(900), rng.normal(size=900), np.ones(900))
    users = np.repeat(np.arange(300), 3)
    found = bootstrap(users, {"dr": terms}, 10)["dr"].influences
    by_user = np.bincount(users, terms.modelled - terms.modelled.mean() + terms.weighted - terms.weighted.mean()) / 900
    np.testing.assert_allclose(found, by_user)


def test_requests_of_one_user_widen_the_interval():
    rng = np.random.default_rng(0)
    by_user = np.repeat(rng.random(50), 20)
    logged = LoggedActions(by_user, np.ones(1000), np.ones(1000), np.repeat(np.arange(50), 20), np.arange(1000))
    clustered = bootstrap(logged.users, {"mean": on_policy(logged)})["mean"].estimate()
    alone = bootstrap(np.arange(1000), {"mean": on_policy(logged)})["mean"].estimate()
    assert clustered.high - clustered.low > 3 * (alone.high - alone.low)


def test_the_bernstein_bound_by_hand():
    values = np.tile([0.0, 1.0], 200)
    found = empirical_bernstein(np.arange(400), values, (0, 1))
    margin = np.sqrt(2 * (100 / 399) * np.log(2 / 0.025) / 400) + 7 * np.log(2 / 0.025) / (3 * 399)
    assert (found.low, found.value, found.high) == pytest.approx((0.5 - margin, 0.5, 0.5 + margin))


def test_the_bernstein_bound_covers_the_truth_and_is_wider_than_resampling():
    covered = 0
    for seed in range(60):
        logged = log(seed)
        values = ESTIMATORS["clipped"].terms(logged, 10).weighted
        bound = empirical_bernstein(logged.users, values, clipped_bounds(logged.rewards, 10))
        resampled = bootstrap(logged.users, {"ips": ESTIMATORS["ips"].terms(logged, 10)}, 200)["ips"].estimate()
        assert bound.low < resampled.low < resampled.high < bound.high
        covered += bound.low <= 0.5 <= bound.high
    assert covered >= 57


def test_the_bernstein_bound_covers_the_truth_where_active_users_earn_less():
    """Users with 1 or 9 requests, and one click each: 2 clicks in 10 requests. Sums alone would vary too little."""
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        counts = np.where(rng.random(20_000) < 0.5, 1, 9)
        users = np.repeat(np.arange(20_000), counts)
        clicks = np.zeros(len(users))
        clicks[np.cumsum(counts) - 1] = 1
        bound = empirical_bernstein(users, clicks, (0, 1))
        covered += bound.low <= 0.2 <= bound.high
    assert covered >= 95


def test_the_bernstein_bound_holds_each_mean_that_the_theorem_allows():
    rng = np.random.default_rng(3)
    users = np.repeat(np.arange(300), rng.integers(1, 9, 300))
    values = rng.random(len(users))
    bound = empirical_bernstein(users, values, (0, 1))
    sums, counts = np.bincount(users, values), np.bincount(users)
    log = np.log(2 / 0.025)
    for mean in (bound.low, bound.high):
        centred = sums - mean * counts
        margin = np.sqrt(2 * np.var(centred, ddof=1) * log / 300) + 7 * counts.max() * log / (3 * 299)
        assert abs(centred.mean()) == pytest.approx(margin)
    few = empirical_bernstein(users[users < 2], values[users < 2], (0, 1))
    assert (few.low, few.high) == (0, 1)  # two users say nothing


def test_the_bernstein_bound_shrinks_with_users_not_with_requests_of_the_same_user():
    def width(users, per_user):
        logged = log(0, users, per_user)
        bound = empirical_bernstein(logged.users, logged.rewards, (0, 1))
        return bound.high - bound.low

    assert width(4000, 1) < width(400, 1) / 2
    assert width(400, 10) > 0.5 * width(400, 1)


def test_bounds_that_do_not_hold_are_refused():
    with pytest.raises(PropensityError, match="out of bounds"):
        empirical_bernstein(np.arange(3), np.array([0.0, 2.0, 1.0]), (0, 1))
    with pytest.raises(PropensityError, match=r"values from -1 to 1 are out of bounds \[0, 1\]"):
        empirical_bernstein(np.arange(3), np.array([0.0, -1.0, 1.0]), (0, 1))
    with pytest.raises(PropensityError, match="at least two users"):
        empirical_bernstein(np.zeros(3), np.array([0.0, 0.5, 1.0]), (0, 1))
    assert clipped_bounds([-2.0, 3.0], 5) == (-10, 15)
    assert clipped_bounds([2.0, 3.0], 5) == (0, 15)
    assert clipped_bounds([-2.0, -1.0], 5) == (-10, 0)


def test_support_shows_what_logging_could_not_give():
    logged = log(2)
    agreeing = replace(logged, logged=np.ones(600), evaluated=logged.evaluated)
    found = overlap(agreeing)
    assert found.support.high < 0.4
