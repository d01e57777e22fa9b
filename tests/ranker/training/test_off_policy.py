from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from model_store.model.discount import discounts
from ranker.errors import SettingError
from tests.conftest import needs_training
from tests.ranker.commands import app

pytestmark = needs_training


@pytest.fixture
def explored():
    from tests.ranker.toy_training import examples

    made = examples(1)
    rows = len(made.labels)
    rng = np.random.default_rng(2)
    positions = np.concatenate([np.arange(n) for n in np.diff(made.batch.row_splits)])
    return replace(made, positions=positions, propensities=rng.uniform(0.02, 1, rows))


def test_rows_weigh_their_clipped_inverse_propensity_and_actions_their_position(explored):
    from ranker.training.off_policy import OffPolicyWeights

    found = OffPolicyWeights.of(explored, 4.0).of_rows(explored)
    inverse = np.minimum(1 / explored.propensities, 4.0)
    looked_at = 1 / discounts(8)[explored.positions]
    expected = inverse / inverse.mean()
    assert (inverse == 4).any()
    for head in range(2):
        acted = explored.labels[:, head] > 0
        np.testing.assert_allclose(found[~acted, head], expected[~acted], rtol=1e-6)
        np.testing.assert_allclose(found[acted, head], (expected * looked_at)[acted], rtol=1e-6)


def test_the_weight_of_a_position_is_clipped_as_well(explored):
    from ranker.training.off_policy import OffPolicyWeights

    deep = replace(explored, positions=np.full(len(explored.labels), 1_000_000))
    weights = OffPolicyWeights(3.0, 1.0).of_rows(replace(deep, propensities=np.ones(len(explored.labels))))
    assert weights.max() == 3.0


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, np.nan])
def test_a_propensity_that_is_no_probability_is_refused(explored, value):
    from ranker.training.off_policy import OffPolicyWeights

    explored.propensities[3] = value
    with pytest.raises(SettingError, match=f"--off-policy: 1 of .* are not in \\(0, 1\\], such as {value}"):
        OffPolicyWeights.of(explored, 4.0)


def trained(examples, **settings):
    from ranker.training.fit import train
    from tests.ranker.toy_training import CONFIG, HEADS, SIZES

    network, epochs = train(SIZES, HEADS, examples, examples, replace(CONFIG, **settings))
    return {name: value.numpy() for name, value in network.state_dict().items()}, epochs


def test_a_weight_counts_like_repetition(explored):
    """Equal weights change nothing; a row with a high weight is learned better than with a low one."""
    even = replace(explored, propensities=np.full(len(explored.labels), 0.5), positions=0 * explored.positions)
    plain, _ = trained(even)
    weighed, _ = trained(even, off_policy_clip=10.0)
    for name, value in plain.items():
        np.testing.assert_array_equal(weighed[name], value)


def test_rare_rows_count_more_in_training_and_validation(explored):
    from ranker.training.off_policy import OffPolicyWeights

    _, plain = trained(explored)
    _, weighed = trained(explored, off_policy_clip=50.0)
    assert weighed[0].train_loss != plain[0].train_loss
    assert weighed[0].validation_loss != plain[0].validation_loss
    mean = OffPolicyWeights.of(explored, 50.0).of_rows(explored).mean()
    assert 1 < mean < 3  # of the scale of an unweighted loss


def test_impressions_without_exploration_are_refused(explored):
    from ranker.training.off_policy import OffPolicyWeights

    certain = replace(explored, propensities=np.ones(len(explored.labels)))
    with pytest.raises(SettingError, match=r"nothing was explored.*explore.toml"):
        OffPolicyWeights.of(certain, 10.0)
    with pytest.raises(SettingError, match="add --impressions DIR"):
        OffPolicyWeights.of(replace(certain, propensities=np.empty(0)), 10.0)


def test_off_policy_without_impressions_is_refused_before_any_work(tmp_path):
    (tmp_path / "utility.toml").write_text("")
    result = CliRunner().invoke(
        app, ["train", "--off-policy", "--utility", str(tmp_path / "utility.toml"), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert "--off-policy requires --impressions DIR" in " ".join(result.output.split())
