from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ranker.errors import DatasetError, SettingError
from ranker.tuning.orders import ScoredRequests
from ranker.tuning.results import HeldOutCheck, Infeasible, Tuned
from ranker.tuning.thetas import parse_thetas
from ranker.tuning.tune import Goal, tune
from tests.ranker.tuning.randomised_orders import best_mixture

PARTIES = ("pinner", "creator", "merchant")
IN_FORCE = np.array([1.0, 0.2, 0.1])


def scored(seed=0, requests=300, rows=20, per_user=3):
    rng = np.random.default_rng(seed)
    utilities = rng.gamma(0.5, size=(requests * rows, 3))
    utilities[:, 2] *= rng.random(len(utilities)) < 0.3
    return ScoredRequests(PARTIES, np.arange(requests) // per_user, np.arange(requests + 1) * rows, utilities)


def tuned(requests, *thetas, weights=IN_FORCE, hold_out=0.3, **options):
    return tune(requests, Goal("pinner", parse_thetas(thetas), weights), 7, hold_out, resamples=200, **options)


def party(result, name):
    return next(one for one in result.parties if one.party == name)


def test_the_tuned_weights_meet_the_thetas_and_nearly_reach_the_bound():
    result = tuned(scored(), "creator=+10%", "merchant=+5%")
    assert isinstance(result, Tuned)
    assert result.met
    for name, share in (("creator", 1.1), ("merchant", 1.05)):
        one = party(result, name)
        assert one.theta == pytest.approx(share * one.before.value)
        assert one.after.value >= one.theta
        assert one.binding
    assert result.gap < 1e-8
    assert result.deployed <= result.bound
    assert result.lost_to_one_order < 1e-3
    assert party(result, "pinner").weight_after == 1.0


def test_the_result_is_the_value_of_the_orders_that_the_weights_give():
    requests = scored()
    result = tuned(requests, "creator=+10%", hold_out=0)
    assert isinstance(result, Tuned)
    served = requests.served(result.weights).mean(axis=0)
    assert [one.after.value for one in result.parties] == pytest.approx(served.tolist())
    # Merchant has no theta: it keeps its weight, and its term stays in the objective.
    assert party(result, "merchant").role == "kept"
    assert party(result, "merchant").weight_after == 0.1
    assert result.deployed == pytest.approx(served @ [1.0, 0.0, 0.1])


def test_the_objective_keeps_the_weights_in_force_of_the_others():
    requests = scored(requests=20, rows=6, per_user=1)
    result = tuned(requests, "creator=+5%", hold_out=0, weights=np.array([2.0, 0.2, 0.5]), fronts=False)
    assert isinstance(result, Tuned)
    theta = np.array([party(result, "creator").theta])
    truth = best_mixture(requests, np.array([2.0, 0, 0.5]), np.eye(3)[[1]], theta)
    assert result.bound == pytest.approx(truth, abs=1e-6)
    # One more unit for the creator costs so much of the pinner, whose own weight is 2.
    assert party(result, "creator").multiplier == pytest.approx(party(result, "creator").weight_after / 2, rel=0.2)


def test_a_theta_that_costs_nothing_takes_the_weight_away():
    result = tuned(scored(), "creator=0.001", "merchant=+5%")
    assert isinstance(result, Tuned)
    assert party(result, "creator").weight_after == 0
    assert not party(result, "creator").binding


@pytest.mark.parametrize(
    ("thetas", "told"),
    [
        (("creator=+500%",), "creator must get "),
        (("creator=+45%", "merchant=+90%"), "each theta can be met alone, but not all of them together"),
    ],
    ids=["alone", "together"],
)
def test_thetas_that_no_order_meets_are_named_with_what_is_attainable(thetas, told):
    requests = scored()
    result = tuned(requests, *thetas, hold_out=0)
    assert isinstance(result, Infeasible)
    assert told in str(result)
    # What they could get together is attainable, and a little more is not.
    together = [f"{one.party}={one.together - 1e-6 * abs(one.together):.9g}" for one in result.parties]
    assert isinstance(tuned(requests, *together, hold_out=0, fronts=False), Tuned)
    beyond = [f"{one.party}={one.together * 1.01:.9g}" for one in result.parties]
    assert isinstance(tuned(requests, *beyond, hold_out=0), Infeasible)
    for one in result.parties:
        assert one.together <= one.alone
        alone = requests.best(np.array([float(name == one.party) for name in PARTIES]))
        assert one.alone == pytest.approx(alone[PARTIES.index(one.party)])


@pytest.mark.parametrize("thetas", [("creator=+500%",), ("creator=+45%", "merchant=+90%")], ids=["alone", "together"])
def test_thetas_copied_from_the_error_can_be_met(thetas):
    requests = scored()
    told = str(tuned(requests, *thetas, hold_out=0))
    nearest = told.split("smallest shortfall: ")[1].removesuffix(". Lower the thetas to at most that").split(", ")
    assert isinstance(tuned(requests, *nearest, hold_out=0, fronts=False), Tuned)


def test_a_percentage_of_nothing_is_refused():
    requests = scored()
    utilities = requests.utilities.copy()
    utilities[:, 1] = 0
    with pytest.raises(
        SettingError, match="creator gets 0 by the weights in force, .* write a value, e.g. creator=0.1"
    ):
        tuned(requests.replaced(utilities), "creator=+10%", "merchant=+5%")


def test_thetas_beyond_any_reach_are_like_those_just_beyond():
    requests = scored()
    far = tuned(requests, "creator=1e300", hold_out=0)
    assert isinstance(far, Infeasible)
    assert "creator must get 1e+300, but can get at most " in str(far)
    free = tuned(requests, "creator=-1e300", hold_out=0, fronts=False)
    assert isinstance(free, Tuned)
    assert not party(free, "creator").binding


def test_equal_seeds_give_equal_results_and_others_hold_out_other_users():
    first, again = tuned(scored(), "creator=+10%"), tuned(scored(), "creator=+10%")
    assert first == again
    goal = Goal("pinner", parse_thetas(["creator=+10%"]), IN_FORCE)
    other = tune(scored(), goal, 8, resamples=200)
    assert isinstance(other, Tuned)
    assert other.held_out != first.held_out


def test_no_user_is_both_tuned_on_and_held_out():
    result = tuned(scored(), "creator=+10%")
    assert isinstance(result, Tuned)
    assert result.users + result.held_out_users == 100
    assert (result.requests, result.held_out_requests) == (210, 90)


def test_a_held_out_theta_is_relative_to_the_held_out_requests():
    requests = scored(requests=4_000, rows=10)
    result = tuned(requests, "creator=+10%", "merchant=1.2", fronts=False)
    assert isinstance(result, Tuned)
    creator, merchant = result.held_out
    assert creator.theta != party(result, "creator").theta
    assert creator.theta == pytest.approx(party(result, "creator").theta, rel=0.05)
    assert merchant.theta == 1.2
    assert creator.holds
    assert merchant.holds
    assert merchant.shortfall == max(0, 1.2 - merchant.value)


@pytest.mark.parametrize(
    ("value", "holds"), [(1.1, True), (1.0, True), (0.971, True), (0.969, False)], ids=["more", "just", "noise", "less"]
)
def test_a_check_holds_within_one_percent_and_two_standard_errors(value, holds):
    assert HeldOutCheck("creator", 1.0, value, 0.01).holds is holds


def test_without_held_out_users_nothing_is_checked():
    result = tuned(scored(), "creator=+10%", hold_out=0)
    assert isinstance(result, Tuned)
    assert (result.held_out, result.held_out_requests, result.requests) == ((), 0, 300)


def test_intervals_come_from_users_and_hold_the_value():
    result = tuned(scored(), "creator=+10%")
    assert isinstance(result, Tuned)
    for one in result.parties:
        assert one.before.low < one.before.value < one.before.high
        assert one.change_percent.value == pytest.approx(100 * (one.after.value / one.before.value - 1))
    # With one user in all, resampling users changes nothing.
    single = scored()
    same = ScoredRequests(PARTIES, np.zeros(300, np.int64), single.row_splits, single.utilities)
    lone = tuned(same, "creator=+10%", hold_out=0, fronts=False)
    assert isinstance(lone, Tuned)
    assert lone.parties[0].after.low == lone.parties[0].after.high


def test_a_front_falls_from_where_the_theta_is_free_to_the_most_that_is_attainable():
    result = tuned(scored(), "creator=+10%", "merchant=+5%")
    assert isinstance(result, Tuned)
    for name, points in result.fronts.items():
        thetas, objectives = [p.theta for p in points], [p.objective for p in points]
        assert thetas == sorted(thetas)
        assert all(later <= earlier + 1e-6 for earlier, later in pairwise(objectives))
        assert thetas[0] < party(result, name).theta < thetas[-1]
        assert objectives[-1] < result.bound < objectives[0]


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Goal("author", parse_thetas(["creator=1"]), IN_FORCE), "there is no party 'author'; the parties are pinner"),
        (Goal("pinner", parse_thetas(["ad=1"]), IN_FORCE), "there is no party 'ad'"),
        (Goal("pinner", parse_thetas(["pinner=1"]), IN_FORCE), "pinner is maximised, so it cannot have a theta"),
        (Goal("pinner", (), IN_FORCE), "no party must get anything; say what"),
        (Goal("pinner", parse_thetas(["creator=1"]), np.array([0.0, 1, 1])), "pinner has the weight 0 in force"),
    ],
    ids=["maximised", "constrained", "both", "none", "weight"],
)
def test_a_goal_that_does_not_fit_is_named(goal, message):
    with pytest.raises(SettingError, match=message):
        tune(scored(), goal, 7)


def test_a_theta_at_the_very_edge_of_what_is_possible_is_met():
    requests = scored()
    utilities = requests.utilities.copy()
    utilities[:, 2] = 0.7  # no order changes what the merchant gets
    result = tuned(requests.replaced(utilities), "creator=+5%", "merchant=+0%", hold_out=0)
    assert isinstance(result, Tuned)
    assert result.met
    most = result.fronts["creator"][-1].theta
    assert isinstance(tuned(requests, f"creator={most:.9g}", hold_out=0, fronts=False), Tuned)
    assert isinstance(tuned(requests, f"creator={most * 1.001:.9g}", hold_out=0, fronts=False), Infeasible)


def test_candidates_that_are_not_finite_do_not_spoil_the_others():
    requests = scored()
    utilities = requests.utilities.copy()
    utilities[::3, 1] = np.nan
    result = tuned(requests.replaced(utilities), "creator=+5%")
    assert isinstance(result, Tuned)
    assert result.met
    assert np.isfinite(result.bound)
    with pytest.raises(DatasetError, match="no candidate has a finite utility for every party"):
        tuned(requests.replaced(np.full_like(utilities, np.nan)), "creator=+5%")


def test_one_user_cannot_be_split():
    requests = ScoredRequests(PARTIES, np.array([1, 1]), np.array([0, 1, 2]), np.ones((2, 3)))
    with pytest.raises(SettingError, match="cannot hold out 30% of 1 users with 2 requests"):
        tuned(requests, "creator=0.1")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("creator=+10%", 2.2),
        ("creator=-10%", 1.8),
        ("creator=0.42", 0.42),
        ("creator=-1.5", -1.5),
        ("creator=1e-3", 1e-3),
    ],
)
def test_a_theta_is_a_value_or_relative_to_the_present_one(text, value):
    assert parse_thetas([text])[0].of(2.0) == pytest.approx(value)


def test_ten_percent_more_than_a_negative_value_is_more():
    assert parse_thetas(["creator=+10%"])[0].of(-2.0) == pytest.approx(-1.8)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["creator"], "--at-least creator: write PARTY=VALUE or PARTY=\\+PERCENT%"),
        (["creator=10%"], "write the sign, e.g. creator=\\+10%"),
        (["creator=nan"], "write PARTY=VALUE"),
        (["creator=1e999"], "the value must be finite"),
        (["creator=1", "creator=+1%"], "creator already has a value"),
    ],
)
def test_a_malformed_theta_is_named(texts, message):
    with pytest.raises(SettingError, match=message):
        parse_thetas(texts)
