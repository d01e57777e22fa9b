"""Policies with another network than the one that logged: scored again from the stored rows that the log keeps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from feature_client.groups import Embedding
from impressions.dataset import read_slates
from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.files import read_bundle
from model_store.bundle.golden import encode_golden
from model_store.bundle.manifest import Head, Manifest
from model_store.bundle.tensor_sources import QueryVector, TensorInput
from model_store.exploration.hashing import mixed
from model_store.registry.store import open_model_store
from ranker.counterfactual.chosen_policy import StoredAnswers, read_comparison
from ranker.counterfactual.rescoring import score_again
from ranker.errors import PropensityError
from tests import tiny
from tests.impressions.logs import action
from tests.ranker.counterfactual import logged
from tests.ranker.counterfactual.test_explore import MORE, run

REQUESTS = 600
SHARE = 0.5


@pytest.fixture(scope="module")
def given():
    return logged.candidates(REQUESTS)


@pytest.fixture(scope="module")
def made(given):
    return logged.slates(given=given, explore=logged.SHUFFLED)


def kept(made, share=SHARE):
    """Choose answers as the server does."""
    return [mixed(int(number) ^ 0x66656174) < share * 2**64 for number in made.request_ids]


@pytest.fixture(scope="module")
def joined(given, made, tmp_path_factory):
    stored = [rows if keep else None for rows, keep in zip(given.stored, kept(made), strict=True)]
    return logged.write_joined(made, tmp_path_factory.mktemp("half") / "joined", stored)


@pytest.fixture(scope="module")
def whole(given, made, tmp_path_factory):
    """The log keeps all stored rows, and somebody liked a pin."""
    like = action(10**6, 1, int(made.pin_ids[0]), int(made.time_ms[0]) + 5, action="like", request_id=1, position=0)
    return logged.write_joined(made, tmp_path_factory.mktemp("whole") / "joined", given.stored, [like])


def commented(network):
    """Return the same network in other bytes."""
    model = onnx.load_from_string(network)
    model.doc_string = "the same"
    return model.SerializeToString()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """tiny@1 logged; 2 has another network; 3 is 1 in other bytes; 4 reads more pin fields; 5 predicts another head."""
    root = tmp_path_factory.mktemp("store")
    models = open_model_store(root / "models")
    topic = tiny.UTILITY.replace("save * sqrt(pin.popularity)", "save * pin.topic")
    likes = tiny.UTILITY.replace("hide", "like")
    heads = (tiny.manifest_fields()["heads"][0], Head(name="like", meaning="liked"))
    same = commented(tiny.network(1))
    for version, changes in {
        1: {},
        2: {},
        3: {
            "network.onnx": same,
            "golden.npz": encode_golden(tiny.golden(same, tiny.manifest_fields())),
            "utility.toml": MORE.encode(),
        },
        4: {"utility.toml": topic.encode()},
        5: {"utility.toml": likes.encode(), "heads": heads},
    }.items():
        tiny.write_tiny_bundle(root / str(version), version, **changes)
        models.publish(root / str(version))
    return models


def evaluated(tmp_path, joined, store, policy, *options):
    path = tmp_path / "numbers.json"
    code, said = run(
        "--on", joined, "--policy", policy, "--store", store.where, "--ess-min", 20, "--engine", "numpy",
        "--json", path, *options,
    )  # fmt: skip
    assert code == 0, said
    return json.loads(path.read_text()), said


def test_the_network_that_logged_gives_the_logged_probabilities_to_the_bit(joined, made, store):
    (slates,) = read_slates(joined, "home")
    used, (again,) = score_again(joined, slates, tiny.manifest(), [store.read("tiny", 1)], NumpyEngine)
    assert used.request_ids.tolist() == made.request_ids[kept(made)].tolist()
    for name in ("probabilities", "attribute_values", "party_utilities", "heads", "parties", "attributes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(used, name), name)


def test_the_network_that_logged_gives_the_same_estimates_scored_again_or_not(whole, store, tmp_path):
    table = tmp_path / "utility.toml"
    table.write_text(MORE)
    scored, said = evaluated(tmp_path, whole, store, "tiny@3", "--unit", "positions")
    assert scored["rescoring"]["models"] == ["tiny@3"]
    assert "tiny@3 scored them again. They are 100.00% of 600 logged answers" in said
    plain, said = evaluated(tmp_path, whole, store, table, "--unit", "positions")
    assert plain["rescoring"] is None
    assert "scored them again" not in said
    assert json.dumps(scored["units"]).replace("tiny@3", "utility.toml") == json.dumps(plain["units"])


def test_another_network_orders_otherwise_and_the_report_says_what_was_compared(joined, made, store, tmp_path):
    report = tmp_path / "report.html"
    found, said = evaluated(
        tmp_path, joined, store, "tiny@2", "--against", "tiny@1", "--unit", "positions", "--report", report
    )
    count = sum(kept(made))
    assert 250 < count < 350
    told = f"tiny@2 scored them again. They are {count / REQUESTS:.2%} of 600 logged answers: those that keep"
    assert told in said
    assert told in report.read_text()
    assert "for a head that it lacks, those of tiny@2" in report.read_text()
    assert (found["requests"], found["policy"], found["baseline"]) == (count, "tiny@2", "tiny@1")
    explored = float(np.mean(made.arms != ""))
    assert found["rescoring"] == {
        "models": ["tiny@2"], "logged_requests": 600, "share": count / 600, "logged_explored_share": explored,
    }  # fmt: skip
    (slates,) = read_slates(joined, "home")
    compared = read_comparison("tiny@2", "tiny@1", slates, store, StoredAnswers(joined, NumpyEngine))
    moved = compared.policy.placements[0].positions != compared.baseline.placements[0].positions
    assert moved.mean() > 0.3


def test_the_estimate_for_another_network_covers_what_it_would_have_earned(whole, made, given, store, tmp_path):
    found, _ = evaluated(tmp_path, whole, store, "tiny@2", "--unit", "positions", "--reward", "save")
    other = logged.candidates(REQUESTS, network=2)
    utilities = other.probabilities[:, :, 0] - 2 * other.probabilities[:, :, 1]
    utilities = utilities + 0.5 * other.probabilities[:, :, 0] * np.sqrt(other.popularity)
    positions = np.argsort(np.argsort(-utilities, axis=1), axis=1)
    truth = (given.probabilities[:, :, 0] * (positions + 1.0) ** -0.5).sum(axis=1).mean()
    forecasts = {f["estimator"]: f["value"] for f in found["units"][1]["forecasts"]["save"]}
    assert forecasts["dr"]["low"] < truth < forecasts["dr"]["high"]
    assert forecasts["ips"]["low"] < truth < forecasts["ips"]["high"]
    assert forecasts["dr"]["high"] - forecasts["dr"]["low"] < 0.5 * truth


def test_it_may_be_what_a_table_is_compared_with(joined, store, tmp_path):
    table = tmp_path / "utility.toml"
    table.write_text(MORE)
    found, _ = evaluated(tmp_path, joined, store, table, "--against", "tiny@2", "--unit", "positions")
    assert found["rescoring"]["models"] == ["tiny@2"]
    assert found["rewards"] == ["pinner", "creator", "save", "hide"]


def test_pin_fields_that_only_its_table_reads_come_from_the_stored_rows(joined, store, tmp_path):
    found, _ = evaluated(tmp_path, joined, store, "tiny@4", "--unit", "positions")
    (slates,) = read_slates(joined, "home")
    compared = read_comparison("tiny@4", "logged", slates, store, StoredAnswers(joined, NumpyEngine))
    assert compared.slates.attributes == ("pin.popularity", "pin.topic")
    topics = tiny.pin_rows(compared.slates.pin_ids)["topic"]
    np.testing.assert_array_equal(compared.slates.attribute_values[:, 1], topics)
    saved = compared.slates.labels[:, 0]
    baseline = found["units"][1]["forecasts"]["creator"][0]["baseline"]["value"]
    assert baseline == pytest.approx((saved * topics).sum() / compared.slates.requests)


def test_a_head_that_only_it_predicts_is_a_reward_if_the_action_was_logged(whole, joined, store, tmp_path):
    found, _ = evaluated(tmp_path, whole, store, "tiny@5", "--unit", "positions")
    assert found["rewards"] == ["pinner", "creator", "save", "hide", "like"]
    assert found["units"][1]["forecasts"]["like"][0]["baseline"]["value"] == pytest.approx(1 / REQUESTS)
    code, said = run("--on", joined, "--policy", "tiny@5", "--store", store.where, "--engine", "numpy")
    assert code == 1
    assert "unknown name 'like'" in said


def test_answers_without_stored_rows_are_refused_with_the_setting_that_keeps_them(made, store, tmp_path):
    bare = logged.write_joined(made, tmp_path / "joined")
    code, said = run("--on", bare, "--policy", "tiny@2", "--store", store.where, "--engine", "numpy")
    assert code == 1
    assert "tiny@2 has another network or calibration than tiny@1, which logged" in said
    assert "Set impressions.features_share on the servers" in said


def test_too_few_answers_with_stored_rows_say_to_keep_more(joined, store):
    code, said = run(
        "--on", joined, "--policy", "tiny@2", "--store", store.where, "--engine", "numpy", "--unit", "positions",
        "--ess-min", 5000,
    )  # fmt: skip
    assert code == 1
    assert "or raise impressions.features_share, because only" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"groups": (tiny.changed(tiny.PINS, version=2), tiny.USERS)}, "reads pin_core@2, and tiny@1"),
        ({"sequence": tiny.changed(tiny.ACTIONS, actions=("hide", "save"))}, "reads actions@1, and tiny@1"),
        ({"sequence_length": 4}, "reads 4 actions instead of 3, and tiny@1"),
    ],
)
def test_a_version_that_reads_other_features_is_refused(joined, tmp_path, changes, says):
    tiny.write_tiny_bundle(tmp_path / "6", 6, **{"golden.npz": b"", **changes})
    (slates,) = read_slates(joined, "home")
    with pytest.raises(PropensityError, match=says):
        score_again(joined, slates, tiny.manifest(), [read_bundle(tmp_path / "6")], NumpyEngine)


def test_a_version_that_reads_queries_of_another_space_is_refused(joined, store):
    other = Embedding(name="other", space=tiny.changed(tiny.SPACE, name="other"))
    groups = (tiny.changed(tiny.PINS, fields=(*tiny.PINS.fields, other)), tiny.USERS)
    inputs = (*tiny.INPUTS[:-1], TensorInput(name="query", source=QueryVector(group="pin_core", field="other")))
    logging = Manifest(**{**tiny.manifest_fields(), "groups": groups}, files={})
    manifest = Manifest(**{**tiny.manifest_fields(2), "groups": groups, "inputs": inputs}, files={})
    (slates,) = read_slates(joined, "home")
    with pytest.raises(PropensityError, match="tiny@2 reads queries of the embedding space other@1, and tiny@1"):
        score_again(joined, slates, logging, [replace(store.read("tiny", 2), manifest=manifest)], NumpyEngine)


def test_a_version_that_does_not_rank_the_surface_is_refused(joined, store):
    (slates,) = read_slates(joined, "home")
    elsewhere = replace(slates, surface="search")
    with pytest.raises(PropensityError, match="tiny@2 does not rank the surface search"):
        score_again(joined, elsewhere, tiny.manifest(), [store.read("tiny", 2)], NumpyEngine)


def test_stored_rows_that_cannot_be_read_are_named_by_their_request(made, given, store, tmp_path):
    stored = [b"broken" if number == 4 else rows for number, rows in enumerate(given.stored)]
    folder = logged.write_joined(made, tmp_path / "joined", stored)
    code, said = run("--on", folder, "--policy", "tiny@2", "--store", store.where, "--engine", "numpy")
    assert code == 1
    assert "tiny@2 cannot score the stored rows of request 5: not an archive of golden requests" in said
