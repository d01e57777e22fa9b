"""`pinrank embed` from the data to the vectors that a ranker reads."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from feature_client.codec import RowState, decode_rows
from feature_client.groups import Embedding
from feature_client.stores.open_store import open_store
from model_store.bundle.files import Bundle
from model_store.registry.store import open_model_store
from ranker.data.actions import action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.data.embeddings import embeddings_of
from ranker.data.requests import Split, producer_until_ms
from ranker.embedding.graph.materialised import open_neighbourhoods, read_neighbourhoods
from ranker.embedding.graph.neighbours import open_neighbours, read_neighbours
from ranker.embedding.vector_file import read_vectors, write_vectors
from ranker.errors import DatasetError, SettingError
from ranker.recipe import make_bundle
from ranker.training.parent import Parent
from tests.ranker.commands import run
from tests.ranker.interactions import KINDS, write_atomic
from tests.ranker.test_recipe import RECIPE, SPLIT, Notes


def narrower(path: Path, target: Path, dim: int) -> Path:
    """Write the first numbers of vectors, at length one again, as a space of their own."""
    found = read_vectors(path)
    space = found.origin.space.model_copy(update={"dim": dim, "name": "narrow", "content": "00000000000000aa"})
    numbers = found.embeddings.vectors[:, :dim].astype(np.float32)
    numbers /= np.maximum(np.linalg.norm(numbers, axis=1, keepdims=True), 1e-12)
    held = replace(found.embeddings, vectors=numbers.astype(np.float16), space=space)
    write_vectors(target, held, found.origin.model_copy(update={"space": space}))
    return target


@pytest.fixture(scope="module")
def published(data: Path, vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with a ranker that was trained on vectors of 8 numbers, instead of its own SVD's 32."""
    folder = tmp_path_factory.mktemp("published")
    own = read_vectors(narrower(vectors, folder / "narrow.parquet", 8))
    dataset = read_atomic(data)
    until_ms = producer_until_ms(action_log(dataset), SPLIT)
    own = replace(own, origin=own.origin.model_copy(update={"until_ms": until_ms}))
    make_bundle(folder / "bundle", dataset, replace(RECIPE, variant="base"), Notes(), vectors=own)
    models = open_model_store(folder / "models")
    models.publish(folder / "bundle")
    models.set_label("toy", "stable", 3)
    return folder / "models"


def test_svd_reads_only_the_window(data: Path, vectors: Path, tmp_path: Path) -> None:
    log = action_log(read_atomic(data))
    found = read_vectors(vectors)
    assert found.origin.until_ms == producer_until_ms(log, Split())
    assert found.origin.space.name == "tiny-taste-svd"
    code, _ = run("embed", "svd", data, "--out", tmp_path / "all.parquet")
    assert code == 0
    everything = read_vectors(tmp_path / "all.parquet")
    assert everything.origin.until_ms == int(log.time_ms[-1]) + 1
    assert everything.origin.space.content != found.origin.space.content
    date = ("embed", "svd", data, "--out", tmp_path / "day.parquet", "--before")
    assert run(*date, "1970-01-01T05:00")[0] == 0
    assert read_vectors(tmp_path / "day.parquet").origin.until_ms == 5 * 3_600_000
    code, output = run(*date, "yesterday")
    assert (code, "--before yesterday is no date; write one such as 2026-03-31" in output) == (1, True)


def test_walks_go_on_where_they_ended(data: Path, tmp_path: Path) -> None:
    walked = (
        "embed",
        "walks",
        data,
        "--out",
        tmp_path / "n",
        "--walks",
        "20",
        "--neighbours",
        "5",
        "--before",
        "training",
    )
    code, output = run(*walked)
    assert code == 0
    made = open_neighbours(tmp_path / "n")
    assert f"wrote the neighbours of {made.pins:,} pins" in output
    assert made.until_ms == producer_until_ms(action_log(read_atomic(data)), Split())
    (path,) = made.paths
    before = path.read_bytes()
    path.unlink()
    assert run(*walked)[0] == 0
    assert path.read_bytes() == before
    code, output = run(*walked, "--restart", "0.9")
    assert (code, "has neighbours of other settings or data" in output) == (1, True)


def test_pins_and_their_neighbours_are_joined_with_their_features(data: Path, vectors: Path, tmp_path: Path) -> None:
    assert run("embed", "walks", data, "--out", tmp_path / "n", "--before", "training")[0] == 0
    made = ("embed", "materialise", tmp_path / "n", "--features", vectors, "--out", tmp_path / "m")
    code, output = run(*made)
    assert code == 0, output
    joined = open_neighbourhoods(tmp_path / "m")
    assert f"wrote the neighbourhoods of {joined.pins:,} pins" in output
    assert joined.until_ms == read_vectors(vectors).origin.until_ms
    (found,) = read_neighbourhoods(joined)
    assert np.array_equal(found.features, read_vectors(vectors).embeddings.of(found.pin_ids))
    code, output = run("embed", "materialise", tmp_path / "none", "--features", vectors, "--out", tmp_path / "m")
    assert (code, "make them with `pinrank embed walks`" in output) == (1, True)


def test_vectors_are_measured_against_popularity_and_other_vectors(data: Path, vectors: Path, tmp_path: Path) -> None:
    other = rotated(vectors, tmp_path / "noise.parquet", noise=3.0)
    code, output = run("embed", "evaluate", vectors, other, "--data", data, "--json", tmp_path / "e.json")
    assert code == 0, output
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["scorers"].keys() == {"popularity", "v.parquet", "noise.parquet"}
    log = action_log(read_atomic(data))
    until_ms = producer_until_ms(log, Split())
    liked = log.schema.affinities[log.action] > 0
    assert found["held_out"] < np.count_nonzero(liked & (log.time_ms >= until_ms))
    recalls = {name: one["recall"]["20"]["value"] for name, one in found["scorers"].items()}
    # Users like pins of one of three kinds, which an SVD finds and popularity does not.
    assert recalls["v.parquet"] > 1.2 * max(recalls["popularity"], recalls["noise.parquet"])
    over = found["recall_at_20_over"]["popularity"]
    assert over["value"] == pytest.approx(recalls["v.parquet"] / recalls["popularity"] - 1)
    assert over["low"] < over["value"] < over["high"]
    assert "recall@20 of v.parquet over noise.parquet: +" in output
    assert "not shown: held-out pins are the only right answers" in output
    code, output = run("embed", "evaluate", vectors, "--data", data, "--known", vectors)
    assert (code, "pass either --data, or both --known and --held" in output) == (1, True)


def test_edges_without_times_are_held_out_by_files(vectors: Path, tmp_path: Path) -> None:
    pins = read_vectors(vectors).embeddings.pin_ids
    for name, held in (("known", pins[:20]), ("held", pins[20:30])):
        (tmp_path / f"{name}.txt").write_text(f"1 {' '.join(map(str, held))}\n")
    edges = ("--known", tmp_path / "known.txt", "--held", tmp_path / "held.txt")
    code, output = run("embed", "evaluate", vectors, *edges)
    assert code == 0, output
    assert f"1 contexts, 10 held-out pins among {len(pins)}" in output


def test_similar_pins_are_shown_by_title(data: Path, vectors: Path) -> None:
    code, output = run("embed", "similar", vectors, "--data", data, "--pin", "p7", "--count", "5")
    assert code == 0
    assert "similar to Pin number 7" in output
    shown = [int(word) for word in re.findall(r"Pin number (\d+)", output)[1:]]
    assert len(shown) == 5
    assert [pin % KINDS for pin in shown].count(7 % KINDS) >= 4
    code, output = run("embed", "similar", vectors, "--data", data)
    assert output.count("similar to Pin number") == 5
    code, output = run("embed", "similar", vectors, "--data", data, "--pin", "nobody")
    assert (code, "has no vector in tiny-taste-svd@2" in output) == (1, True)


def test_a_users_interests_are_shown_by_title(data: Path, vectors: Path) -> None:
    code, output = run("embed", "explain", vectors, "--data", data, "--user", "u4", "--clusters", "99")
    assert code == 0, output
    shares = [float(share) for share in re.findall(r"([0-9.]+)% │ Pin number", output)]
    assert len(shares) >= 1
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    code, output = run("embed", "explain", vectors, "--data", data, "--user", "nobody")
    assert (code, "is of user 'nobody'" in output) == (1, True)
    code, output = run("embed", "explain", vectors, "--data", data, "--user", "u4", "--before", "1970-01-01")
    assert (code, "liked no pin that has a vector in tiny-taste-svd@2" in output) == (1, True)


def test_walks_take_edges_without_times(tmp_path: Path) -> None:
    (tmp_path / "boards.txt").write_text("1 10 11\n2 11 12\n")
    out = tmp_path / "n"
    assert run("embed", "walks", tmp_path / "boards.txt", "--out", out, "--processes", "1")[0] == 0
    ((pins, splits, found, _),) = read_neighbours(open_neighbours(out))
    assert pins.tolist() == [10, 11, 12]
    assert [set(found[a:b].tolist()) for a, b in pairwise(splits)] == [
        {11, 12},
        {10, 12},
        {10, 11},
    ]
    code, output = run("embed", "walks", tmp_path / "boards.txt", "--out", out, "--before", "2026-01-01")
    assert (code, "has no times and no actions; leave out --before and --actions" in output) == (1, True)


def test_ray_is_asked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boards.txt").write_text("1 10 11\n2 11 12\n")
    monkeypatch.delitem(sys.modules, "ranker.embedding.graph.ray_cluster", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    code, output = run("embed", "walks", tmp_path / "boards.txt", "--out", tmp_path / "n", "--on", "ray")
    assert (code, output) == (
        1, "error: this command needs ray, which is not installed: pip install 'pinrank[ray]'"
    )  # fmt: skip
    assert not (tmp_path / "n").exists()


def rotated(path: Path, target: Path, noise: float) -> Path:
    """Write vectors of a new training: the same, but for a rotation and some noise."""
    rng = np.random.default_rng(7)
    found = read_vectors(path)
    held = found.embeddings.vectors.astype(np.float64)
    rotation = np.linalg.qr(rng.standard_normal((held.shape[1], held.shape[1])))[0]
    moved = held @ rotation + noise * rng.standard_normal(held.shape)
    space = found.origin.space.model_copy(update={"content": "00000000000000bb"})
    write_vectors(
        target,
        replace(found.embeddings, vectors=moved.astype(np.float16), space=space),
        found.origin.model_copy(update={"space": space}),
    )
    return target


async def stored_vectors(url: str, bundle: Bundle, pin_ids: np.ndarray) -> np.ndarray:
    group = bundle.manifest.group("pin_core")
    store = open_store(url)
    await store.start()
    try:
        rows = decode_rows(group, await store.multi_get(group.keys(pin_ids)))
    finally:
        await store.close()
    assert (rows.states == RowState.PRESENT).all()
    return rows.rows["embedding"]


def test_a_refresh_is_a_revision_of_the_space_that_the_ranker_goes_on_reading(
    data: Path, vectors: Path, published: Path, tmp_path: Path
) -> None:
    bundle = open_model_store(published).read("toy", 3)
    old = embeddings_of(bundle)
    new = rotated(narrower(vectors, tmp_path / "narrow.parquet", 8), tmp_path / "new.parquet", noise=0.01)
    url, out = f"lmdb://{tmp_path / 'features'}", tmp_path / "refreshed.parquet"
    fill = ("data", "fill", data, "--store", published, "--model", "toy", "--feature-store", url, "--pin-vectors")
    code, output = run(*fill, new)
    assert code == 1
    assert f"has vectors of {read_vectors(new).origin.space.ref}, and toy@3 reads {old.space.ref}; rotate" in output
    code, output = run("embed", "align", new, "--to", "toy@stable", "--store", published, "--out", out)
    assert code == 0, output
    assert f"wrote revision 2 of {old.space.ref}" in output
    found = read_vectors(out)
    assert found.origin.space == old.space
    assert found.origin.made_of == read_vectors(new).origin.space.ref
    assert found.origin.until_ms == read_vectors(new).origin.until_ms
    code, output = run(*fill, out)
    assert code == 0, output
    known = found.embeddings.vectors.any(axis=1)
    stored = asyncio.run(stored_vectors(url, bundle, found.embeddings.pin_ids[known]))
    assert np.array_equal(stored, found.embeddings.vectors[known])
    cosines = np.sum(stored.astype(np.float64) * old.of(found.embeddings.pin_ids[known]).astype(np.float64), axis=1)
    assert cosines.mean() > 0.95
    again = rotated(narrower(vectors, tmp_path / "narrow.parquet", 8), tmp_path / "newer.parquet", noise=0.0)
    third = tmp_path / "third.parquet"
    code, output = run("embed", "align", again, "--to", out, "--out", third)
    assert (code, read_vectors(third).origin.revision) == (0, 3)
    fourth = tmp_path / "fourth.parquet"
    code, output = run("embed", "align", third, "--to", third, "--out", fourth)
    assert (code, read_vectors(fourth).origin.revision) == (0, 4)
    assert "in the space of both, the mean cosine of a pin's two vectors is 1.000" in output
    assert np.array_equal(read_vectors(fourth).embeddings.vectors, read_vectors(third).embeddings.vectors)
    assert read_vectors(fourth).origin.made_of == ""


def test_vectors_that_have_moved_too_far_are_a_new_space_and_nothing_is_written(
    vectors: Path, published: Path, tmp_path: Path
) -> None:
    new = rotated(narrower(vectors, tmp_path / "narrow.parquet", 8), tmp_path / "new.parquet", noise=0.5)
    out = tmp_path / "refreshed.parquet"
    align = ("embed", "align", new, "--to", "toy@stable", "--store", published, "--out", out)
    code, output = run(*align)
    assert code == 1
    assert "+00000000000000bb is a new space, not a refresh of narrow@2+00000000000000aa: the mean cosine is" in output
    assert "toy@stable read narrow@2+00000000000000aa" in output
    assert "pinrank train --pin-vectors" in output
    assert not out.exists()
    assert run(*align, "--mean-cosine-min", "-1", "--moved-share-max", "1")[0] == 0
    code, output = run("embed", "align", new, "--to", "toy@stable", "--out", out)
    assert (code, "--to toy@stable names a version in a model store; add --store DIR" in output) == (1, True)


def test_a_ranker_learns_from_given_vectors(data: Path, vectors: Path, published: Path, tmp_path: Path) -> None:
    bundle = open_model_store(published).read("toy", 3)
    (space,) = {
        field.space for group in bundle.manifest.groups for field in group.fields if isinstance(field, Embedding)
    }
    assert space.ref == "narrow@2+00000000000000aa"
    assert embeddings_of(bundle).vectors.shape[1] == 8
    utility = tmp_path / "utility.toml"
    utility.write_bytes(RECIPE.utility_toml)
    train = (
        "train", "--data", data, "--name", "toy", "--utility", utility, "--out", tmp_path / "bundle", "--epochs", "1",
        "--variant", "base", "--size", "hidden=16", "--requests-max", "40", "--pin-vectors",
    )  # fmt: skip
    run("embed", "svd", data, "--out", tmp_path / "late.parquet")
    code, output = run(*train, tmp_path / "late.parquet")
    assert code == 1
    assert (
        "the vectors of pins were made of events until 1970-01-01, and here they may know only events before" in output
    )
    code, output = run("embed", "evaluate", tmp_path / "late.parquet", "--data", data)
    assert (code, "so that nothing is measured on what they have seen" in output) == (1, True)
    code, output = run(*train, vectors)
    assert code == 0, output


def test_a_successor_takes_a_refresh_of_its_parents_space_only(
    data: Path, vectors: Path, published: Path, tmp_path: Path
) -> None:
    parent = Parent.of(open_model_store(published).read("toy", 3))
    later = read_atomic(write_atomic(tmp_path / "later", seed=4, start_s=100_000))
    new = read_vectors(narrower(vectors, tmp_path / "narrow.parquet", 8))
    turned = -new.embeddings.vectors
    refreshed = replace(new, embeddings=replace(new.embeddings, vectors=turned))
    recipe = replace(RECIPE, variant="base", version=4)
    made = make_bundle(tmp_path / "next", later, recipe, Notes(), parent=parent, vectors=refreshed)
    assert np.array_equal(embeddings_of(made).vectors, turned)
    with pytest.raises(SettingError, match=r"toy@3 reads vectors of narrow@2\+00000000000000aa, .*embed align"):
        make_bundle(tmp_path / "other", later, recipe, Notes(), parent=parent, vectors=read_vectors(vectors))
    unknown = replace(refreshed, origin=refreshed.origin.model_copy(update={"until_ms": None}))
    with pytest.raises(DatasetError, match="the vectors of pins do not say until when"):
        make_bundle(tmp_path / "unknown", later, recipe, Notes(), parent=parent, vectors=unknown)


def test_vectors_of_another_length_are_another_space(data: Path, vectors: Path, tmp_path: Path) -> None:
    code, output = run("embed", "svd", data, "--dim", "5", "--out", tmp_path / "short.parquet", "--before", "training")
    assert code == 0, output
    short, default = read_vectors(tmp_path / "short.parquet"), read_vectors(vectors)
    assert (short.embeddings.vectors.shape[1], short.origin.space.dim, default.origin.space.dim) == (5, 5, 32)
    assert short.origin.space.content != default.origin.space.content
    first = default.embeddings.vectors[:, :5].astype(np.float32)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    assert ((first * short.embeddings.vectors).sum(axis=1) > 0.99).mean() > 0.9  # the same directions, but for rounding


def test_newer_pins_are_added_to_a_file_as_the_means_of_their_users(data: Path, vectors: Path, tmp_path: Path) -> None:
    held = read_vectors(vectors)
    path = tmp_path / "some.parquet"
    known = held.embeddings.pin_ids[::2]
    some = replace(held.embeddings, pin_ids=known, vectors=held.embeddings.vectors[::2])
    write_vectors(path, some, held.origin)
    out = tmp_path / "folded.parquet"
    code, output = run("embed", "fold", data, "--vectors", path, "--out", out)
    assert code == 0, output
    found = read_vectors(out)
    assert f"{len(found.embeddings.pin_ids) - len(known)} of them are new" in output
    assert (found.origin.space, found.origin.revision) == (held.origin.space, 2)
    assert found.origin.until_ms == int(action_log(read_atomic(data)).time_ms[-1]) + 1
    assert np.array_equal(found.embeddings.of(known), some.vectors)
    new = found.embeddings.pin_ids[~np.isin(found.embeddings.pin_ids, known)]
    assert len(new) > 30
    np.testing.assert_allclose(np.linalg.norm(found.embeddings.of(new).astype(float), axis=1), 1, atol=2e-3)
