from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_client.codec import Rows, RowState, decode_rows
from feature_client.stores.open_store import open_store
from model_store.bundle.files import Bundle, read_bundle
from model_store.registry.store import open_model_store
from ranker.data.actions import ActionLog, action_log
from ranker.data.atomic.identifiers import token_id
from ranker.data.atomic.recbole import read_atomic
from ranker.data.embeddings import svd_embeddings
from ranker.data.features import Groups, pin_rows
from ranker.data.folding import folded_in
from ranker.data.requests import producer_until_ms
from ranker.embedding.graph.edges import LogEdges
from ranker.embedding.graph.graph import build_graph
from ranker.embedding.graph.materialised import materialise
from ranker.embedding.graph.neighbours import graph_folder, make_neighbours
from ranker.embedding.graph.walks import WalkSettings
from ranker.embedding.pins.as_of import NetworkVectors, features_as_of, vectors_over
from ranker.embedding.pins.follow import Follower
from ranker.embedding.pins.network import PinNetworkSettings
from ranker.embedding.pins.producer import train_producer
from ranker.embedding.pins.tasks import CO_SAVE
from ranker.embedding.pins.trained import TrainedPins, write_network
from ranker.embedding.pins.training import PinTraining
from ranker.embedding.vector_file import SavedVectors, VectorsOrigin
from ranker.errors import DatasetError
from ranker.recipe import make_bundle
from tests.ranker.commands import run
from tests.ranker.interactions import write_atomic
from tests.ranker.test_recipe import RECIPE, SPLIT, Notes

WALKS = WalkSettings(walks=30, neighbours=8)


def network_until(log: ActionLog, until_ms: int, folder: Path) -> TrainedPins:
    graph = build_graph(graph_folder(folder / "n"), LogEdges(log, until_ms))
    svd = svd_embeddings(log, until_ms, 0, "toy")
    features = SavedVectors(svd, VectorsOrigin(space=svd.space, until_ms=until_ms))
    joined = materialise(make_neighbours(folder / "n", WALKS), [features], folder / "m")
    sizes = PinNetworkSettings(variant="pooled", dim=8, trained_dim=4, hidden=16, own_dropped=0.4, features_kept=True)
    training = PinTraining(epochs_max=10, patience=10, batch=16, learning_rate=1e-2)
    return train_producer("toy", joined, graph, WALKS, CO_SAVE, folder, sizes, training)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_atomic(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def log(data) -> ActionLog:
    return action_log(read_atomic(data))


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory) -> TrainedPins:
    return network_until(log, producer_until_ms(log, SPLIT), tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def folder(data, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    recipe = replace(RECIPE, variant="base")
    make_bundle(folder, read_atomic(data), recipe, Notes(), vectors=NetworkVectors.of(trained))
    return folder


@pytest.fixture(scope="module")
def bundle(folder) -> Bundle:
    return read_bundle(folder)


def rows_of(log, vectors, group, before_ms):
    numbers = vectors.as_of(log, before_ms)
    found = pin_rows(log, group, numbers, before_ms, folded_in(log, numbers, log.before(before_ms)))
    there = np.flatnonzero(found.states == RowState.PRESENT)
    return dict(zip(log.pin_ids[there].tolist(), found.rows[there], strict=True))


def test_vectors_as_of_a_time_know_no_later_event(log, trained):
    vectors = NetworkVectors.of(trained)
    middle = int(log.time_ms[len(log.time_ms) // 2])
    found = vectors.as_of(log, middle)
    features = features_as_of(trained, log, middle)
    expected = vectors_over(trained, LogEdges(log, middle), features, "co-save")
    assert np.array_equal(found, expected.of(log.pin_ids))
    assert not np.array_equal(found, NetworkVectors.of(trained).as_of(log, middle + 3_600_000))
    assert not vectors.as_of(log, int(log.time_ms[0])).any()
    assert vectors.as_of(log, middle) is found
    some = expected.pin_ids[3:7]
    alone = vectors_over(trained, LogEdges(log, middle), features, "co-save", some)
    assert np.array_equal(alone.pin_ids, some)
    np.testing.assert_allclose(alone.vectors, expected.of(some), atol=2e-3)


def test_a_ranker_is_trained_and_measured_on_vectors_of_each_time(log, trained, bundle):
    until_ms = producer_until_ms(log, SPLIT)
    saved = NetworkVectors.of(trained).saved(log, until_ms)
    assert bundle.manifest.group("pin_core").field("embedding").space == saved.space
    assert (np.diff(saved.pin_ids.astype(np.int64)) > 0).all()
    with pytest.raises(DatasetError, match="here they may know only events before"):
        NetworkVectors.of(trained).refuse_after(until_ms - 1)
    NetworkVectors.of(trained).refuse_after(until_ms)


def test_the_first_round_writes_what_a_fill_writes_and_later_ones_what_has_changed(log, trained, bundle):
    vectors, group = NetworkVectors.of(trained), Groups.served_by(bundle.manifest).pin
    follower = Follower(vectors, group)
    middle = int(log.time_ms[len(log.time_ms) * 3 // 4])
    first = follower.follow(log, middle)
    expected = rows_of(log, vectors, group, middle)
    assert first.pin_ids.tolist() == sorted(expected)
    assert all(np.array_equal(row, expected[pin]) for pin, row in zip(first.pin_ids.tolist(), first.rows, strict=True))
    again = follower.follow(log, middle)
    assert (again.users, again.touched, len(again.pin_ids)) == (0, 0, 0)
    later = int(log.time_ms[-1]) + 1
    second = follower.follow(log, later)
    whole = rows_of(log, vectors, group, later)
    acting = np.unique(log.user[log.before(middle) :][log.schema.affinities[log.action[log.before(middle) :]] > 0])
    liked = log.schema.affinities[log.action] > 0
    touched = np.unique(log.pin_ids[log.pin[np.isin(log.user, acting) & liked]])
    assert (second.users, second.touched) == (len(acting), len(touched))
    written = dict(zip(second.pin_ids.tolist(), second.rows, strict=True))
    for pin in touched.tolist():
        np.testing.assert_allclose(written.get(pin, expected.get(pin))["embedding"], whole[pin]["embedding"], atol=2e-3)
    follower.forget_rows()
    assert len(follower.follow(log, later).pin_ids) == len(whole)


def test_events_that_come_late_count(log, trained, bundle):
    group = Groups.served_by(bundle.manifest).pin
    follower = Follower(NetworkVectors.of(trained), group)
    end = int(log.time_ms[-1]) + 1
    follower._likes = {}
    follower.follow(log, end)
    user = next(iter(follower._likes))
    follower._likes[user] -= 1  # as if one of the user's events had not been there
    found = follower.follow(log, end)
    assert found.users == 1
    assert found.touched > 0


def test_new_actions_reach_the_live_group_while_the_command_runs(trained, bundle, folder, tmp_path, redis_url):
    models = open_model_store(tmp_path / "models")
    models.publish(folder)
    models.set_label("toy", "stable", 3)
    write_network(tmp_path / "network.npz", trained)
    live = write_atomic(tmp_path / "live")
    command = [
        sys.executable, "-c", "from server.cli.main import app; app()", "embed", "follow", str(live),
        "--network", str(tmp_path / "network.npz"), "--store", str(tmp_path / "models"), "--model", "toy@stable",
        "--feature-store", redis_url, "--every-min", "0.01",
    ]  # fmt: skip
    group = Groups.served_by(bundle.manifest).pin
    new = token_id("brand-new")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert re.search(r"touch \d+ pins: wrote \d+ rows in", first), (
                first,
                process.stderr and process.stderr.read(),
            )
            lines = [f"u{user}\tbrand-new\t5\t{200_000 + user}" for user in (0, 3, 6)]
            with (live / "tiny-taste.inter").open("a") as file:
                file.write("\n".join(lines) + "\n")
            while "3 users with new actions" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()

    async def stored() -> Rows:
        store = open_store(redis_url)
        await store.start()
        try:
            return decode_rows(group, await store.multi_get(group.keys(np.array([new], np.uint64))))
        finally:
            await store.close()

    rows = asyncio.run(stored())
    assert rows.states.tolist() == [RowState.PRESENT]
    later = action_log(read_atomic(live))
    expected = NetworkVectors.of(trained).as_of(later, int(later.time_ms[-1]) + 1)
    np.testing.assert_allclose(rows.rows["embedding"][0], expected[np.flatnonzero(later.pin_ids == new)[0]], atol=2e-3)


def test_a_network_of_another_space_than_the_versions_is_refused(data, trained, tmp_path):
    make_bundle(tmp_path / "bundle", read_atomic(data), replace(RECIPE, variant="base"), Notes())
    models = open_model_store(tmp_path / "models")
    models.publish(tmp_path / "bundle")
    write_network(tmp_path / "network.npz", trained)
    command = (
        "embed", "follow", data, "--network", tmp_path / "network.npz", "--store", tmp_path / "models",
        "--model", "toy@3", "--feature-store", f"lmdb://{tmp_path / 'features'}", "--once",
    )  # fmt: skip
    code, output = run(*command)
    assert code == 1
    assert "the network makes vectors of toy-co-save@1" in output
    assert "and toy@3 reads toy-svd@2" in output
    assert not (tmp_path / "features").exists()
