"""Rotates vectors of a new training into the space of an earlier one.

Trainings of one producer on slightly different data differ mostly by a rotation: dot products within a training hardly
change, but those between the two mean nothing. The rotation that fits the pins of both best is known in closed form
(orthogonal Procrustes; Schönemann, 1966). What it leaves over is how far the pins themselves have moved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feature_client.groups import EmbeddingSpace
from ranker.data.embeddings import PinEmbeddings
from ranker.errors import DatasetError

#: A vector counts as moved if its cosine with its earlier one is below this.
MOVED_BELOW = 0.9
#: Shared pins for each dimension that a rotation needs, so that it cannot fit noise.
_PINS_PER_DIMENSION = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a refresh may be from the vectors that it replaces.

    Attributes:
        mean_cosine_min: the least mean cosine of a pin's new vector with its old one.
        moved_share_max: the largest share of pins whose cosine is below `MOVED_BELOW`.
    """

    mean_cosine_min: float = 0.95
    moved_share_max: float = 0.1


@dataclass(frozen=True, slots=True)
class Alignment:
    """A rotation from one space into another, and how well it fits.

    Attributes:
        rotation: float64[D_new, D_old], with orthonormal rows.
        cosines: float64[K], of the shared pins' vectors. Each was turned by a rotation that was fitted without it.
        shared: the number K of pins that have a vector in both.
        new: the number of pins that have one in the new space only.
        gone: the number of pins that have one in the old space only.
    """

    rotation: np.ndarray
    cosines: np.ndarray
    shared: int
    new: int
    gone: int

    @property
    def mean_cosine(self) -> float:
        return float(self.cosines.mean())

    @property
    def moved_share(self) -> float:
        return float((self.cosines < MOVED_BELOW).mean())

    def exceeds(self, limits: Limits) -> list[str]:
        """Return what is beyond the limits; nothing if the refresh may replace the old vectors."""
        found = []
        if self.mean_cosine < limits.mean_cosine_min:
            found.append(f"the mean cosine is {self.mean_cosine:.3f}, below {limits.mean_cosine_min:g}")
        if self.moved_share > limits.moved_share_max:
            moved = f"{self.moved_share:.1%} of the pins have a cosine below {MOVED_BELOW:g}"
            found.append(f"{moved}, more than {limits.moved_share_max:.1%}")
        return found


def align(new: PinEmbeddings, old: PinEmbeddings, seed: int = 0) -> Alignment:
    """Find the rotation of new vectors into an old space; vectors of the same space stay as they are.

    Args:
        new: the vectors of the new training, or of the same network over a later graph.
        old: the vectors that it shall replace.
        seed: divides the shared pins into the two halves that judge each other's rotation.

    Raises:
        DatasetError: the new vectors have more dimensions, or too few pins have a vector in both.
    """
    if new.space.dim > old.space.dim:
        raise DatasetError(
            f"{new.space.ref} has {new.space.dim} dimensions, and a rotation into the {old.space.dim} of "
            f"{old.space.ref} would lose some; train with {old.space.dim}"
        )
    with_new, with_old = (embeddings.pin_ids[embeddings.vectors.any(axis=1)] for embeddings in (new, old))
    shared = np.intersect1d(with_new, with_old, assume_unique=True)
    same = new.space == old.space
    needed = 1 if same else 2 * _PINS_PER_DIMENSION * old.space.dim
    if len(shared) < needed:
        raise DatasetError(
            f"{len(shared):,} pins have a vector both in {new.space.ref} and in {old.space.ref}, and a rotation of "
            f"{old.space.dim} dimensions needs {needed:,}; are both of the same pins?"
        )
    before, after = _unit(new.of(shared)), _unit(old.of(shared))
    others = len(with_new) - len(shared), len(with_old) - len(shared)
    if same:
        return Alignment(np.eye(old.space.dim), np.sum(before * after, axis=1), len(shared), *others)
    order = np.random.default_rng(seed).permutation(len(shared))
    halves = order[::2], order[1::2]
    cosines = np.empty(len(shared))
    for fitted, judged in (halves, halves[::-1]):
        cosines[judged] = np.sum(before[judged] @ _rotation(before[fitted], after[fitted]) * after[judged], axis=1)
    rotation = _rotation(before, after)
    return Alignment(rotation, cosines, len(shared), *others)


def aligned(new: PinEmbeddings, rotation: np.ndarray, space: EmbeddingSpace) -> PinEmbeddings:
    """Return new vectors as vectors of the space into which a rotation turns them; their lengths stay.

    Raises:
        DatasetError: the space stores whole numbers, which vectors must be scaled for.
    """
    if space.dtype == "int8":
        raise DatasetError(f"{space.ref} stores int8, into which vectors cannot be rotated; align its float vectors")
    return PinEmbeddings(new.pin_ids, (new.vectors.astype(np.float64) @ rotation).astype(space.dtype), space)


def _rotation(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the matrix with orthonormal rows that brings K vectors as near to K others as any does."""
    left, _, right = np.linalg.svd(before.T @ after, full_matrices=False)
    found: np.ndarray = left @ right
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    found: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found
