from __future__ import annotations

import numpy as np
import pytest

from feature_client.groups import EmbeddingSpace
from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.alignment import Limits, align, aligned
from ranker.errors import DatasetError


def space(name: str, dim: int = 8) -> EmbeddingSpace:
    return EmbeddingSpace(name=name, version=1, dim=dim, dtype="float32")


def vectors(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((count, dim))
    unit: np.ndarray = made / np.linalg.norm(made, axis=1, keepdims=True)
    return unit.astype(np.float32)


def embeddings(held: np.ndarray, name: str, first: int = 0) -> PinEmbeddings:
    return PinEmbeddings(np.arange(first, first + len(held), dtype=np.uint64), held, space(name, held.shape[1]))


def turned(held: np.ndarray, dim: int | None = None, seed: int = 5) -> np.ndarray:
    width = dim or held.shape[1]
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]
    made: np.ndarray = held @ rotation[: held.shape[1]]
    return made.astype(np.float32)


def test_a_rotation_is_found_and_undone_exactly():
    new = embeddings(vectors(200), "new")
    old = embeddings(turned(new.vectors), "old")
    found = align(new, old)
    assert found.mean_cosine == pytest.approx(1, abs=1e-6)
    assert found.moved_share == 0
    assert found.exceeds(Limits()) == []
    refreshed = aligned(new, found.rotation, old.space)
    assert refreshed.space == old.space
    assert np.allclose(refreshed.vectors, old.vectors, atol=1e-6)


def test_fewer_dimensions_are_rotated_into_more_and_not_the_other_way():
    new = embeddings(vectors(200, 6), "new")
    old = embeddings(turned(new.vectors, 8), "old")
    found = align(new, old)
    assert found.mean_cosine == pytest.approx(1, abs=1e-6)
    assert aligned(new, found.rotation, old.space).vectors.shape == (200, 8)
    with pytest.raises(DatasetError, match="a rotation into the 6 of new@1 would lose some; train with 6"):
        align(old, new)


def test_pins_that_moved_are_counted():
    new = vectors(400)
    old = turned(new)
    old[:60] = turned(vectors(60, seed=9))
    found = align(embeddings(new, "new"), embeddings(old, "old"))
    assert found.moved_share == pytest.approx(60 / 400, abs=0.01)
    assert found.exceeds(Limits(mean_cosine_min=0.5, moved_share_max=0.2)) == []
    (beyond,) = found.exceeds(Limits(mean_cosine_min=0.5, moved_share_max=0.1))
    assert beyond == "15.0% of the pins have a cosine below 0.9, more than 10.0%"
    assert len(found.exceeds(Limits())) == 2


def test_vectors_that_have_nothing_in_common_are_not_flattered_by_the_rotation_that_was_fitted_to_them():
    # A rotation of 32 dimensions that is judged on the 300 pins that it was fitted to gives them a mean of 0.3.
    new, old = embeddings(vectors(300, 32), "new"), embeddings(vectors(300, 32, seed=1), "old")
    found = align(new, old)
    own = np.sum(aligned(new, found.rotation, old.space).vectors * old.vectors, axis=1).mean()
    assert own > 0.2
    assert abs(found.mean_cosine) < 0.03


def test_pins_without_a_vector_in_both_are_left_out_and_counted():
    new = vectors(200)
    old = turned(new)
    new[:20] = 0
    found = align(embeddings(new, "new"), embeddings(old[:150], "old"))
    assert (found.shared, found.new, found.gone) == (130, 50, 20)
    assert found.mean_cosine == pytest.approx(1, abs=1e-6)


def test_too_few_shared_pins_are_no_ground_for_a_rotation():
    new = embeddings(vectors(100), "new")
    with pytest.raises(DatasetError, match=r"63 pins have a vector both in .* needs 64; are both of the same pins\?"):
        align(new, embeddings(turned(new.vectors), "old", first=37))


def test_vectors_are_not_rotated_into_whole_numbers():
    new = embeddings(vectors(100), "new")
    with pytest.raises(DatasetError, match="stores int8"):
        aligned(new, np.eye(8), EmbeddingSpace(name="old", version=1, dim=8, dtype="int8", scale=0.1))


def test_vectors_of_one_space_are_judged_without_a_rotation():
    old = embeddings(vectors(30), "same")
    found = align(embeddings(turned(old.vectors), "same"), old)
    assert np.array_equal(found.rotation, np.eye(8))
    assert found.mean_cosine < 0.5  # a rotation would have brought them together
    assert align(old, old).mean_cosine == pytest.approx(1)
