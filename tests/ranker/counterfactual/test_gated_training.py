"""Training from explored answers: weighed by their propensities, and published only if they allow it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from ranker.counterfactual.forecast import Settings
from ranker.errors import GateError, SettingError
from ranker.evaluation.gates import Gates, RateGate
from tests.conftest import needs_training
from tests.impressions.logs import action, impression
from tests.ranker.interactions import PINS, USERS, write_atomic

pytestmark = needs_training
SHOWN = 3


def explored(folder, requests, propensity=1 / SHOWN):
    """Join answers of three pins in random order; users save even pins, and the first position most."""
    from tests.ranker.training.test_shown_examples import START_MS, joined, pin, user

    rng = np.random.default_rng(8)
    rows, actions = [], []
    for number in range(1, requests + 1):
        time_ms, who = START_MS + number * 60_000, user(int(rng.integers(USERS)))
        pins = [int(p) for p in rng.choice(PINS, SHOWN, replace=False)]
        rows.append(
            impression(
                number, time_ms, who, [pin(p) for p in pins],
                order_propensity=propensity**2, propensities=[propensity] * SHOWN,
            )
        )  # fmt: skip
        saved = [(k, p) for k, p in enumerate(pins) if p % 2 == 0 and rng.random() < 0.9 / (k + 1)]
        actions += [
            action(100 * number + k, who, pin(p), time_ms + 1_000, request_id=number, position=k) for k, p in saved
        ]
    return joined(folder, rows, actions)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from ranker.data.recbole import read_atomic

    return read_atomic(write_atomic(tmp_path_factory.mktemp("data")))


TABLE = b"""
[surfaces.home]
weights = { pinner = 1.0, creator = 0.1 }
utilities = { pinner = "save", creator = "save * pin.creator_tail" }
[surfaces.related]
weights = { pinner = 1.0 }
utilities = { pinner = "save" }
"""


def made(folder, dataset, impressions, parent=None, gates=None, table=None, **training):
    from ranker.data.shown import Impressions
    from ranker.recipe import make_bundle
    from tests.ranker.test_recipe import RECIPE, Notes

    settings = replace(RECIPE.training, epochs=1, **training)
    recipe = replace(RECIPE, variant="base", version=4 if parent else 3, training=settings)
    recipe = recipe if table is None else replace(recipe, utility_toml=table)
    return make_bundle(
        folder, dataset, recipe, Notes(), parent=parent, gates=gates, impressions=Impressions(impressions)
    )


@pytest.fixture(scope="module")
def parent(tmp_path_factory, dataset):
    from ranker.training.parent import Parent

    folder = tmp_path_factory.mktemp("parent")
    return Parent.of(made(folder / "bundle", dataset, explored(folder / "joined", 480)))


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    return explored(tmp_path_factory.mktemp("newer") / "joined", 1000)


LENIENT = {"auc_loss_max": 1.0, "hit_loss_percent_max": 100.0, "ece_max": 1.0}


@pytest.fixture
def few_users(monkeypatch):
    """The toy data has few users."""
    monkeypatch.setattr("ranker.counterfactual.gate.Settings", partial(Settings, ess_min=5.0, resamples=200))


@pytest.mark.usefixtures("few_users")
def test_a_version_that_logged_answers_allow_is_made(tmp_path, dataset, parent, newer):
    gates = Gates(**LENIENT, rates=(RateGate("save", -3.0),))
    bundle = made(tmp_path / "bundle", dataset, newer, parent, gates, off_policy_clip=10.0)
    assert bundle.manifest.lineage.parent == "toy@3"


@pytest.mark.usefixtures("few_users")
def test_a_version_that_they_do_not_allow_is_not_written(tmp_path, dataset, parent, newer):
    gates = Gates(**LENIENT, rates=(RateGate("save", 3.0),))
    with pytest.raises(GateError, match="no bundle was written.*save >= 3: by logged answers, the rate per request"):
        made(tmp_path / "bundle", dataset, newer, parent, gates)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("few_users")
def test_parties_and_actions_hold_a_version_back_together(tmp_path, dataset, parent, newer):
    gates = Gates(**LENIENT, rates=(RateGate("creator", 3.0), RateGate("save", -3.0), RateGate("pinner", -3.0)))
    with pytest.raises(GateError, match="creator >= 3: by logged answers, its utility per request changes") as error:
        made(tmp_path / "bundle", dataset, newer, parent, gates, TABLE)
    assert "save" not in str(error.value)
    lenient = replace(gates, rates=(RateGate("creator", -3.0), *gates.rates[1:]))
    assert made(tmp_path / "bundle", dataset, newer, parent, lenient, TABLE).manifest.version == 4


def test_a_gate_that_names_nothing_is_refused_before_any_work(tmp_path, dataset, parent, newer, monkeypatch):
    monkeypatch.setattr("ranker.recipe.train", None)
    gates = Gates(**LENIENT, rates=(RateGate("advertiser", 0.0),))
    with pytest.raises(
        SettingError, match=r"'advertiser >= 0': the model predicts .*parties pinner, creator; name one"
    ):
        made(tmp_path / "bundle", dataset, newer, parent, gates, TABLE)


def test_too_few_users_do_not_allow_a_version(tmp_path, dataset, parent, newer):
    gates = Gates(**LENIENT, rates=(RateGate("save", -3.0),))
    with pytest.raises(GateError, match=r"save >= -3: the logged answers say too little: .*at least 100 are required"):
        made(tmp_path / "bundle", dataset, newer, parent, gates)


def test_off_policy_weights_change_what_is_learned(tmp_path, dataset, newer):
    varied = explored(tmp_path / "joined", 480, propensity=0.9)
    plain = made(tmp_path / "plain", dataset, varied)
    weighed = made(tmp_path / "weighed", dataset, varied, off_policy_clip=10.0)
    assert plain.files["parameters.npz"] != weighed.files["parameters.npz"]


def test_off_policy_weights_need_exploration(tmp_path, dataset):
    certain = explored(tmp_path / "joined", 480, propensity=1.0)
    with pytest.raises(SettingError, match="nothing was explored"):
        made(tmp_path / "bundle", dataset, certain, off_policy_clip=10.0)
