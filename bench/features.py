"""Features for any bundle: real pins and vectors where the bundle carries them, seeded random ones elsewhere."""

from __future__ import annotations

import io

import numpy as np

from feature_client.groups import Categorical, Embedding, EmbeddingSpace, FeatureGroup, SequenceGroup
from feature_client.store import Store
from feature_client.writer import write_rows, write_sequences
from model_store.bundle import EMBEDDINGS, Bundle

#: How many pins a bundle without embeddings gets.
PINS = 2_000


async def fill(store: Store, bundle: Bundle, users: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Write a row of every group of the bundle for every pin and user, and a full sequence for every user.

    Args:
        store: a started store.
        bundle: its `embeddings.npz` gives the pins and their vectors, if it has one.
        users: how many; their ids are 1..users.
        seed: of everything that is drawn.

    Returns:
        uint64[users] and uint64[P], the ids of users and pins.
    """
    rng = np.random.default_rng(seed)
    user_ids = np.arange(1, users + 1, dtype=np.uint64)
    pin_ids, vectors = _pins(bundle)
    for group in bundle.manifest.groups:
        ids, known = (pin_ids, vectors) if group.entity == "pin" else (user_ids, None)
        await write_rows(store, group, ids, _rows(group, len(ids), known, rng))
    if (sequence := bundle.manifest.sequence) is not None:
        events = _events(sequence, users * sequence.length_max, pin_ids, rng)
        await write_sequences(store, sequence, user_ids, events, np.arange(users + 1) * sequence.length_max)
    return user_ids, pin_ids


def _pins(bundle: Bundle) -> tuple[np.ndarray, np.ndarray | None]:
    if EMBEDDINGS not in bundle.files:
        return np.arange(1, PINS + 1, dtype=np.uint64), None
    with np.load(io.BytesIO(bundle.files[EMBEDDINGS]), allow_pickle=False) as archive:
        return archive["pin_ids"], archive["vectors"]


def _rows(group: FeatureGroup, count: int, vectors: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Return structured[count]; scalars in [0, 1), any code of a categorical, unit vectors."""
    rows = np.zeros(count, group.dtype)
    for field in group.fields:
        match field:
            case Embedding(name=name, space=space):
                fits = vectors is not None and vectors.shape == (count, space.dim) and vectors.dtype == space.dtype
                rows[name] = vectors if fits else _unit_vectors(space, count, rng)
            case Categorical(name=name, cardinality=cardinality):
                rows[name] = rng.integers(cardinality, size=count)
            case _:
                rows[field.name] = rng.random(count)
    return rows


def _unit_vectors(space: EmbeddingSpace, count: int, rng: np.random.Generator) -> np.ndarray:
    values = rng.normal(size=(count, space.dim))
    stored = values / np.linalg.norm(values, axis=1, keepdims=True) / space.scale
    if space.dtype == "int8":
        stored = np.rint(stored).clip(-127, 127)
    cast: np.ndarray = stored.astype(space.dtype)
    return cast


def _events(group: SequenceGroup, count: int, pin_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    events = np.zeros(count, group.dtype)
    events["pin_id"] = rng.choice(pin_ids, count)
    events["time_ms"] = np.arange(count) * 1_000
    events["action"] = rng.integers(len(group.actions), size=count)
    events["surface"] = rng.integers(len(group.surfaces), size=count)
    return events
