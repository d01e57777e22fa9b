from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from impressions.dataset import read_slates
from model_store.bundle.manifest import Head
from model_store.model.discount import discounts
from ranker.errors import DatasetError, SettingError
from ranker.tuning.inputs import TuningData, logged_requests, utility_of, versions_of_network
from tests import tiny
from tests.ranker.tuning.logged import join_answers, publish_tiny

THRESHOLD = tiny.UTILITY.replace('"save * sqrt(pin.popularity)"', '"where(pin.popularity > 0.5, 1, 0)"')


def test_logged_answers_give_the_utilities_that_were_logged(tmp_path: Path) -> None:
    bundle = publish_tiny(tmp_path).read("tiny", 1)
    folder = join_answers(tmp_path / "joined", 30)
    (slates,) = read_slates(folder, "home")
    data = logged_requests(folder, bundle, "home", ["tiny@1"])
    requests = data.scored(utility_of(bundle, "home"))
    np.testing.assert_allclose(requests.utilities, slates.party_utilities, rtol=1e-6)
    assert requests.requests == 30
    assert (data.since_ms, data.until_ms) == (slates.time_ms.min(), slates.time_ms.max() + 1)


def test_logged_candidates_are_in_the_order_of_their_requests(tmp_path: Path) -> None:
    # Utilities that are equal by the tuned weights keep that order in servers; the answer's own order would credit
    # the tuned weights with what the logged ones did.
    bundle = publish_tiny(tmp_path).read("tiny", 1)
    places = [3, 0, 7, 1, 2, 6, 5, 4]
    folder = join_answers(tmp_path / "joined", 30, places=places)
    (slates,) = read_slates(folder, "home")
    data = logged_requests(folder, bundle, "home", ["tiny@1"])
    asked = np.argsort(places)
    for array, expected in (
        (data.probabilities, slates.probabilities),
        (data.labels, slates.labels),
        (data.attributes["pin.popularity"], slates.attribute_values[:, 0]),
        (data.examined, discounts(8)[slates.positions]),
    ):
        by_request = expected.reshape(30, 8, -1)[:, asked]
        np.testing.assert_array_equal(array.reshape(by_request.shape), by_request)


def test_a_threshold_inside_a_party_is_evaluated_over_logged_attributes(tmp_path: Path) -> None:
    bundle = publish_tiny(tmp_path, 1, {"utility.toml": THRESHOLD.encode()}).read("tiny", 1)
    data = logged_requests(join_answers(tmp_path / "joined", 30), bundle, "home", ["tiny@1"])
    utilities = data.scored(utility_of(bundle, "home")).utilities
    popular = data.attributes["pin.popularity"] > 0.5
    assert utilities[:, 1].tolist() == popular.astype(float).tolist()
    assert 0 < popular.mean() < 1


def test_answers_of_all_versions_with_the_same_network_count(tmp_path: Path) -> None:
    store = publish_tiny(tmp_path)
    publish_tiny(tmp_path, 2, {"network.onnx": tiny.network(seed=1), "utility.toml": THRESHOLD.encode()})
    publish_tiny(tmp_path, 3)  # another network
    recalibrated = (Head(name="save", meaning="saved"), Head(name="hide", meaning="hid"))
    publish_tiny(tmp_path, 4, {"heads": recalibrated, "network.onnx": tiny.network(seed=1)})
    assert versions_of_network(store, store.read("tiny", 1)) == ["tiny@1", "tiny@2"]
    assert versions_of_network(store, store.read("tiny", 3)) == ["tiny@3"]


@pytest.mark.parametrize(
    ("answers", "wanted", "message"),
    [
        ({}, ["tiny@7"], "has no answer of tiny@7 on home; it has answers of: tiny@1"),
        ({"attributes": [], "attribute_values": []}, ["tiny@1"], "do not have pin.popularity, which tiny@1 reads"),
        ({"heads": ["save", "report"]}, ["tiny@1"], "do not have hide, which tiny@1 reads"),
        ({"surface": "related"}, ["tiny@1"], "has no request of surface home"),
    ],
    ids=["model", "attribute", "head", "surface"],
)
def test_answers_that_cannot_be_tuned_on_are_named(tmp_path: Path, answers, wanted, message) -> None:
    bundle = publish_tiny(tmp_path).read("tiny", 1)
    folder = join_answers(tmp_path / "joined", 5, **answers)
    with pytest.raises(DatasetError, match=message):
        logged_requests(folder, bundle, "home", wanted)


def test_a_surface_that_the_model_does_not_rank_is_named(tmp_path: Path) -> None:
    bundle = publish_tiny(tmp_path).read("tiny", 1)
    with pytest.raises(SettingError, match="tiny@1 does not rank the surface 'shop'; it ranks home, related"):
        utility_of(bundle, "shop")


def test_rewards_correct_actions_for_their_position(tmp_path: Path) -> None:
    bundle = publish_tiny(tmp_path).read("tiny", 1)
    data = TuningData(
        name="", surface="home", since_ms=0, until_ms=1, users=np.array([1]), row_splits=np.array([0, 3]),
        probabilities=np.zeros((3, 2), np.float32), attributes={"pin.popularity": np.array([1.0, 0.25, 0.25])},
        labels=np.array([[1, 0], [1, 0], [0, 1]], np.float32), examined=np.array([1.0, 0.5, 0.25]),
    )  # fmt: skip
    # save - 2 * hide, and save * sqrt(popularity)
    np.testing.assert_allclose(data.rewards(utility_of(bundle, "home")), [[1, 1], [2, 1], [-8, 0]])
