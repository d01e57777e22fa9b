"""Users' interests from a log to an answer: trained, exported, evaluated, stored and served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from pydantic import SecretStr

from feature_client.stores.lmdb_store import EmbeddedStore
from kernels.cpu.numpy_engine import NumpyEngine
from kernels.cpu.openvino_engine import OpenVinoEngine
from kernels.engines import engine_factory
from model_store.bundle.archives import decode_arrays
from model_store.bundle.files import PARAMETERS, Bundle, copy_out
from model_store.bundle.golden import decode_golden
from model_store.model.loaded import load_model
from model_store.registry.store import open_model_store
from pinrank.v1 import ranking_pb2
from ranker.baselines.tree_rows import TreeRows
from ranker.data.actions import ActionLog, action_log
from ranker.data.atomic.identifiers import token_id
from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.data.embeddings import embeddings_of
from ranker.data.features import Groups, fill_store
from ranker.data.inputs import full_manifest
from ranker.data.users.rows import INTEREST_GROUP
from ranker.errors import SettingError
from ranker.evaluation.evaluate import evaluate
from ranker.recipe import make_bundle
from ranker.training.examples import ExampleBuilder, Sampling
from ranker.training.parent import Parent
from tests.conftest import StartServer
from tests.ranker.commands import run
from tests.ranker.interactions import write_atomic
from tests.ranker.test_recipe import RECIPE, SPLIT, Notes
from tests.server.frontend import Frontend

COUNT = 3
WITHOUT = replace(RECIPE, variant="base")
WITH = replace(WITHOUT, interests=COUNT)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atomic(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def dataset(data: Path) -> AtomicDataset:
    return read_atomic(data)


@pytest.fixture(scope="module")
def log(dataset: AtomicDataset) -> ActionLog:
    return action_log(dataset)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, dataset: AtomicDataset) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("with") / "bundle", dataset, WITH, Notes())


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory, dataset: AtomicDataset) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("without") / "bundle", dataset, WITHOUT, Notes())


@pytest.mark.parametrize("engine", ["numpy", "openvino", "torch"])
def test_each_engine_proves_the_bundle_on_its_golden_requests(bundle: Bundle, engine: str) -> None:
    model = load_model(bundle, engine_factory(engine), streams=1)
    model.engine.close()


@pytest.mark.parametrize("variant", ["late", "early"])
def test_networks_that_read_the_sequence_read_interests_too(
    tmp_path: Path, dataset: AtomicDataset, variant: str
) -> None:
    training = replace(RECIPE.training, epochs=1, newest_epochs=0)
    made = make_bundle(tmp_path / "bundle", dataset, replace(WITH, variant=variant, training=training), Notes())
    model = load_model(made, OpenVinoEngine, streams=1)
    assert {"similarities", "interest_similarities"} <= {spec.name for spec in made.manifest.specs}
    model.engine.close()


def test_golden_requests_have_all_interests_some_and_none(bundle: Bundle) -> None:
    golden = decode_golden(bundle.files["golden.npz"])
    rows = [one.fetched.user[INTEREST_GROUP] for one in golden]
    held = [sum(bool(found.rows[0][f"interest_{n}"].any()) for n in range(1, COUNT + 1)) for found in rows]
    assert {0, 1, COUNT} <= set(held)
    assert [bool(found.states[0]) for found in rows] == [count == 0 for count in held]


def test_the_scores_follow_the_interests_of_the_user(bundle: Bundle) -> None:
    model = load_model(bundle, NumpyEngine, streams=1)
    fetched = decode_golden(bundle.files["golden.npz"])[0].fetched
    before = model.engine.run(model.assembler.assemble(fetched, "home"))
    for field in ("interest_1", "importance_1"):
        other = fetched.user[INTEREST_GROUP].rows.copy()
        other[field] = -other[field]
        user = {**fetched.user, INTEREST_GROUP: replace(fetched.user[INTEREST_GROUP], rows=other)}
        changed = replace(fetched, user=user)
        after = model.engine.run(model.assembler.assemble(changed, "home"))
        assert not np.allclose(before, after, atol=1e-4)
    model.engine.close()


def test_only_the_further_group_and_its_inputs_are_new(bundle: Bundle, without: Bundle) -> None:
    assert bundle.manifest.groups[:2] == without.manifest.groups
    assert [group.name for group in bundle.manifest.groups[2:]] == [INTEREST_GROUP]
    assert bundle.manifest.inputs[: len(without.manifest.inputs)] == without.manifest.inputs
    sizes = [json.loads(str(decode_arrays(made.files[PARAMETERS])["config"])) for made in (bundle, without)]
    assert sizes[0]["interests"] == COUNT
    assert "interests" not in sizes[1]  # versions of this code that do not know interests read it


def test_bundles_with_and_without_interests_are_measured_on_the_same_requests(
    bundle: Bundle, without: Bundle, log: ActionLog
) -> None:
    made = {"with": bundle, "without": without}
    found = evaluate(made, log, OpenVinoEngine, RECIPE.sampling, 11, SPLIT, resamples=50, baseline="without")
    for name, one in made.items():
        assert found.flat(name) == one.manifest.lineage.metrics
    compared = next(score for score in found.scores if (score.scorer, score.head) == ("with", "save"))
    assert compared.hit_at_3_by_head is not None
    assert compared.hit_at_3_by_head.difference is not None
    assert compared.hit_at_3_by_head.difference.value is not None


def test_trees_read_interests_where_the_network_does(bundle: Bundle, without: Bundle, log: ActionLog) -> None:
    names = []
    for made in (bundle, without):
        manifest = full_manifest(made.manifest, log.schema)
        builder = ExampleBuilder(log, embeddings_of(made), manifest, SPLIT, Sampling(candidates=20), seed=1)
        examples = builder.build("test")
        names.append(TreeRows.of(examples, log.schema.names).names)
    own = {f"interest_{what}_{n}" for what in ("importances", "similarities") for n in range(COUNT)}
    assert set(names[0]) - set(names[1]) == own
    assert not set(names[1]) - set(names[0])


def test_a_successor_reads_as_many_interests_as_its_parent(
    tmp_path: Path, bundle: Bundle, dataset: AtomicDataset
) -> None:
    parent = replace(Parent.of(bundle), learned_until_ms=int(dataset.time_ms[0]))
    training = replace(RECIPE.training, epochs=1, newest_epochs=0)
    recipe = replace(WITHOUT, version=4, training=training)
    second = make_bundle(tmp_path / "second", dataset, recipe, Notes(), parent=parent)
    assert second.manifest.groups == bundle.manifest.groups
    assert second.manifest.inputs == bundle.manifest.inputs
    with pytest.raises(SettingError, match="toy@3 reads 3 interests, and its successor reads as many; leave out"):
        make_bundle(tmp_path / "third", dataset, replace(recipe, interests=5), Notes(), parent=parent)


@pytest.fixture
def filled(tmp_path: Path, data: Path, bundle: Bundle) -> str:
    """The URL of a feature store that `data fill` wrote, for a model in the model store beside it."""
    models = open_model_store(tmp_path / "models")
    copy_out(bundle, tmp_path / "bundle")
    models.publish(tmp_path / "bundle")
    models.set_label("toy", "stable", 3)
    url = f"lmdb://{tmp_path / 'filled'}"
    code, output = run("data", "fill", data, "--store", tmp_path / "models", "--model", "toy", "--feature-store", url)
    assert code == 0, output
    assert "90 pins, 60 users, 60 user_interests for toy@3" in output
    return url


async def test_a_filled_store_serves_interests_and_their_loss_is_told(
    tmp_path: Path, filled: str, bundle: Bundle, log: ActionLog, start_server: StartServer
) -> None:
    lost = EmbeddedStore(tmp_path / "lost")
    await lost.start()
    await fill_store(lost, log, embeddings_of(bundle), replace(Groups.served_by(bundle.manifest), further=()))
    await lost.close()
    pins, answers = [token_id(f"p{pin}") for pin in range(30)], []
    for url in (filled, f"lmdb://{tmp_path / 'lost'}"):
        server = await start_server(
            model_store=str(tmp_path / "models"), model="toy", labels=("stable",), feature_store=SecretStr(url)
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            answers.append(await Frontend(channel).rank(pins, user_id=token_id("u4")))
    whole, short = answers
    assert whole.degradation == ranking_pb2.Degradation()
    assert short.degradation == ranking_pb2.Degradation(user_missing=True)
    scores = [dict(zip(answer.pin_ids, answer.utilities, strict=True)) for answer in answers]
    assert scores[0].keys() == scores[1].keys() == set(pins)
    assert scores[0] != scores[1]
