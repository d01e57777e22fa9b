"""From a folder of interactions to scores, on a dataset small enough to train on in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.cpu.numpy_engine import NumpyEngine
from kernels.cpu.openvino_engine import OpenVinoEngine
from kernels.engine import FeatureBatch
from model_store.bundle.files import EMBEDDINGS, Bundle, BundleError
from model_store.bundle.golden import decode_golden
from model_store.model.loaded import load_model
from ranker.baselines.score import NO_LIGHTGBM, BaselinePlan
from ranker.baselines.scores import DOT_PRODUCT, ITEM_KNN, RANKING_TREES, TREES
from ranker.data.actions import RATINGS, ActionLog, action_log
from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.data.embeddings import embeddings_of, space_of
from ranker.data.requests import Split
from ranker.errors import ParityError, SettingError
from ranker.evaluation.evaluate import evaluate
from ranker.evaluation.tables import baseline_note
from ranker.export import bundle as export
from ranker.export.bundle import check_parity
from ranker.export.manifest import draft_manifest
from ranker.network.model import NetworkConfig, RankerNetwork
from ranker.progress import StepProgress
from ranker.recipe import make_bundle
from ranker.recipe_settings import Recipe
from ranker.training.examples import ExampleBuilder, Sampling
from ranker.training.settings import TrainingConfig
from tests.ranker.interactions import write_atomic

UTILITY = b"""
[surfaces.home]
weights = { pinner = 1.0 }
utilities = { pinner = "save" }
[surfaces.related]
weights = { pinner = 1.0, creator = 0.001 }
utilities = { pinner = "save", creator = "pin.creator_tail" }
"""
SPLIT = Split(train_slices=2, validation_slices=1, test_slices=2)
RECIPE = Recipe(
    name="toy",
    version=3,
    dataset="toy",
    command="pinrank train --data toy",
    utility_toml=UTILITY,
    split=SPLIT,
    sampling=Sampling(negatives=12, candidates=30),
    # A toy user acts for an hour; most of it must stay visible.
    training=TrainingConfig(
        seed=11, epochs=4, patience=4, requests_per_batch=16, learning_rate=3e-3, time_window_h_max=0.2
    ),
)


@dataclass
class Notes:
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, what: str) -> Iterator[StepProgress]:
        self.notes.append(what)
        yield lambda _done, _total, _detail="", /: None

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> AtomicDataset:
    return read_atomic(write_atomic(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def log(dataset: AtomicDataset) -> ActionLog:
    return action_log(dataset)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, dataset: AtomicDataset) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("full") / "bundle", dataset, RECIPE, Notes())


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, dataset: AtomicDataset) -> Bundle:
    """The same without a sequence."""
    return make_bundle(tmp_path_factory.mktemp("twin") / "bundle", dataset, replace(RECIPE, variant="base"), Notes())


@pytest.fixture(params=["full", "twin"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    found: Bundle = request.getfixturevalue(request.param)
    return found


def test_both_engines_load_the_bundle_and_agree(bundle: Bundle) -> None:
    scores = []
    for factory in (NumpyEngine, OpenVinoEngine):
        model = load_model(bundle, factory, streams=1)
        golden = decode_golden(bundle.files["golden.npz"])
        batch = FeatureBatch.concat([model.assembler.assemble(g.fetched, g.surface) for g in golden])
        scores.append(model.probabilities(model.engine.run(batch)))
        model.engine.close()
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    assert np.isfinite(scores).all()
    assert ((scores[0] > 0) & (scores[0] < 1)).all()


def test_the_manifest_says_where_the_model_comes_from(full: Bundle, twin: Bundle, dataset: AtomicDataset) -> None:
    lineage = full.manifest.lineage
    assert (lineage.data, lineage.data_sha256, lineage.seed) == ("tiny-taste", dataset.sha256, 11)
    assert lineage.command == "pinrank train --data toy"
    assert {"hit_at_3_by_utility_hide", "hit_at_3_by_head_save", "auc_hide", "ece_closeup"} <= set(lineage.metrics)
    assert [head.name for head in full.manifest.heads] == ["save", "like", "hide", "closeup"]
    assert [(s.name, s.query) for s in full.manifest.surfaces] == [("home", False), ("related", True)]
    assert (full.manifest.sequence_length, twin.manifest.sequence_length) == (50, 0)
    assert twin.manifest.sequence is None
    assert full.manifest.groups == twin.manifest.groups


def test_golden_requests_are_invented_and_reach_every_path(full: Bundle, dataset: AtomicDataset) -> None:
    golden = decode_golden(full.files["golden.npz"])
    assert {len(g.fetched.events) for g in golden} >= {0, 50}
    assert {g.surface for g in golden} == {"home", "related"}
    assert any(g.fetched.missing().user for g in golden)
    assert all(g.fetched.missing().candidates for g in golden)
    assert all(g.fetched.has_query_pin for g in golden if g.surface == "related")
    times = set(dataset.time_ms.tolist())
    assert not any(times & set(g.fetched.events["time_ms"].tolist()) for g in golden)


def test_the_same_seed_makes_the_same_bundle(tmp_path: Path, dataset: AtomicDataset, twin: Bundle) -> None:
    again = make_bundle(tmp_path / "again", dataset, replace(RECIPE, variant="base"), Notes())
    assert again.digest == twin.digest


def test_no_file_of_a_bundle_names_a_path_of_this_machine(bundle: Bundle) -> None:
    here = str(Path(export.__file__).parent).encode()
    for name, content in bundle.files.items():
        assert here not in content, name
        assert b"site-packages" not in content, name


def test_only_the_full_ranker_listens_to_the_last_actions(full: Bundle, twin: Bundle) -> None:
    for bundle, listens in ((full, True), (twin, False)):
        model = load_model(bundle, OpenVinoEngine, streams=1)
        fetched = decode_golden(full.files["golden.npz"])[0].fetched
        other = replace(fetched, events=fetched.events.copy())
        other.events["action"] = (fetched.events["action"] + 1) % 4
        ours, theirs = (model.engine.run(model.assembler.assemble(f, "home")) for f in (fetched, other))
        assert (not np.array_equal(ours, theirs)) == listens
        model.engine.close()


def test_what_was_learned_beats_popularity_on_the_test_period(full: Bundle, log: ActionLog) -> None:
    evaluation = evaluate({"full": full}, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT)
    by = {(score.scorer, score.head): score for score in evaluation.scores}
    learned, popular = by["full", "save"], by["popularity", "save"]
    assert learned.hit_at_3_by_head is not None
    assert learned.hit_at_3_by_head.difference is not None
    assert (learned.hit_at_3_by_head.difference.value or 0) > 0
    assert (learned.auc or 0) > (popular.auc or 1) + 0.05
    assert popular.ece is None
    assert (learned.ece or 1) < 0.1
    assert json.loads(json.dumps(evaluation.as_json(), allow_nan=False))["requests"] == evaluation.requests
    assert evaluation.flat("full") == full.manifest.lineage.metrics


@pytest.mark.parametrize("name", ["full", "twin"])
def test_baselines_score_the_rows_of_any_variant(
    name: str, log: ActionLog, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    made: Bundle = request.getfixturevalue(name)
    plan = BaselinePlan.of_training(made.manifest.lineage, 1, 200)
    assert plan.newest_requests_max == RECIPE.validation_requests_max
    found = evaluate({"made": made}, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT, resamples=50, against=plan)
    alone = evaluate({"made": made}, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT, resamples=50)
    assert found.scores == alone.scores  # inputs that only baselines read change nothing
    compared = {c.baseline: c for c in found.comparisons if c.head == "save"}
    assert list(compared) == ["popularity", DOT_PRODUCT, ITEM_KNN, TREES, RANKING_TREES]
    for baseline in (DOT_PRODUCT, TREES):
        for paired in (compared[baseline].by_head, compared[baseline].by_utility):
            assert paired is not None
            assert paired.baseline.value is not None
    taste = compared[TREES].by_head
    assert taste is not None
    assert taste.baseline.value is not None
    unknowing = compared["popularity"].by_head
    assert unknowing is not None
    assert unknowing.baseline.value is not None
    assert taste.baseline.value > unknowing.baseline.value
    assert found.trees is not None
    assert found.trees.requests == found.trees.requests_of_network > 50
    without = replace(plan, newest_requests_max=0)
    fewer = evaluate({"made": made}, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT, resamples=0, against=without)
    assert fewer.trees is not None
    assert fewer.trees.requests < found.trees.requests
    monkeypatch.setattr("ranker.baselines.boosted_trees.TreeTrainer", None)  # nothing is fitted a second time
    again = evaluate({"made": made}, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT, resamples=50, against=plan)
    assert again.comparisons == found.comparisons


def test_trees_learn_from_a_sample_where_there_are_more_requests(twin: Bundle, log: ActionLog) -> None:
    plan = BaselinePlan(RECIPE.sampling, 30, 20, seed=11, threads=1)
    found = evaluate({"twin": twin}, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT, resamples=0, against=plan)
    assert found.trees is not None
    assert found.trees.fewer
    assert 10 < found.trees.requests < 50 < found.trees.requests_of_network
    assert f"a sample of {found.trees.requests} of the about" in baseline_note(found)


def test_without_lightgbm_the_extra_is_named(twin: Bundle, log: ActionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranker.baselines.score.find_spec", lambda _name: None)
    found = evaluate(
        {"twin": twin}, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT, resamples=0, against=BaselinePlan()
    )
    assert {c.baseline for c in found.comparisons} == {"popularity", DOT_PRODUCT, ITEM_KNN}
    assert found.baselines_missing == {TREES: NO_LIGHTGBM, RANKING_TREES: NO_LIGHTGBM}


def test_bundles_that_share_tensors_score_as_they_do_alone(
    full: Bundle, twin: Bundle, log: ActionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = ExampleBuilder.build

    def counted(self: ExampleBuilder, *arguments: Any) -> Any:
        built.append("once")
        return build(self, *arguments)

    monkeypatch.setattr(ExampleBuilder, "build", counted)
    together = evaluate({"twin": twin, "full": full}, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT)
    assert built == ["once"]
    assert [scorer.name for scorer in together.scorers] == ["twin", "full"]
    for name, bundle in (("full", full), ("twin", twin)):
        assert together.flat(name) == bundle.manifest.lineage.metrics


def test_a_utility_without_a_surface_of_the_requests_leaves_that_order_out(twin: Bundle, log: ActionLog) -> None:
    lame = replace(twin, files={**twin.files, "utility.toml": UTILITY.split(b"[surfaces.related]")[0]})
    evaluation = evaluate({"lame": lame}, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT, resamples=0)
    assert evaluation.scorers[0].utility_missing == (
        "the utility table has surfaces ['home'], model toy@3 ranks ['home', 'related']"
    )
    assert all(score.hit_at_3_by_utility is None for score in evaluation.scores)


def test_popularity_is_counted_before_the_slice_only(log: ActionLog, full: Bundle) -> None:
    manifest = draft_manifest("toy", space_of("toy"), RATINGS, ["save"], sequence_length=0)
    embeddings = embeddings_of(full)
    sampling = Sampling(candidates=len(log.pin_ids))
    examples = ExampleBuilder(log, embeddings, manifest, Split(test_slices=1), sampling, 1).build("test")
    saves_before = np.bincount(log.pin[: int(0.9 * len(log.pin))], log.labels[: int(0.9 * len(log.pin)), 0])
    assert examples.popularity.max() == saves_before.max()


def test_a_bundle_without_embeddings_cannot_be_evaluated(full: Bundle, log: ActionLog) -> None:
    bare = replace(full, files={name: content for name, content in full.files.items() if name != EMBEDDINGS})
    with pytest.raises(BundleError, match=r"toy@3 carries no embeddings.npz"):
        evaluate({"bare": bare}, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT)


def test_every_epoch_is_judged_by_the_order_of_the_recipes_utility(tmp_path: Path, dataset: AtomicDataset) -> None:
    training = replace(RECIPE.training, epochs=3, newest_epochs=2)
    told: list[list[str]] = []
    for utility in (UTILITY, UTILITY.replace(b'"save"', b'"hide"')):
        notes = Notes()
        recipe = replace(RECIPE, variant="base", training=training, utility_toml=utility)
        make_bundle(tmp_path / str(len(told)), dataset, recipe, notes)
        told.append([note.rpartition("utility's order ")[2] for note in notes.notes if note.startswith("epoch ")])
    assert [len(orders) for orders in told] == [5, 5]
    assert all(0 < float(order.removesuffix(" of 1")) < 1 for orders in told for order in orders)
    assert told[0][0] != told[1][0]


def test_heads_without_positives_are_dropped_and_said_so(tmp_path: Path, dataset: AtomicDataset) -> None:
    unsaved = np.flatnonzero(~dataset.labels[:, RATINGS.position("save")])
    columns = {name: getattr(dataset, name)[unsaved] for name in ("users", "pins", "time_ms", "labels")}
    notes = Notes()
    recipe = replace(RECIPE, variant="base", training=replace(RECIPE.training, epochs=1))
    with pytest.raises(SettingError, match="unknown name 'save'; .*; the heads of this data are like, hide, closeup"):
        make_bundle(tmp_path / "bundle", replace(dataset, **columns), recipe, Notes())
    recipe = replace(recipe, utility_toml=UTILITY.replace(b'"save"', b'"like"'))
    bundle = make_bundle(tmp_path / "bundle", replace(dataset, **columns), recipe, notes)
    assert [head.name for head in bundle.manifest.heads] == ["like", "hide", "closeup"]
    assert "no interaction is a save, so the model will have no save head" in notes.notes


def test_a_network_that_computes_something_else_is_refused(twin: Bundle) -> None:
    torch.manual_seed(0)
    stranger = RankerNetwork(NetworkConfig(heads=4, actions=4, surfaces=2, scalars=5, fusion="none"))
    model = load_model(twin, NumpyEngine, streams=1)
    golden = decode_golden(twin.files["golden.npz"])
    batch = FeatureBatch.concat([model.assembler.assemble(g.fetched, g.surface) for g in golden])
    with pytest.raises(ParityError, match=r"the logits of the numpy engine differ by .*, more than the allowed 0.0001"):
        check_parity(stranger, twin.files["network.onnx"], twin.manifest, batch)
