from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.counterfactual.reference_estimators import CLIP, ROUNDS, synthetic_log
from ranker.counterfactual.estimators import ESTIMATORS, LoggedActions, on_policy
from ranker.errors import PropensityError

REFERENCE = json.loads((Path(__file__).parent / "reference.json").read_text())["estimates"]
WEIGHING = [name for name in ESTIMATORS if name != "dm"]


def actions(seed=0, requests=50, per_request=1, users=10):
    rng = np.random.default_rng(seed)
    count = requests * per_request
    return LoggedActions(
        rewards=rng.normal(size=count),
        logged=rng.uniform(0.05, 1, count),
        evaluated=rng.uniform(0, 1, count),
        users=rng.integers(users, size=requests),
        requests=np.repeat(np.arange(requests), per_request),
        predicted=rng.normal(size=count),
        expected=rng.normal(size=requests),
    )


def value(name, given_actions, clip=10.0):
    return ESTIMATORS[name].terms(given_actions, clip).value()


def test_every_estimator_has_a_reference():
    assert set(REFERENCE) == set(ESTIMATORS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_are_those_of_an_independent_library(name):
    log = synthetic_log()
    taken = np.arange(ROUNDS), log["choice"]
    logged = LoggedActions(
        log["reward"],
        log["logged"][taken],
        log["evaluated"][taken],
        np.arange(ROUNDS),
        np.arange(ROUNDS),
        log["predicted"][taken],
        (log["evaluated"] * log["predicted"]).sum(axis=1),
    )
    assert value(name, logged, CLIP) == pytest.approx(REFERENCE[name], rel=1e-12)


def test_estimates_by_hand():
    two = LoggedActions(
        rewards=np.array([1.0, 0.0, 1.0]),
        logged=np.array([0.5, 0.5, 0.25]),
        evaluated=np.array([1.0, 0.0, 1.0]),
        users=np.array([1, 1, 2]),
        requests=np.arange(3),
        predicted=np.array([0.5, 0.25, 0.5]),
        expected=np.array([0.5, 0.75, 0.5]),
    )
    assert value("ips", two) == (2 + 0 + 4) / 3
    assert value("snips", two) == (2 + 0 + 4) / (2 + 0 + 4)
    assert value("clipped", two, 2.0) == (2 + 0 + 2) / 3
    assert value("dm", two) == 1.75 / 3
    assert value("dr", two) == pytest.approx(1.75 / 3 + (2 * 0.5 + 4 * 0.5) / 3)
    assert value("sndr", two) == pytest.approx(1.75 / 3 + (2 * 0.5 + 4 * 0.5) / 6)
    assert value("clipped-dr", two, 2.0) == pytest.approx(1.75 / 3 + (2 * 0.5 + 2 * 0.5) / 3)


def test_rewards_of_positions_are_summed_per_request():
    positions = LoggedActions(
        rewards=np.array([1.0, 1.0, 0.0, 1.0]),
        logged=np.array([0.5, 0.25, 0.5, 1.0]),
        evaluated=np.array([1.0, 0.0, 1.0, 0.5]),
        users=np.array([1, 2]),
        requests=np.array([0, 0, 1, 1]),
    )
    assert value("ips", positions) == (1 * 2 + 1 * 0 + 0 * 2 + 1 * 0.5) / 2
    assert value("snips", positions) == pytest.approx(2.5 / (2 / 2 + 2.5 / 2))


@pytest.mark.parametrize("per_request", [1, 4])
@pytest.mark.parametrize("name", WEIGHING)
def test_the_logging_policy_itself_gets_its_mean_reward_exactly(name, per_request):
    given_actions = actions(per_request=per_request)
    same = replace(
        given_actions, evaluated=given_actions.logged, expected=given_actions.summed(given_actions.predicted)
    )
    mean = same.summed(same.rewards).mean()
    assert value(name, same, 1.0) == pytest.approx(mean, rel=1e-12)
    assert on_policy(same).value() == mean


def test_the_direct_method_has_a_value_of_its_own_for_the_logging_policy():
    given_actions = actions()
    same = replace(given_actions, evaluated=given_actions.logged)
    assert value("dm", same) == same.expected.mean()


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_doubly_robust_is_ips_plus_its_control_variate(seed, per_request):
    logged = actions(seed, per_request=per_request)
    control = logged.expected - logged.summed(logged.weights * logged.predicted)
    assert value("dr", logged) == pytest.approx(value("ips", logged) + control.mean(), rel=1e-9, abs=1e-9)


@given(st.integers(0, 10_000))
def test_a_reward_model_of_zeros_makes_doubly_robust_ips(seed):
    logged = actions(seed)
    without = replace(logged, predicted=np.zeros(50), expected=np.zeros(50))
    for plain, robust in (("ips", "dr"), ("snips", "sndr"), ("clipped", "clipped-dr")):
        assert value(robust, without, 3.0) == value(plain, without, 3.0)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_order_of_requests_does_not_matter(name):
    logged = actions(per_request=3)
    rng = np.random.default_rng(1)
    shuffled, rows = rng.permutation(50), rng.permutation(150)
    new_number = np.empty(50, np.int64)
    new_number[shuffled] = np.arange(50)
    moved = LoggedActions(
        logged.rewards[rows],
        logged.logged[rows],
        logged.evaluated[rows],
        logged.users[shuffled],
        new_number[logged.requests[rows]],
        logged.predicted[rows],
        logged.expected[shuffled],
    )
    assert value(name, moved) == pytest.approx(value(name, logged), rel=1e-12)


@pytest.mark.parametrize("name", ["clipped", "clipped-dr"])
def test_a_limit_above_all_weights_clips_nothing(name):
    logged = actions()
    assert value(name, logged, 1e9) == value(name.replace("clipped-dr", "dr").replace("clipped", "ips"), logged)


@pytest.mark.parametrize("propensity", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_propensity_that_is_no_probability_is_refused(propensity):
    logged = np.full(50, 0.5)
    logged[7] = propensity
    with pytest.raises(PropensityError, match=r"logging propensity of action 7 is .* not in \(0, 1\].*leave these"):
        replace(actions(), logged=logged)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"evaluated": np.full(50, 1.1)}, r"evaluated probability of action 0 is 1.1, which is not in \[0, 1\]"),
        ({"evaluated": np.full(50, np.nan)}, "evaluated probability of action 0 is nan"),
        ({"rewards": np.full(50, np.nan)}, "the reward at position 0 is nan"),
        ({"predicted": np.full(50, np.inf)}, "the predicted reward at position 0 is inf"),
        ({"expected": np.full(50, np.nan)}, "the expected reward at position 0 is nan"),
        ({"logged": np.ones(49)}, "logged has 49 values for 50"),
        ({"requests": np.zeros(50, np.int64)}, "each of the 50 requests needs a logged action"),
        ({"expected": None}, "both predicted and expected"),
        ({"expected": np.ones(3)}, "gave 50 and 3 values"),
    ],
)
def test_other_input_that_cannot_be_evaluated_is_named(changed, says):
    with pytest.raises(PropensityError, match=says):
        replace(actions(), **changed)


def test_estimators_with_a_reward_model_need_one():
    without = replace(actions(), predicted=None, expected=None)
    with pytest.raises(PropensityError, match="needs a reward model; use ips, snips or clipped"):
        value("dr", without)
    with pytest.raises(PropensityError, match="must be at least 1"):
        value("clipped", without, 0.5)
