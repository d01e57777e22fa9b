"""The user's own vectors from the file to the tensors: what networks and trees learn from, and what is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_client.codec import RowState
from feature_client.fetch import fetch
from feature_client.stores.memory_store import MemoryStore
from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.files import Bundle
from model_store.bundle.tensor_sources import Scalars
from model_store.model.assembly import Assembler
from model_store.model.loaded import load_model
from ranker.baselines.tree_rows import TreeRows
from ranker.data.actions import action_log
from ranker.data.atomic.described import Described, Vectors
from ranker.data.atomic.recbole import read_atomic
from ranker.data.embeddings import embeddings_of
from ranker.data.features import Groups, fill_store, pin_rows
from ranker.data.inputs import full_manifest
from ranker.data.requests import part_slices, slice_requests
from ranker.errors import DatasetError, SettingError
from ranker.recipe import make_bundle
from ranker.training.examples import ExampleBuilder, Examples, FeatureSnapshot, Sampling
from ranker.training.parent import Parent
from tests.ranker.data.test_vectors import FEATURES, write
from tests.ranker.interactions import USERS
from tests.ranker.test_recipe import RECIPE, SPLIT, Notes

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pins that are acted on a few times each, and saved only if the last number of their vector is above 0."""
    folder = tmp_path_factory.mktemp("decided")
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((800, 3)).astype(np.float32)
    lines = []
    for user in range(USERS):
        for step, pin in enumerate(rng.choice(800, 40, replace=False)):
            time_s = 1_000 * user + 97 * step
            lines.append((time_s, f"u{user}\tp{pin}\t{5 if vectors[pin, 2] > 0 else 1}\t{time_s}\n"))
    (folder / "decided.inter").write_text(HEADER + "".join(line for _, line in sorted(lines)))
    write(folder / "text.parquet", [f"p{pin}" for pin in range(800)], list(vectors))
    return folder


@pytest.fixture(scope="module")
def without(decided: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    (decided / "features.toml").unlink(missing_ok=True)
    return make_bundle(tmp_path_factory.mktemp("without") / "bundle", read_atomic(decided), RECIPE, Notes())


@pytest.fixture(scope="module")
def bundle(decided: Path, without: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    assert without.manifest.lineage.data == "decided"  # it was trained before there was a features.toml
    (decided / "features.toml").write_text(FEATURES)
    return make_bundle(tmp_path_factory.mktemp("with") / "bundle", read_atomic(decided), RECIPE, Notes())


def pin_scalars(bundle: Bundle) -> tuple[str, ...]:
    (source,) = (tensor.source for tensor in bundle.manifest.inputs if tensor.name == "pin_scalars")
    assert isinstance(source, Scalars)
    return source.fields


def rows_of_test(folder: Path, bundle: Bundle) -> Examples:
    log = action_log(read_atomic(folder))
    manifest = full_manifest(bundle.manifest, log.schema)
    return ExampleBuilder(log, embeddings_of(bundle), manifest, SPLIT, Sampling(candidates=30), seed=1).build("test")


def test_a_network_learns_what_the_vectors_say(decided: Path, bundle: Bundle, without: Bundle) -> None:
    assert pin_scalars(bundle) == (*pin_scalars(without), "text_0", "text_1", "text_2")
    assert bundle.manifest.lineage.data_sha256 == read_atomic(decided).sha256
    assert bundle.manifest.lineage.data_sha256 != without.manifest.lineage.data_sha256
    assert not any("text" in name for name in without.manifest.group("pin_core").dtype.names or ())
    model = load_model(bundle, NumpyEngine, streams=1)
    batch = rows_of_test(decided, bundle).batch
    means = []
    for value in (-1.5, 1.5):
        scalars = batch.candidate["pin_scalars"].copy()
        scalars[:, -1] = value  # the number that decides
        changed = replace(batch, candidate={**batch.candidate, "pin_scalars": scalars})
        means.append(model.probabilities(model.engine.run(changed))[:, 0].mean())
    model.engine.close()
    assert means[1] > 1.5 * means[0]


def test_trees_read_the_vectors(decided: Path, bundle: Bundle) -> None:
    log, examples = action_log(read_atomic(decided)), rows_of_test(decided, bundle)
    rows = TreeRows.of(examples, log.schema.names)
    first = rows.names.index("pin_scalars_0") + len(pin_scalars(bundle)) - 3
    own = log.pin_values.of(log.pin_ids)[examples.pins]
    present = rows.table[:, rows.names.index("pin_scalars_0")] > 0
    np.testing.assert_array_equal(rows.table[present, first : first + 3], own[present])
    assert (own[examples.labels[:, 0] > 0, 2] > 0).all()


async def test_stored_rows_give_the_tensors_of_training(decided: Path, bundle: Bundle) -> None:
    log, embeddings = action_log(read_atomic(decided)), embeddings_of(bundle)
    groups = Groups.served_by(bundle.manifest)
    builder = ExampleBuilder(log, embeddings, bundle.manifest, SPLIT, Sampling(), seed=5)
    span = part_slices(log, SPLIT, "test")[-1]
    request = slice_requests(log, span, 50, np.random.default_rng(span.number))[0]
    store = MemoryStore()
    await fill_store(store, log, embeddings, groups, before_ms=span.start_ms)
    candidates = np.arange(40)
    fetched = await fetch(store, bundle.manifest.needs, int(log.user_ids[request.user]), log.pin_ids[candidates], None)
    snapshot = FeatureSnapshot.at(span, log, groups, embeddings.of(log.pin_ids), [0])
    known = builder.fetched(request, candidates, snapshot.pins, snapshot.users)
    served, trained = (Assembler(bundle.manifest).assemble(found, request.surface) for found in (fetched, known))
    np.testing.assert_array_equal(served.candidate["pin_scalars"], trained.candidate["pin_scalars"])
    own = log.pin_values.of(log.pin_ids[candidates])
    present = snapshot.pins.states[candidates] == RowState.PRESENT
    assert present.any()
    np.testing.assert_array_equal(served.candidate["pin_scalars"][present, -3:], own[present])


def test_a_version_refuses_data_with_other_vectors(decided: Path, bundle: Bundle, tmp_path: Path) -> None:
    dataset = read_atomic(decided)
    parent = replace(Parent.of(bundle), learned_until_ms=int(dataset.time_ms[0]))
    narrower = replace(dataset, described=Described(pins=(Vectors(vectors="text.parquet", dim=2),)))
    for changed in (narrower, replace(dataset, described=Described())):
        with pytest.raises(SettingError, match=r"toy@3 reads the fields .*text_0, text_1, text_2 of pin_core, but the"):
            make_bundle(tmp_path / "next", changed, replace(RECIPE, version=4), Notes(), parent=parent)
    log = action_log(narrower)
    with pytest.raises(DatasetError, match=r"has the field 'text_2', which is no feature of this data: it has text_0"):
        pin_rows(log, Groups.served_by(bundle.manifest).pin, np.zeros((len(log.pin_ids), 32), np.float16), 10**9)
