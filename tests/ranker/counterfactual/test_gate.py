from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from model_store.model.utility import load_utility
from ranker.counterfactual.forecast import Settings
from ranker.counterfactual.gate import new_positions, rate_breaches
from ranker.errors import SettingError
from ranker.evaluation.gates import RateGate, parse_rate_gate
from ranker.evaluation.scoring import BundleScores, ScoredTest
from tests.ranker.scored import manifest

PINS = 4
SETTINGS = Settings(resamples=200, ess_min=50)
SAVE = RateGate("save", 0.0)


def scored(own_scores=None, users=400, seed=0, share=0.5):
    """Return answers of a parent that shuffles half of them; a pin is saved by its worth and its position."""
    rng = np.random.default_rng(seed)
    count = users * 2
    worth = rng.uniform(0.05, 0.9, (count, PINS))
    parents = np.clip(worth + rng.normal(0, 0.15, worth.shape), 0.02, 0.98)  # the parent knows it roughly
    order = np.argsort(-parents, axis=1)
    shuffled = rng.random(count) < share
    order[shuffled] = rng.permuted(order[shuffled], axis=1)
    positions = np.argsort(order, axis=1)
    tuned = positions == np.argsort(np.argsort(-parents, axis=1), axis=1)
    propensities = (1 - share) * tuned + share / PINS
    labels = rng.random(worth.shape) < worth * (positions + 1.0) ** -0.7
    by = {"worth": worth, "parents": parents, "reversed": -parents, "noise": rng.random(worth.shape)}
    own = parents if own_scores is None else by[own_scores]

    def scores(values):
        return BundleScores(
            ("save",), parents.reshape(-1, 1).astype(np.float32), values.ravel().astype(np.float32), None
        )

    return ScoredTest(
        heads=("save",),
        labels=labels.reshape(-1, 1).astype(np.float32),
        popularity=np.zeros((count * PINS, 1), np.float32),
        row_splits=np.arange(count + 1) * PINS,
        users=np.repeat(np.arange(users), 2),
        activity=np.zeros(count, np.int64),
        by_bundle={"parent": scores(parents), "this": scores(own)},
        positions=positions.ravel(),
        propensities=propensities.ravel(),
        surfaces=np.zeros(count, np.uint8),
    )


def test_a_version_that_orders_better_passes():
    test = scored("worth", users=3000)
    assert rate_breaches(test, "this", "parent", [SAVE], SETTINGS) == []
    (said,) = rate_breaches(test, "this", "parent", [RateGate("save", 0.5)], SETTINGS)
    assert said.startswith("save >= 0.5: by logged answers, the rate per request changes by +0.")


@pytest.mark.parametrize("scores", ["reversed", "noise"])
def test_a_version_that_orders_worse_does_not_pass(scores):
    (said,) = rate_breaches(scored(scores), "this", "parent", [SAVE], SETTINGS)
    assert "changes by -0." in said
    assert "95% interval from -0." in said


def test_the_parent_itself_changes_nothing_and_passes():
    assert rate_breaches(scored(), "this", "parent", [SAVE], SETTINGS) == []
    assert rate_breaches(scored(), "this", "parent", [RateGate("save", 1e-9)], SETTINGS)


TABLE = """
[surfaces.home]
weights = { pinner = 1.0, creator = 0.5, %(more)s = 0.0 }
[surfaces.home.utilities]
pinner = "save"
creator = "save * (pin.creator_tail > 0.5)"
%(more)s = "0 * save"
[surfaces.related]
weights = { pinner = 1.0 }
utilities = { pinner = "save" }
"""


def with_parties(test, more="merchant"):
    """Give the new version a utility table; every second pin is a small creator's."""
    table = load_utility((TABLE % {"more": more}).encode(), manifest(("save",)))
    own = replace(test.by_bundle["this"], table=table)
    tails = (np.arange(len(test.labels)) % 2).astype(np.float32)
    return replace(test, by_bundle={**test.by_bundle, "this": own}, attributes={"creator_tail": tails})


def favouring(test):
    """Let the new version put the pins of small creators first, each kind in the parent's order."""
    tails = test.attributes["creator_tail"]
    own = replace(test.by_bundle["this"], utilities=test.by_bundle["parent"].utilities + 2 * tails)
    return replace(test, by_bundle={**test.by_bundle, "this": own})


def numbers(said):
    return [float(number) for number in re.findall(r"[+-]\d\.\d+", said)]


def test_a_party_gets_what_its_expression_says_of_the_actions():
    test = favouring(with_parties(scored(users=1000)))
    assert rate_breaches(test, "this", "parent", [RateGate("creator", 0.0)], SETTINGS) == []
    (said,) = rate_breaches(test, "this", "parent", [RateGate("creator", 5.0)], SETTINGS)
    assert said.startswith("creator >= 5: by logged answers, its utility per request changes by +0.")
    (pinner,) = rate_breaches(test, "this", "parent", [RateGate("pinner", 0.0)], SETTINGS)
    assert "changes by -0." in pinner


def test_gates_of_heads_and_parties_hold_each_by_itself():
    test = favouring(with_parties(scored(users=1000)))
    gates = [RateGate("creator", 0.0), SAVE, RateGate("creator", 5.0), RateGate("merchant", 0.0)]
    broken = rate_breaches(test, "this", "parent", gates, SETTINGS)
    assert [said.split(":")[0] for said in broken] == ["save >= 0", "creator >= 5"]


def test_a_party_that_is_an_action_gets_its_rate():
    test = with_parties(scored("reversed"))
    (party,) = rate_breaches(test, "this", "parent", [RateGate("pinner", 0.0)], SETTINGS)
    (head,) = rate_breaches(test, "this", "parent", [SAVE], SETTINGS)
    assert numbers(party) == numbers(head)


def test_only_answers_of_surfaces_with_the_party_count():
    test = with_parties(scored("reversed"))
    count = len(test.users)
    doubled = replace(
        test,
        row_splits=np.arange(2 * count + 1) * PINS,
        users=np.tile(test.users, 2),
        surfaces=np.repeat([0, 1], count).astype(np.uint8),
        attributes={name: np.tile(values, 2) for name, values in test.attributes.items()},
        by_bundle={
            name: replace(one, probabilities=np.tile(one.probabilities, (2, 1)), utilities=np.tile(one.utilities, 2))
            for name, one in test.by_bundle.items()
        },
        **{name: np.tile(getattr(test, name), 2) for name in ("positions", "propensities", "activity")},
        **{name: np.tile(getattr(test, name), (2, 1)) for name in ("labels", "popularity")},
    )
    creator = RateGate("creator", 0.0)
    (home,) = rate_breaches(test, "this", "parent", [creator], SETTINGS)
    (found,) = rate_breaches(doubled, "this", "parent", [creator], SETTINGS)
    # Only the reward model sees the other surface: its factors have twice the actions beside the same prior.
    assert numbers(found) == pytest.approx(numbers(home), rel=0.01)
    related = replace(test, surfaces=np.ones(count, np.uint8))
    assert rate_breaches(related, "this", "parent", [creator], SETTINGS) == [
        "creator >= 0: no logged answer is on a surface that has this party; join more, or remove the gate"
    ]


def test_a_name_that_is_a_party_and_a_head_is_the_party():
    test = with_parties(scored("reversed"), more="save")
    assert rate_breaches(test, "this", "parent", [SAVE], SETTINGS) == []  # this party always gets 0
    assert rate_breaches(with_parties(scored("reversed")), "this", "parent", [SAVE], SETTINGS)


def test_a_name_that_is_neither_is_refused_with_those_that_exist():
    with pytest.raises(
        SettingError,
        match=r"'ad >= 0': the model predicts save, and its .* parties pinner, creator, merchant; name one",
    ):
        rate_breaches(with_parties(scored()), "this", "parent", [RateGate("ad", 0.0)], SETTINGS)


def test_a_log_that_says_too_little_does_not_hold_the_gate():
    test = scored("reversed", users=20)
    (said,) = rate_breaches(test, "this", "parent", [SAVE], SETTINGS)
    assert "say too little: the effective number of users for the new version" in said
    certain = replace(scored("reversed"), propensities=np.ones(400 * 2 * PINS))
    (said,) = rate_breaches(certain, "this", "parent", [SAVE], SETTINGS)
    assert "logging could have given only" in said


def test_pins_take_the_positions_that_their_request_had():
    test = scored(users=2)
    test = replace(
        test,
        row_splits=np.array([0, 3, 5, 6, 7]),
        positions=np.array([5, 0, 2, 1, 3, 4, 0]),
        by_bundle={"this": BundleScores(("save",), np.zeros((7, 1)), np.array([3, np.nan, 5, 1, 1, 0, 0.0]), None)},
    )
    assert new_positions(test, "this").tolist() == [2, 5, 0, 1, 3, 4, 0]


def test_gates_that_cannot_be_judged_are_named():
    test = scored()
    with pytest.raises(SettingError, match=r"'like >= 0': the model predicts save"):
        rate_breaches(test, "this", "parent", [RateGate("like", 0.0)], SETTINGS)
    with pytest.raises(SettingError, match="add --impressions DIR"):
        rate_breaches(replace(test, propensities=np.empty(0)), "this", "parent", [SAVE], SETTINGS)
    lost = BundleScores(("save",), test.by_bundle["this"].probabilities, None, "it reads pin.price")
    broken = replace(test, by_bundle={**test.by_bundle, "this": lost})
    assert rate_breaches(broken, "this", "parent", [SAVE], SETTINGS) == [
        "no order to evaluate, because the utility of this: it reads pin.price"
    ]


def test_gates_are_read_from_text():
    assert parse_rate_gate("save >= 0") == SAVE
    assert parse_rate_gate("hide>=-0.25") == RateGate("hide", -0.25)


@pytest.mark.parametrize("text", ["save", "save > 0", ">= 0", "save >= much", "save >= nan", "save >= inf", ""])
def test_text_that_is_no_gate_is_refused(text):
    with pytest.raises(SettingError, match="write HEAD >= NUMBER"):
        parse_rate_gate(text)
