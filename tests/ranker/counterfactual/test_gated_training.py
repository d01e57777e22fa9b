"""Training from explored answers: weighed by their propensities, and published only if they allow it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from ranker.counterfactual.settings import Settings
from ranker.errors import GateError, PropensityError, SettingError
from ranker.evaluation.gates import Gates, RateGate
from tests.conftest import needs_training
from tests.impressions.logs import action, impression, seen
from tests.ranker.interactions import PINS, USERS, write_atomic

pytestmark = needs_training
SHOWN = 3


def explored(folder, requests, propensity=1 / SHOWN, reported=False, candidates=(SHOWN,)):
    """Join answers of three pins in random order; users save even pins, and the first position most.

    If `reported`, frontends say which pins were looked at: the first, those saved, and some others. The numbers of
    candidates take turns.
    """
    from tests.ranker.training.test_shown_examples import START_MS, joined, pin, user

    rng, others = np.random.default_rng(8), np.random.default_rng(9)
    rows, actions, reports = [], [], []
    for number in range(1, requests + 1):
        time_ms, who = START_MS + number * 60_000, user(int(rng.integers(USERS)))
        pins = [int(p) for p in rng.choice(PINS, SHOWN, replace=False)]
        rows.append(
            impression(
                number, time_ms, who, [pin(p) for p in pins],
                order_propensity=propensity**2, propensities=[propensity] * SHOWN,
                candidates=candidates[number % len(candidates)], places=others.permutation(SHOWN).tolist(),
            )
        )  # fmt: skip
        saved = [(k, p) for k, p in enumerate(pins) if p % 2 == 0 and rng.random() < 0.9 / (k + 1)]
        actions += [
            action(100 * number + k, who, pin(p), time_ms + 1_000, request_id=number, position=k) for k, p in saved
        ]
        looked = {0, *(k for k, _ in saved), *np.flatnonzero(others.random(SHOWN) < 0.3).tolist()}
        reports.append(seen(number, *sorted(looked)))
    return joined(folder, rows, actions, reports if reported else ())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from ranker.data.atomic.recbole import read_atomic

    return read_atomic(write_atomic(tmp_path_factory.mktemp("data")))


TABLE = b"""
[surfaces.home]
weights = { pinner = 1.0, creator = 0.1 }
utilities = { pinner = "save", creator = "save * pin.creator_tail" }
[surfaces.related]
weights = { pinner = 1.0 }
utilities = { pinner = "save" }
"""


def made(folder, dataset, impressions, parent=None, gates=None, table=None, notes=None, **training):
    from ranker.data.shown import Impressions
    from ranker.recipe import make_bundle
    from tests.ranker.test_recipe import RECIPE, Notes

    settings = replace(RECIPE.training, epochs=1, **training)
    recipe = replace(RECIPE, variant="base", version=4 if parent else 3, training=settings)
    recipe = recipe if table is None else replace(recipe, utility_toml=table)
    return make_bundle(
        folder, dataset, recipe, notes or Notes(), parent=parent, gates=gates, impressions=Impressions(impressions)
    )


@pytest.fixture(scope="module")
def parent(tmp_path_factory, dataset):
    from ranker.training.parent import Parent

    folder = tmp_path_factory.mktemp("parent")
    return Parent.of(made(folder / "bundle", dataset, explored(folder / "joined", 480)))


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    return explored(tmp_path_factory.mktemp("newer") / "joined", 1000)


LENIENT = {"auc_loss_max": 1.0, "hit_loss_percent_max": 100.0, "ece_max": 1.0, "decile_factor_max": 1e6}


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


def scored(folder, dataset, parent, whole=True):
    """Return the gate's answers, or the test's, scored by the parent and by a version that reverses its orders."""
    from kernels.cpu.openvino_engine import OpenVinoEngine
    from ranker.counterfactual.gate import GateAnswers
    from ranker.data.actions import action_log
    from ranker.data.shown import Impressions, read_shown
    from ranker.evaluation.scoring import score_test
    from ranker.training.examples import Sampling
    from tests.ranker.test_recipe import RECIPE

    shown = read_shown(Impressions(folder), action_log(dataset))
    answers = GateAnswers.of(shown, RECIPE.split)
    chosen = answers.shown if whole else shown
    test = score_test(
        {"parent": parent.bundle}, shown.history, OpenVinoEngine, Sampling(), 7, RECIPE.split, shown=chosen
    )
    own = replace(test.by_bundle["parent"], utilities=-test.by_bundle["parent"].utilities)
    return replace(test, by_bundle={**test.by_bundle, "this": own}), answers


def mean_weight(test, name):
    from ranker.counterfactual.gate import new_positions

    return ((new_positions(test, name) == test.positions) / test.propensities).mean()


def said(test):
    from ranker.counterfactual.gate import rate_breaches

    return rate_breaches(test, "this", "parent", [RateGate("save", 9.0)], Settings(ess_min=5.0, resamples=100))


def test_reports_of_what_was_seen_do_not_change_what_a_gate_finds(tmp_path, dataset, parent):
    plain, _ = scored(explored(tmp_path / "plain", 1000), dataset, parent)
    folder = explored(tmp_path / "reported", 1000, reported=True)
    reported, answers = scored(folder, dataset, parent)
    assert said(plain) == said(reported)
    assert "95% interval from -" in said(reported)[0]
    assert (answers.whole, answers.cut) == (250, 0)
    # What training sees is not enough: pins that stayed unseen are where an order might have put the others.
    seen_only, _ = scored(folder, dataset, parent, whole=False)
    assert len(seen_only.labels) < len(reported.labels) == 750
    assert seen_only.labels.sum() == reported.labels.sum()
    for test in (plain, reported):
        assert mean_weight(test, "parent") == pytest.approx(1, abs=0.15)
        assert mean_weight(test, "this") == pytest.approx(1, abs=0.15)
    assert mean_weight(seen_only, "this") > 1.3


def test_answers_that_leave_candidates_out_are_counted_and_left_out(tmp_path, dataset, parent):
    folder = explored(tmp_path / "joined", 1000, candidates=(SHOWN, SHOWN + 1))
    test, answers = scored(folder, dataset, parent)
    assert (answers.whole, answers.cut, len(test.users)) == (125, 125, 125)
    assert mean_weight(test, "this") == pytest.approx(1, abs=0.2)
    assert answers.described(100) == (
        "--gate-ope reads 100 of the 125 newest answers that hold all candidates of their requests; 125 others do not "
        "and are left out"
    )


def test_equal_utilities_keep_the_order_of_the_candidates(tmp_path, dataset, parent):
    from ranker.counterfactual.gate import new_positions

    test, answers = scored(explored(tmp_path / "joined", 480), dataset, parent)
    tied = replace(test.by_bundle["parent"], utilities=np.zeros(len(test.labels), np.float32))
    tied = replace(test, by_bundle={"parent": tied})
    places = answers.shown.requests.places[-len(test.labels) :]
    assert new_positions(tied, "parent").tolist() == places.tolist()
    assert test.positions.tolist() != places.tolist()


@pytest.mark.usefixtures("few_users")
def test_training_says_how_many_answers_its_gates_used(tmp_path, dataset, parent):
    from tests.ranker.test_recipe import Notes

    folder = explored(tmp_path / "joined", 1000, reported=True, candidates=(SHOWN, SHOWN, SHOWN + 1))
    notes, gates = Notes(), Gates(**LENIENT, rates=(RateGate("save", -3.0),))
    made(tmp_path / "bundle", dataset, folder, parent, gates, notes=notes)
    (note,) = [note for note in notes.notes if note.startswith("--gate-ope")]
    numbers = [int(word) for word in note.split() if word.isdigit()]
    assert numbers[0] == numbers[1] == pytest.approx(2 * numbers[2], abs=2)


def test_a_log_without_whole_answers_is_refused_before_any_work(tmp_path, dataset, parent, monkeypatch):
    monkeypatch.setattr("ranker.recipe.train", None)
    folder = explored(tmp_path / "joined", 1000, candidates=(SHOWN + 1,))
    gates = Gates(**LENIENT, rates=(RateGate("save", 0.0),))
    with pytest.raises(PropensityError, match="none of the .* answers holds all candidates of its request.*top_k = 0"):
        made(tmp_path / "bundle", dataset, folder, parent, gates)


def test_off_policy_weights_change_what_is_learned(tmp_path, dataset, newer):
    varied = explored(tmp_path / "joined", 480, propensity=0.9)
    plain = made(tmp_path / "plain", dataset, varied)
    weighed = made(tmp_path / "weighed", dataset, varied, off_policy_clip=10.0)
    assert plain.files["parameters.npz"] != weighed.files["parameters.npz"]


def test_off_policy_weights_need_exploration(tmp_path, dataset):
    certain = explored(tmp_path / "joined", 480, propensity=1.0)
    with pytest.raises(SettingError, match="nothing was explored"):
        made(tmp_path / "bundle", dataset, certain, off_policy_clip=10.0)
