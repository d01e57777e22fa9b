"""A network of users in a ranker: trained, exported with it, evaluated, stored and served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
import torch
from pydantic import SecretStr

from feature_client.stores.lmdb_store import EmbeddedStore
from kernels.cpu.numpy_engine import NumpyEngine
from kernels.cpu.openvino_engine import OpenVinoEngine
from kernels.engines import engine_factory
from model_store.bundle.archives import decode_arrays
from model_store.bundle.files import PARAMETERS, USERS, Bundle, BundleError, copy_out
from model_store.bundle.golden import decode_golden
from model_store.model.loaded import load_model
from model_store.registry.store import open_model_store
from pinrank.v1 import ranking_pb2
from ranker.data.actions import ActionLog, action_log
from ranker.data.atomic.identifiers import token_id
from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.data.embeddings import PinEmbeddings, embeddings_of, svd_embeddings
from ranker.data.features import Groups, fill_store, pin_rows
from ranker.data.folding import folded_vectors
from ranker.data.requests import part_slices, producer_until_ms
from ranker.data.users.rows import USER_VECTOR, VECTOR_GROUP, VectorRows, vector_group
from ranker.embedding.users.carried import encoders_in
from ranker.embedding.users.encoder import ModelEncoder
from ranker.embedding.users.fit import FitSettings
from ranker.embedding.users.model import train_users
from ranker.embedding.users.network_file import decode_network, encode_network, write_network
from ranker.embedding.users.user_vectors import user_vectors_at
from ranker.errors import DatasetError, SettingError
from ranker.evaluation.evaluate import evaluate
from ranker.recipe import make_bundle
from ranker.training.examples import ExampleBuilder, Sampling
from ranker.training.parent import Parent
from tests.conftest import StartServer
from tests.ranker.commands import run
from tests.ranker.interactions import write_atomic
from tests.ranker.test_recipe import RECIPE, SPLIT, Notes
from tests.server.frontend import Frontend

DIM = 8
FIT = FitSettings(dim=DIM, layers=1, length_max=16, epochs=1)
WITHOUT = replace(RECIPE, variant="early")
ONE_EPOCH = replace(RECIPE.training, epochs=1, newest_epochs=0)


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
def encoder(log: ActionLog) -> ModelEncoder:
    """A network that reads the pins' vectors that the recipe will fit."""
    until_ms = producer_until_ms(log, SPLIT)
    vectors = svd_embeddings(log, until_ms, RECIPE.training.seed, RECIPE.dataset)
    return ModelEncoder(train_users(log, vectors, until_ms, FIT, "toy"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, dataset: AtomicDataset, encoder: ModelEncoder) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("with") / "bundle", dataset, WITHOUT, Notes(), users=encoder)


@pytest.mark.parametrize("engine", ["numpy", "openvino", "torch"])
def test_each_engine_proves_the_bundle_on_its_golden_requests(bundle: Bundle, engine: str) -> None:
    model = load_model(bundle, engine_factory(engine), streams=1)
    model.engine.close()


def test_the_bundle_names_the_space_and_carries_the_network(bundle: Bundle, encoder: ModelEncoder) -> None:
    group = next(group for group in bundle.manifest.groups if group.name == VECTOR_GROUP)
    assert [field.space for field in group.fields] == [encoder.space]  # type: ignore[union-attr]
    assert encoder.space.dim == DIM
    (carried,) = encoders_in([bundle])
    assert carried.space == encoder.space
    assert bundle.files[USERS] == encoder.content == carried.content
    sizes = json.loads(str(decode_arrays(bundle.files[PARAMETERS])["config"]))
    assert sizes["user_vector"] == DIM
    damaged = replace(bundle, files={**bundle.files, USERS: bundle.files[PARAMETERS]})
    with pytest.raises(BundleError, match=r"toy@3: users\.npz: it holds no network of users"):
        encoders_in([damaged])


def test_the_scores_follow_the_vector_of_the_user(bundle: Bundle) -> None:
    model = load_model(bundle, NumpyEngine, streams=1)
    fetched = decode_golden(bundle.files["golden.npz"])[0].fetched
    other = fetched.user[VECTOR_GROUP].rows.copy()
    other["vector"] = -other["vector"]
    user = {**fetched.user, VECTOR_GROUP: replace(fetched.user[VECTOR_GROUP], rows=other)}
    before, after = (
        model.engine.run(model.assembler.assemble(one, "home")) for one in (fetched, replace(fetched, user=user))
    )
    assert not np.allclose(before, after, atol=1e-4)
    model.engine.close()


def test_examples_hold_the_vector_as_of_the_start_of_their_slice(
    bundle: Bundle, log: ActionLog, encoder: ModelEncoder
) -> None:
    sampling = Sampling(negatives=12, candidates=30)
    embeddings = embeddings_of(bundle)
    builder = ExampleBuilder(log, embeddings, bundle.manifest, SPLIT, sampling, seed=1, encoders=[encoder])
    examples = builder.build("test")
    starts = {span.start_ms for span in part_slices(log, SPLIT, "test")}
    assert set(examples.snapshot_ms.tolist()) == starts
    assert len(starts) == 2
    held = examples.batch.request[USER_VECTOR]
    # No pin is newer than the vectors here, so that those of the store are those of the bundle.
    expected = user_vectors_at(encoder.model, log, embeddings, examples.users, examples.snapshot_ms)
    assert np.array_equal(held, expected.astype(np.float32))
    assert held.any(axis=1).sum() > len(held) / 2


def test_a_store_holds_what_the_command_makes_of_folded_vectors(log: ActionLog) -> None:
    until_ms, end_ms = producer_until_ms(log, SPLIT), int(log.time_ms[-1]) + 1
    whole = svd_embeddings(log, until_ms, 11, "toy")
    older = PinEmbeddings(whole.pin_ids[::2], whole.vectors[::2], whole.space)  # all others are newer than it
    model = train_users(log, older, until_ms, FIT.model_copy(update={"table": False}), "toy")
    group = Groups.of(whole.space, log.schema).pin
    stored = pin_rows(log, group, older.as_of(log, end_ms), end_ms).rows["embedding"]
    users = np.arange(len(log.user_ids))
    rows = VectorRows(vector_group(model.space), ModelEncoder(model)).rows(log, stored, users, end_ms)
    at_ms = np.full(len(users), end_ms)
    folded, unfolded = (
        user_vectors_at(model, log, vectors, users, at_ms) for vectors in (folded_vectors(log, older, end_ms), older)
    )
    assert np.array_equal(rows["vector"], folded)
    assert not np.array_equal(rows["vector"], unfolded)


def test_two_networks_of_one_space_are_not_taken_for_each_other(bundle: Bundle, log: ActionLog) -> None:
    other = decode_network(bundle.files[USERS])
    with torch.no_grad():
        other.network.user_out.weight.neg_()
    trained_elsewhere = replace(bundle, files={**bundle.files, USERS: encode_network(other)})
    bundles = {"ours": bundle, "theirs": trained_elsewhere}

    def measured(names: list[str]) -> dict[str, dict[str, float]]:
        chosen = {name: bundles[name] for name in names}
        encoders = encoders_in(chosen.values())
        found = evaluate(
            chosen,
            log,
            OpenVinoEngine,
            RECIPE.sampling,
            11,
            SPLIT,
            resamples=0,
            baseline="popularity",
            encoders=encoders,
        )
        return {name: found.flat(name) for name in names}

    together = measured(["ours", "theirs"])
    assert together == measured(["ours"]) | measured(["theirs"])
    assert together["ours"] != together["theirs"]


def test_without_the_network_no_example_is_made_up(bundle: Bundle, log: ActionLog) -> None:
    builder = ExampleBuilder(log, embeddings_of(bundle), bundle.manifest, SPLIT, Sampling(), seed=1)
    with pytest.raises(DatasetError, match="group user_vector@1 holds vectors of users, and the network that makes"):
        builder.build("test")


def test_a_network_that_knows_the_training_or_reads_other_vectors_is_refused(
    tmp_path: Path, dataset: AtomicDataset, log: ActionLog
) -> None:
    until_ms = producer_until_ms(log, SPLIT)
    late = ModelEncoder(train_users(log, None, until_ms + 1, FIT, "toy"))
    with pytest.raises(
        DatasetError, match="the networks of users were made of events until 1970-01-01.*--before training"
    ):
        make_bundle(tmp_path / "late", dataset, WITHOUT, Notes(), users=late)
    other = svd_embeddings(log, until_ms, RECIPE.training.seed + 1, RECIPE.dataset)
    foreign = ModelEncoder(train_users(log, other, until_ms, FIT, "toy"))
    with pytest.raises(DatasetError, match="the network of users reads pins' vectors of toy-svd"):
        make_bundle(tmp_path / "foreign", dataset, WITHOUT, Notes(), users=foreign)
    assert not list(tmp_path.iterdir())


def test_a_successor_reads_what_its_parent_reads(tmp_path: Path, dataset: AtomicDataset, bundle: Bundle) -> None:
    parent = replace(Parent.of(bundle), learned_until_ms=int(dataset.time_ms[0]))
    recipe = replace(WITHOUT, version=4, training=ONE_EPOCH)
    second = make_bundle(tmp_path / "second", dataset, recipe, Notes(), parent=parent)
    assert second.manifest.groups == bundle.manifest.groups
    assert second.manifest.inputs == bundle.manifest.inputs
    assert second.files[USERS] == bundle.files[USERS]


def test_a_parent_that_has_lost_its_network_has_no_successor(
    tmp_path: Path, dataset: AtomicDataset, bundle: Bundle
) -> None:
    lost = replace(bundle, files={name: held for name, held in bundle.files.items() if name != USERS})
    parent = replace(Parent.of(lost), learned_until_ms=int(dataset.time_ms[0]))
    with pytest.raises(SettingError, match=r"toy@3 reads vectors of users of 8 numbers, and the network .* users\.npz"):
        make_bundle(tmp_path / "next", dataset, replace(WITHOUT, version=4), Notes(), parent=parent)


def test_a_parent_without_the_vector_has_no_successor_with_it(
    tmp_path: Path, dataset: AtomicDataset, encoder: ModelEncoder
) -> None:
    recipe = replace(WITHOUT, variant="base", training=ONE_EPOCH)
    plain = make_bundle(tmp_path / "plain", dataset, recipe, Notes())
    assert USERS not in plain.files
    parent = replace(Parent.of(plain), learned_until_ms=int(dataset.time_ms[0]))
    with pytest.raises(SettingError, match="toy@3 reads no vectors of users, and its successor reads the same; leave"):
        make_bundle(tmp_path / "next", dataset, recipe, Notes(), parent=parent, users=encoder)


def test_the_command_trains_evaluates_and_fills_with_one_network(tmp_path: Path, data: Path, log: ActionLog) -> None:
    network = tmp_path / "network.npz"
    write_network(network, train_users(log, None, producer_until_ms(log, SPLIT), FIT, "toy"))
    (tmp_path / "utility.toml").write_bytes(RECIPE.utility_toml)
    store = tmp_path / "models"
    code, output = run(
        *("train", "--data", data, "--utility", tmp_path / "utility.toml", "--name", "mine", "--store", store),
        *("--user-vectors", network, "--epochs", "1", "--newest-epochs", "0", "--label", "stable", "--variant", "base"),
        *("--force",),
    )
    assert code == 0, output
    code, output = run("evaluate", "--data", data, "--store", store, "--model", "mine", "--no-baselines")
    assert code == 0, output
    url = f"lmdb://{tmp_path / 'features'}"
    code, output = run("data", "fill", data, "--store", store, "--model", "mine", "--feature-store", url)
    assert code == 0, output
    assert "60 user_vector for mine@1" in output
    code, output = run(
        *("train", "--data", data, "--utility", tmp_path / "utility.toml", "--out", tmp_path / "out"),
        *("--user-vectors", tmp_path / "utility.toml"),
    )
    assert code == 1
    assert "is no network of users" in output


async def test_a_filled_store_serves_the_vector_and_its_loss_is_told(
    tmp_path: Path, bundle: Bundle, log: ActionLog, encoder: ModelEncoder, start_server: StartServer
) -> None:
    models = open_model_store(tmp_path / "models")
    copy_out(bundle, tmp_path / "bundle")
    models.publish(tmp_path / "bundle")
    models.set_label("toy", "stable", 3)
    groups = Groups.served_by(bundle.manifest, [encoder])
    for folder, own in (("whole", groups), ("lost", replace(groups, further=()))):
        store = EmbeddedStore(tmp_path / folder)
        await store.start()
        await fill_store(store, log, embeddings_of(bundle), own)
        await store.close()
    pins, answers = [token_id(f"p{pin}") for pin in range(30)], []
    for folder in ("whole", "lost"):
        server = await start_server(
            model_store=str(tmp_path / "models"),
            model="toy",
            labels=("stable",),
            feature_store=SecretStr(f"lmdb://{tmp_path / folder}"),
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            answers.append(await Frontend(channel).rank(pins, user_id=token_id("u4")))
    assert answers[0].degradation == ranking_pb2.Degradation()
    assert answers[1].degradation == ranking_pb2.Degradation(user_missing=True)
    scores = [dict(zip(answer.pin_ids, answer.utilities, strict=True)) for answer in answers]
    assert scores[0].keys() == scores[1].keys() == set(pins)
    assert scores[0] != scores[1]
