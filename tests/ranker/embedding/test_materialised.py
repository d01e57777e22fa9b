from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from feature_client.groups import EmbeddingSpace
from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.graph import parts
from ranker.embedding.graph.graph import build_graph, open_graph
from ranker.embedding.graph.materialised import (
    Neighbourhoods,
    joined,
    materialise,
    open_neighbourhoods,
    read_neighbourhoods,
)
from ranker.embedding.graph.neighbours import graph_folder, make_neighbours
from ranker.embedding.graph.walks import WalkSettings, neighbours_of
from ranker.embedding.vector_file import SavedVectors, VectorsOrigin
from ranker.errors import DatasetError, SettingError
from tests.ranker.embedding.edges import random_edges

SETTINGS = WalkSettings(walks=5, neighbours=4, seed=2)


def vectors(name: str, dim: int, until_ms: int | None = 7) -> SavedVectors:
    """Return vectors of every other pin of 100."""
    space = EmbeddingSpace(name=name, version=1, dim=dim, content="00000000000000aa")
    numbers = np.random.default_rng(dim).standard_normal((50, dim)).astype(np.float16)
    held = PinEmbeddings(np.arange(0, 100, 2, dtype=np.uint64), numbers, space)
    return SavedVectors(held, VectorsOrigin(space=space, until_ms=until_ms))


@pytest.fixture
def neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PINS_PER_FILE", 32)
    monkeypatch.setattr(parts, "_PINS_READ", 9)
    build_graph(graph_folder(tmp_path / "n"), random_edges(5, 30, 100, 300))
    return make_neighbours(tmp_path / "n", SETTINGS)


def whole(read: list[Neighbourhoods]) -> Neighbourhoods:
    joined_up = {f.name: np.concatenate([getattr(one, f.name) for one in read]) for f in fields(Neighbourhoods)}
    counts = np.concatenate([np.diff(one.splits) for one in read])
    return Neighbourhoods(**joined_up | {"splits": np.concatenate([[0], np.cumsum(counts)])})


def test_what_is_materialised_is_what_a_lookup_on_the_fly_finds(neighbours, tmp_path):
    features = [vectors("a", 3), vectors("b", 2)]
    done = []
    made = materialise(neighbours, features, tmp_path / "m", lambda *told: done.append(told))
    assert done == [(0, 100), (32, 100), (64, 100), (96, 100), (100, 100)]
    read = list(read_neighbourhoods(made))
    assert max(len(one.pin_ids) for one in read) == 9  # a few pins at a time
    graph = open_graph(graph_folder(neighbours.folder))
    walked = neighbours_of(graph, np.arange(100), SETTINGS)
    embeddings = [one.embeddings for one in features]
    expected = joined(graph.pin_ids, walked.splits, graph.pin_ids[walked.pins], walked.weights, embeddings)
    found = whole(read)
    for field in fields(Neighbourhoods):
        assert np.array_equal(getattr(found, field.name), getattr(expected, field.name)), field.name
        assert getattr(found, field.name).dtype == getattr(expected, field.name).dtype, field.name
    assert not found.features[1::2].any()
    assert np.array_equal(found.features[::2, :3], features[0].embeddings.vectors)
    assert np.array_equal(found.features[::2, 3:], features[1].embeddings.vectors)


def test_a_run_that_was_interrupted_makes_the_files_that_are_missing(neighbours, tmp_path):
    made = materialise(neighbours, [vectors("a", 3)], tmp_path / "m")
    before = {path: path.read_bytes() for path in made.paths}
    made.paths[1].unlink()
    with pytest.raises(
        DatasetError, match="lacks 1 of 4 files of neighbourhoods; run `pinrank embed materialise` again"
    ):
        open_neighbourhoods(tmp_path / "m")
    written = made.paths[0].stat().st_mtime_ns
    materialise(neighbours, [vectors("a", 3)], tmp_path / "m")
    assert {path: path.read_bytes() for path in made.paths} == before
    assert made.paths[0].stat().st_mtime_ns == written
    assert open_neighbourhoods(tmp_path / "m") == made


def test_features_of_another_space_do_not_mix(neighbours, tmp_path):
    materialise(neighbours, [vectors("a", 3)], tmp_path / "m")
    other = vectors("a", 3)
    other = replace(other, origin=other.origin.model_copy(update={"revision": 2}))
    with pytest.raises(SettingError, match="has neighbourhoods of other settings or data"):
        materialise(neighbours, [other], tmp_path / "m")
    with pytest.raises(DatasetError, match="pins need features; pass at least one file of vectors"):
        materialise(neighbours, [], tmp_path / "none")


@pytest.mark.parametrize(
    ("of_edges", "of_vectors", "expected"), [(5, 7, 7), (9, 7, 9), (None, 7, None), (9, None, None)]
)
def test_it_has_seen_whatever_its_parts_have_seen(neighbours, tmp_path, of_edges, of_vectors, expected):
    made = materialise(replace(neighbours, until_ms=of_edges), [vectors("a", 3, of_vectors)], tmp_path / "m")
    assert open_neighbourhoods(tmp_path / "m").until_ms == made.until_ms == expected
