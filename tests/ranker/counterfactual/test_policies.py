from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model_store.model.discount import discounts
from ranker.counterfactual.estimators import ESTIMATORS
from ranker.counterfactual.evaluate import UNITS, evaluate_policy, logged_actions
from ranker.counterfactual.forecast import Settings
from ranker.counterfactual.policies import (
    exploring_policy,
    logging_policy,
    party_utilities,
    surface_table,
    utility_policy,
    whole_answers,
)
from ranker.counterfactual.rewards import RewardModel, head_labels, rewards_of
from ranker.errors import PropensityError
from tests import tiny
from tests.ranker.counterfactual import logged

SETTINGS = Settings(resamples=200)


def table(made, content=tiny.UTILITY):
    return surface_table(content.encode(), made, "utility.toml")


def weighing(creator):
    return tiny.UTILITY.replace("creator = 0.5", f"creator = {creator}")


@pytest.fixture(scope="module")
def made():
    return logged.slates()


def test_the_logged_table_gives_back_the_logged_utilities_to_the_bit(made):
    np.testing.assert_array_equal(party_utilities(table(made), made), made.party_utilities)


def test_the_logged_table_puts_tuned_answers_where_they_were(made):
    policy = utility_policy("tuned", table(made), made)
    assert (policy.order_probabilities[made.arms == ""] == 1).all()
    assert (policy.order_probabilities == 0).any()


def test_an_arms_weights_reproduce_its_answers(made):
    policy = utility_policy("more", table(made, weighing(2.0)), made)
    assert (made.arms == "more").sum() > 50
    assert (policy.order_probabilities[made.arms == "more"] == 1).all()


def test_a_policy_puts_each_pin_once_and_better_pins_first(made):
    policy = utility_policy("reversed", table(made, weighing(-5)), made)
    (where,) = policy.placements
    positions = where.positions.reshape(-1, logged.PINS)
    assert (np.sort(positions, axis=1) == np.arange(logged.PINS)).all()
    utilities = made.party_utilities @ [1.0, -5]
    for best in np.take_along_axis(utilities.reshape(-1, logged.PINS), np.argsort(positions, axis=1), axis=1):
        assert (np.diff(best) <= 1e-6).all()


def test_equal_utilities_keep_the_order_of_the_request(made):
    flat = "[surfaces.home]\nweights = { pinner = 1 }\nutilities = { pinner = '0 * save' }"
    policy = utility_policy("flat", table(made, flat), made)
    np.testing.assert_array_equal(policy.placements[0].positions, made.places)
    in_order = (made.places.reshape(-1, logged.PINS) == np.arange(logged.PINS)).all(axis=1)
    np.testing.assert_array_equal(policy.order_probabilities, in_order)


def test_an_exploring_policy_with_equal_utilities_keeps_the_order_of_the_request(made):
    flat = "[surfaces.home]\nweights = { pinner = 1, creator = 0 }\nutilities = { pinner = '0 * save', creator = '0' }"
    policy = exploring_policy("flat", table(made, flat), logged.explorer(logged.WEIGHTS), made)
    np.testing.assert_allclose(policy.position_probabilities, made.places == made.positions)


#: Most pins of an answer have a party's utility in common with others.
TIES = (
    tiny.UTILITY.replace('"save - 2 * hide"', '"where(save > 0.5, 1, 0)"')
    .replace('"save * sqrt(pin.popularity)"', '"where(pin.popularity > 0.5, 1, 0)"')
    .replace("creator = 0.5", "creator = 0.3")
)


@pytest.mark.parametrize(("explore", "creator", "arm"), [(logged.WEIGHTS, 0.0, "less"), (logged.ORDER, 0.3, "")])
def test_ties_do_not_make_a_policy_agree_with_whatever_was_logged(explore, creator, arm):
    made = logged.slates(explore=explore, table=TIES)
    policy = utility_policy("policy", table(made, TIES.replace("creator = 0.3", f"creator = {creator}")), made)
    assert (policy.order_probabilities[made.arms == arm] == 1).all()
    weights = policy.order_probabilities / made.order_propensities
    assert weights.mean() == pytest.approx(1, abs=0.15)  # 1.7 and 4.9 if ties kept the logged order
    explorer = logged.explorer(explore, TIES)
    exploring = exploring_policy("tiny@1", table(made, TIES), explorer, made)
    np.testing.assert_allclose(exploring.order_probabilities, made.order_propensities, rtol=1e-12)
    np.testing.assert_allclose(exploring.position_probabilities, made.propensities, rtol=1e-12)


@pytest.mark.parametrize("explore", [logged.WEIGHTS, logged.ORDER])
def test_the_exploring_policy_that_logged_has_the_logged_propensities(explore):
    made = logged.slates(20, 3, explore=explore)
    policy = exploring_policy("tiny@1", table(made), logged.explorer(explore), made)
    np.testing.assert_allclose(policy.order_probabilities, made.order_propensities, rtol=1e-12)
    np.testing.assert_allclose(policy.position_probabilities, made.propensities, rtol=1e-12)
    chances = np.sum([placement.chances for placement in policy.placements], axis=0)
    np.testing.assert_allclose(chances, 1)


def test_answers_of_different_lengths_are_ordered_each_by_itself(made):
    rows = np.concatenate([np.arange(0, 4), np.arange(6, 12), np.arange(12, 13)])
    short = replace(
        made,
        **{name: getattr(made, name)[:3] for name in ("request_ids", "user_ids", "time_ms", "arms", "party_weights")},
        order_propensities=made.order_propensities[:3],
        candidates=np.array([4, 6, 1]),
        row_splits=np.array([0, 4, 10, 11]),
        places=np.array([2, 0, 3, 1, 5, 4, 3, 2, 1, 0, 0]),
        **{
            name: getattr(made, name)[rows]
            for name in (
                "pin_ids",
                "probabilities",
                "party_utilities",
                "attribute_values",
                "utilities",
                "propensities",
            )
        },
        labels=made.labels[rows],
        seen=made.seen[rows],
    )
    for content in (logged.WEIGHTS, logged.ORDER):
        policy = exploring_policy("tiny@1", table(short), logged.explorer(content), short)
        assert policy.order_probabilities[2] == pytest.approx(1)  # one pin has one order
        np.testing.assert_allclose(np.sum([p.chances for p in policy.placements], axis=0), 1)
    assert utility_policy("tuned", table(short), short).placements[0].positions[10] == 0


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["ips", "snips", "clipped", "dr", "sndr", "clipped-dr"])
def test_the_policy_that_logged_earns_what_was_logged(made, unit, name):
    model, rewards = RewardModel.of(made), rewards_of(table(made), made)
    actions = logged_actions(unit, made, logging_policy(made), rewards["save"], model)
    saves = made.labels[:, 0].sum() / made.requests
    assert ESTIMATORS[name].terms(actions, 1.0).value() == pytest.approx(saves, rel=1e-12)


def test_rewards_are_the_tables_expressions_over_actions(made):
    rewards = rewards_of(table(made), made)
    assert list(rewards) == ["pinner", "creator", "save", "hide"]
    labels, positions = head_labels(made), made.positions
    save, hide = labels.T.astype(float)
    np.testing.assert_array_equal(rewards["pinner"].of(labels, made, positions), save - 2 * hide)
    expected = save * np.sqrt(made.attribute_values[:, 0])
    np.testing.assert_allclose(rewards["creator"].of(labels, made, positions), expected)
    np.testing.assert_array_equal(rewards["hide"].of(labels, made, positions), hide)
    discounted = rewards_of(table(made), made, discounted=True)["save"].of(labels, made, positions)
    np.testing.assert_array_equal(discounted, save * discounts(logged.PINS)[positions])


def test_a_pin_without_a_score_leaves_the_other_pins_their_forecasts(made):
    # Servers put it at the end; the log says NaN.
    probabilities = made.probabilities.copy()
    probabilities[7] = np.nan
    spoilt = replace(made, probabilities=probabilities)
    model, whole = RewardModel.of(spoilt), RewardModel.of(made)
    np.testing.assert_allclose(model.factors, whole.factors, rtol=0.03)
    saves = rewards_of(table(spoilt), spoilt)["save"]
    predicted = model.predicted(saves, spoilt.positions)
    assert predicted[7] == 0
    assert np.isfinite(predicted).all()


def test_a_reward_that_is_no_number_for_actions_is_named(made):
    logarithm = table(made, tiny.UTILITY.replace("save - 2 * hide", "log(save)"))
    with pytest.raises(PropensityError, match="the reward pinner is -inf for .* With actions, 0 or 1,"):
        evaluate_policy(
            made, utility_policy("log", logarithm, made), logging_policy(made), rewards_of(logarithm, made), SETTINGS
        )


def test_examination_factors_are_actions_over_predicted_ones_of_other_users():
    made = logged.slates(1500, 2, seed=3)
    model = RewardModel.of(made)
    np.testing.assert_allclose(model.factors.mean(axis=0)[:, 0], (np.arange(logged.PINS) + 1) ** -0.5, atol=0.04)
    fold = model.folds == 0
    changed = replace(made, labels=np.where(fold[:, None], ~made.labels, made.labels))
    again = RewardModel.of(changed)
    np.testing.assert_array_equal(again.factors[0], model.factors[0])  # fold 0 does not see its own labels
    assert (again.factors[1] != model.factors[1]).any()


def test_a_log_without_exploration_is_refused_for_another_policy(made):
    certain = replace(
        made, order_propensities=np.ones(made.requests), propensities=np.ones(len(made.pin_ids)), arms=made.arms
    )
    policy = utility_policy("another", table(made, weighing(3.0)), certain)
    rewards = {"save": rewards_of(table(made), made)["save"]}
    found = evaluate_policy(certain, policy, logging_policy(certain), rewards, SETTINGS)
    orders = found.unit("orders")
    assert orders.forecasts == {}
    assert "could have given only" in orders.refused.reason
    assert "explore with arms near" in orders.refused.fix
    with pytest.raises(PropensityError, match="refused: by this log, logging could"):
        found.forecast("orders", "save", "dr")


def test_too_few_effective_users_are_refused_with_the_days_that_are_missing(made):
    policy = utility_policy("more", table(made, weighing(2.0)), made)
    rewards = {"save": rewards_of(table(made), made)["save"]}
    few = evaluate_policy(made, policy, logging_policy(made), rewards, replace(SETTINGS, ess_min=1000))
    refused = few.unit("orders").refused
    assert "at least 1000 are required" in refused.reason
    days = 2 * 1000 / few.unit("orders").overlap.effective_users
    assert f"log for about {int(np.ceil(days))} days instead of 2.0" in refused.fix
    enough = evaluate_policy(made, policy, logging_policy(made), rewards, replace(SETTINGS, ess_min=50))
    assert enough.unit("orders").refused is None


def test_a_policy_has_no_difference_to_itself(made):
    policy = utility_policy("more", table(made, weighing(2.0)), made)
    rewards = rewards_of(table(made), made)
    found = evaluate_policy(made, policy, policy, rewards, replace(SETTINGS, ess_min=20))
    for unit in UNITS:
        for reward in rewards:
            for estimator in ESTIMATORS:
                difference = found.forecast(unit, reward, estimator).difference
                assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_an_attribute_that_was_not_logged_is_named_with_what_to_do(made):
    content = tiny.UTILITY.replace("sqrt(pin.popularity)", "pin.price")
    with pytest.raises(
        PropensityError, match=r"unknown name 'pin.price'.*attributes pin.popularity of tiny@1.*weight 0"
    ):
        table(made, content)


def test_other_tables_that_do_not_fit_are_refused(made):
    with pytest.raises(PropensityError, match="but not 'home'"):
        table(made, "[surfaces.away]\nweights = { pinner = 1 }\nutilities = { pinner = 'save' }")
    with pytest.raises(PropensityError, match=r"utility.toml: the utility table is not TOML"):
        table(made, "[")


def test_logs_that_cannot_be_evaluated_are_refused(made):
    policy = utility_policy("tuned", table(made), made)
    zero = made.order_propensities.copy()
    zero[3] = 0
    rewards = rewards_of(table(made), made)
    with pytest.raises(PropensityError, match="logging propensity of action 3 is 0.0"):
        evaluate_policy(replace(made, order_propensities=zero), policy, logging_policy(made), rewards, SETTINGS)
    with pytest.raises(PropensityError, match="no action hide, which tiny@1 predicts; it has save"):
        head_labels(replace(made, actions=("save",), labels=made.labels[:, :1]))
    with pytest.raises(PropensityError, match="no reward to evaluate"):
        evaluate_policy(made, policy, logging_policy(made), {}, SETTINGS)
    with pytest.raises(PropensityError, match="at least two users"):
        RewardModel.of(replace(made, user_ids=np.ones_like(made.user_ids)))


def test_answers_without_a_pin_are_left_out(made):
    empty = replace(
        made,
        **{
            name: np.concatenate([getattr(made, name), getattr(made, name)[:1]])
            for name in ("request_ids", "user_ids", "time_ms", "arms", "party_weights", "order_propensities")
        },
        candidates=np.append(made.candidates, 0),
        row_splits=np.append(made.row_splits, made.row_splits[-1]),
    )
    policy, rewards = logging_policy(empty), rewards_of(table(made), made)
    with pytest.raises(PropensityError, match="an answer without a pin"):
        evaluate_policy(empty, policy, policy, rewards, SETTINGS)
    kept = whole_answers(empty)
    np.testing.assert_array_equal(kept.row_splits, made.row_splits)
    np.testing.assert_array_equal(kept.request_ids, made.request_ids)


def test_answers_that_leave_out_candidates_are_not_evaluated(made):
    candidates = made.candidates.copy()
    candidates[1:] += 1
    cut = replace(made, candidates=candidates)
    for policy in (utility_policy, lambda *a: exploring_policy(a[0], a[1], logged.explorer(logged.WEIGHTS), a[2])):
        with pytest.raises(PropensityError, match=r"^599 of 600 answers do not hold all candidates"):
            policy("tuned", table(made), cut)
    kept = whole_answers(cut)
    assert (kept.requests, len(kept.pin_ids), len(kept.labels)) == (1, logged.PINS, logged.PINS)
    np.testing.assert_array_equal(kept.pin_ids, made.pin_ids[: logged.PINS])
    with pytest.raises(PropensityError, match=r"none of the 600 answers holds all candidates .* send top_k = 0"):
        whole_answers(replace(made, candidates=made.candidates + 1))


def test_propensities_that_do_not_fit_the_policy_are_refused(made):
    """Every weight is twice what it should be, as if the log had been ordered by something else than it says."""
    wrong = replace(made, order_propensities=made.order_propensities / 2, propensities=made.propensities / 2)
    policy = utility_policy("more", table(made, weighing(2.0)), wrong)
    rewards = {"save": rewards_of(table(made), made)["save"]}
    found = evaluate_policy(wrong, policy, logging_policy(made), rewards, replace(SETTINGS, ess_min=20))
    for unit in UNITS:
        assert "the mean weight of more is 2." in found.unit(unit).refused.reason
        assert "no policy can have more than 1" in found.unit(unit).refused.reason
