"""The bundles that the demo serves, as they are committed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernels.engines import engine_factory
from model_store.bundle.files import UTILITY, Bundle
from model_store.bundle.golden import decode_golden
from model_store.model.loaded import load_model
from model_store.model.utility import load_utility
from model_store.registry.store import open_model_store
from ranker.data.embeddings import embeddings_of
from ranker.data.features import Groups
from tests.conftest import needs_training

DEMO = Path(__file__).parents[3] / "deploy" / "demo"
STORE = open_model_store(DEMO / "models")
LABELS = ("cheap", "stable")


@pytest.fixture(params=LABELS)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return STORE.read("ml1m", STORE.resolve("ml1m", request.param))


def test_the_store_holds_both_twins() -> None:
    cheap, stable = (STORE.read("ml1m", STORE.resolve("ml1m", label)).manifest for label in LABELS)
    assert set(STORE.labels("ml1m")) == set(LABELS)
    assert cheap.sequence is None
    assert stable.sequence_length == 50


@pytest.mark.parametrize("engine", ["numpy", "openvino", pytest.param("torch", marks=needs_training)])
def test_each_engine_proves_the_bundle_on_its_golden_requests(bundle: Bundle, engine: str) -> None:
    model = load_model(bundle, engine_factory(engine), streams=1)
    assert model.engine.cost_s(100) > 0
    model.engine.close()


def test_the_twins_read_the_same_stored_features() -> None:
    cheap, stable = (STORE.read("ml1m", STORE.resolve("ml1m", label)) for label in LABELS)
    assert cheap.manifest.groups == stable.manifest.groups
    assert cheap.files["embeddings.npz"] == stable.files["embeddings.npz"]
    groups = Groups.served_by(stable.manifest)
    assert stable.manifest.sequence == groups.sequence
    assert set(stable.manifest.groups) == {groups.pin, groups.user}


def test_embeddings_are_vectors_of_length_one_or_of_pins_that_were_only_hidden(bundle: Bundle) -> None:
    vectors = embeddings_of(bundle).vectors.astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(lengths[lengths > 0], 1, atol=2e-3)
    assert np.mean(lengths > 0) > 0.97


def test_the_utility_is_the_demos_and_compiles_for_the_model(bundle: Bundle) -> None:
    assert bundle.files[UTILITY] == (DEMO / "utility.toml").read_bytes()
    table = load_utility(bundle.files[UTILITY], bundle.manifest)
    assert set(table.surfaces) == {"home", "related"}
    assert table.surfaces["home"].parties == ("pinner", "creator", "merchant", "ad")


def test_the_pinner_decides_and_the_others_are_heard(bundle: Bundle) -> None:
    table = load_utility(bundle.files[UTILITY], bundle.manifest)
    for golden in decode_golden(bundle.files["golden.npz"]):
        parties = table.party_utilities(golden.surface, golden.probabilities, golden.fetched)
        weighted = np.abs(parties * table.surfaces[golden.surface].weights).mean(axis=0)
        assert weighted[0] > weighted[1:].max()
        assert weighted[1] > 0


def test_the_lineage_tells_how_to_make_the_bundle_again(bundle: Bundle) -> None:
    lineage = bundle.manifest.lineage
    assert lineage.command.startswith("pinrank train --data ml-1m --name ml1m ")
    assert lineage.data == "ml-1m"
    assert lineage.metrics["auc_save"] > 0.85
