"""`pinrank embed users` and `user-vectors`, from the data to rows in a feature store."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from feature_client.bulk.load import load
from feature_client.bulk.source import Source, SourceError
from feature_client.codec import Rows, RowState, decode_rows
from feature_client.groups import Embedding, FeatureGroup
from feature_client.stores.open_store import open_store
from ranker.data.actions import action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.data.requests import Split, producer_until_ms
from ranker.embedding.users.network_file import read_network
from ranker.embedding.vector_file import read_user_vectors, read_vectors
from tests.ranker.commands import run
from tests.ranker.interactions import write_atomic

SMALL = ("--dim", "16", "--epochs", "1", "--length-max", "16", "--loss", "dense")


@pytest.fixture(scope="module")
def made(data: Path, vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("users") / "made"
    code, output = run("embed", "users", data, "--pins", vectors, "--out", folder, "--before", "training", *SMALL)
    assert code == 0, output
    assert "wrote the vectors of" in output
    return folder


def test_the_network_and_all_vectors_are_of_one_space_and_one_window(data: Path, made: Path) -> None:
    log = action_log(read_atomic(data))
    until_ms = producer_until_ms(log, Split())
    model, users, own = (
        read_network(made / "network.npz"),
        read_user_vectors(made / "users.parquet"),
        read_vectors(made / "pins.parquet"),
    )
    assert model.space == users.origin.space == own.origin.space
    assert model.space.name == "tiny-taste-users"
    assert model.until_ms == users.origin.until_ms == own.origin.until_ms == until_ms
    assert users.user_ids.tolist() == np.unique(log.user_ids[log.user[: log.before(until_ms)]]).tolist()


def test_a_day_later_only_new_actions_are_read_and_the_file_is_as_if_all_were(
    data: Path, vectors: Path, made: Path, tmp_path: Path
) -> None:
    again = ("embed", "user-vectors", made / "network.npz", data, "--pins", vectors)
    for name, more in (("full", ()), ("new", ("--previous", made / "users.parquet"))):
        code, output = run(*again, "--out", tmp_path / f"{name}.parquet", *more)
        assert code == 0, output
    full, new = (read_user_vectors(tmp_path / f"{name}.parquet") for name in ("full", "new"))
    assert full.user_ids.tolist() == new.user_ids.tolist()
    assert full.vectors.tobytes() == new.vectors.tobytes()
    assert len(full.user_ids) > len(read_user_vectors(made / "users.parquet").user_ids)
    code, output = run(*again, "--out", tmp_path / "x.parquet", "--before", "1970-01-01T01:00")
    assert code == 1
    assert "was trained on events until" in output


def test_vectors_of_pins_that_have_seen_later_events_are_refused(data: Path, tmp_path: Path) -> None:
    assert run("embed", "svd", data, "--out", tmp_path / "all.parquet")[0] == 0
    code, output = run(
        "embed",
        "users",
        data,
        "--pins",
        tmp_path / "all.parquet",
        "--out",
        tmp_path / "users",
        "--before",
        "training",
        *SMALL,
    )
    assert (code, "here they may know only events before" in output) == (1, True)
    assert not (tmp_path / "users").exists()


def test_a_dimension_that_two_heads_cannot_share_is_refused(data: Path, tmp_path: Path) -> None:
    code, output = run("embed", "users", data, "--out", tmp_path / "users", "--dim", "15")
    assert (code, "choose an even number" in output) == (1, True)


def test_lists_without_times_are_sequences(tmp_path: Path) -> None:
    lists = tmp_path / "lists.txt"
    rng = np.random.default_rng(0)
    lists.write_text("\n".join(" ".join(map(str, [user, *rng.integers(50, 80, 9)])) for user in range(30)) + "\n")
    code, output = run("embed", "users", lists, "--out", tmp_path / "made", *SMALL)
    assert code == 0, output
    model = read_network(tmp_path / "made" / "network.npz")
    assert (model.network.time, model.until_ms) == (None, None)
    assert read_user_vectors(tmp_path / "made" / "users.parquet").user_ids.tolist() == list(range(30))
    code, output = run("embed", "users", lists, "--out", tmp_path / "made", *SMALL, "--before", "2026-01-01")
    assert (code, "has no times and no actions; leave out --before" in output) == (1, True)
    code, output = run(
        "embed", "user-vectors", tmp_path / "made" / "network.npz", write_atomic(tmp_path / "data"), "--out", lists
    )
    assert (code, "was trained on data without times" in output) == (1, True)


def test_the_vectors_are_loaded_as_a_group_of_users(made: Path, vectors: Path, tmp_path: Path) -> None:
    group = FeatureGroup.model_validate_json((made / "group.json").read_text())
    users = read_user_vectors(made / "users.parquet")
    source = Source(made / "users.parquet", group)
    rows = asyncio.run(_loaded(f"lmdb://{tmp_path}/features", source, group, users.user_ids))
    assert (rows.states == RowState.PRESENT).all()
    assert np.array_equal(rows.rows["vector"], users.vectors)
    for path, message in (
        (made / "pins.parquet", "has vectors of pins, and group user_vector@1 is of users"),
        (vectors, "has vectors of pins"),
    ):
        with pytest.raises(SourceError, match=message):
            Source(path, group)
    (field,) = group.fields
    assert isinstance(field, Embedding)
    other = field.space.model_copy(update={"content": "0" * 16})
    foreign = group.model_copy(update={"fields": (field.model_copy(update={"space": other}),)})
    with pytest.raises(SourceError, match="load vectors of that space"):
        Source(made / "users.parquet", foreign)


async def _loaded(url: str, source: Source, group: FeatureGroup, ids: np.ndarray) -> Rows:
    store = open_store(url)
    await store.start()
    try:
        await load(store, group, source, lambda _done: None)
        return decode_rows(group, await store.multi_get(group.keys(ids)))
    finally:
        await store.close()


def test_vectors_of_users_are_not_taken_for_those_of_pins(data: Path, made: Path) -> None:
    code, output = run("embed", "evaluate", made / "users.parquet", "--data", data)
    assert (code, "has vectors of users, and those of pins are needed" in output) == (1, True)


def test_vectors_of_users_are_measured_beside_means_of_pins(
    data: Path, made: Path, vectors: Path, tmp_path: Path
) -> None:
    asked = ("embed", "evaluate", made / "pins.parquet", "--data", data)
    code, output = run(*asked, "--users", made / "users.parquet", "--json", tmp_path / "e.json")
    assert code == 0, output
    found = json.loads((tmp_path / "e.json").read_text())["scorers"]
    assert found.keys() == {"popularity", "pins.parquet", "users.parquet"}
    log = action_log(read_atomic(data))
    until_ms = producer_until_ms(log, Split())
    users, own = read_user_vectors(made / "users.parquet"), read_vectors(made / "pins.parquet").embeddings
    liked = log.schema.affinities[log.action] > 0
    early = log.time_ms < until_ms
    shares = []
    for user, vector in zip(users.user_ids, users.vectors.astype(np.float32), strict=True):
        events = liked & (log.user_ids[log.user] == user)
        known, held = (np.unique(log.pin_ids[log.pin[events & side]]) for side in (early, ~early))
        held = np.setdiff1d(held, known)
        if len(known) and len(held):
            scores = np.where(np.isin(own.pin_ids, known), -np.inf, own.vectors.astype(np.float32) @ vector)
            shares.append(np.isin(held, own.pin_ids[np.argsort(-scores)[:10]]).mean())
    assert found["users.parquet"]["recall"]["10"]["value"] == pytest.approx(np.mean(shares))
    code, output = run("embed", "evaluate", vectors, "--data", data, "--users", made / "users.parquet")
    assert (code, "pass those that `pinrank embed users` wrote together" in output) == (1, True)
