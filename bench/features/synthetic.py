"""Generate features for any bundle: real pins and vectors if the bundle has them, and seeded random values."""

from __future__ import annotations

import io

import numpy as np

from feature_client.bulk.write import write_rows, write_sequences
from feature_client.groups import Categorical, Embedding, EmbeddingSpace, FeatureGroup, SequenceGroup
from feature_client.stores.store import Store
from model_store.bundle.files import EMBEDDINGS, Bundle

#: Number of pins for a bundle without embeddings.
PINS = 2_000
_CHUNK = 50_000


async def fill(
    store: Store, bundle: Bundle, users: int, seed: int, pins: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Write a row of every group of the bundle for every pin and user, and a full sequence for every user.

    Args:
        store: a started feature store.
        bundle: a bundle; its `embeddings.npz`, if any, provides pins and vectors.
        users: number of users; their ids are 1 to `users`.
        seed: seed of all random values.
        pins: number of generated pins, drawn for sequences by a power law, the first most often; None means the pins of
            the bundle.

    Returns:
        uint64[users] and uint64[P], the ids of users and pins.
    """
    rng = np.random.default_rng(seed)
    user_ids = np.arange(1, users + 1, dtype=np.uint64)
    pin_ids, vectors = _pins(bundle) if pins is None else (np.arange(1, pins + 1, dtype=np.uint64), None)
    popularity = None if pins is None else power_law(pins)
    for group in bundle.manifest.groups:
        ids, known = (pin_ids, vectors) if group.entity == "pin" else (user_ids, None)
        for start in range(0, len(ids), _CHUNK):
            some = slice(start, start + _CHUNK)
            own = None if known is None else known[some]
            await write_rows(store, group, ids[some], _rows(group, len(ids[some]), own, rng))
    if (sequence := bundle.manifest.sequence) is not None:
        events = _events(sequence, users * sequence.length_max, pin_ids, popularity, rng)
        await write_sequences(store, sequence, user_ids, events, np.arange(users + 1) * sequence.length_max)
    return user_ids, pin_ids


def _pins(bundle: Bundle) -> tuple[np.ndarray, np.ndarray | None]:
    if EMBEDDINGS not in bundle.files:
        return np.arange(1, PINS + 1, dtype=np.uint64), None
    with np.load(io.BytesIO(bundle.files[EMBEDDINGS]), allow_pickle=False) as archive:
        return archive["pin_ids"], archive["vectors"]


def _rows(group: FeatureGroup, count: int, vectors: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Return random rows, structured[count]: scalars in [0, 1), codes of categoricals, unit vectors."""
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


def power_law(count: int, exponent: float = 0.8) -> np.ndarray:
    """Return the power-law shares of pins by popularity, the most popular first, float64[count]."""
    weights = np.arange(1, count + 1) ** -exponent
    shares: np.ndarray = weights / weights.sum()
    return shares


def _events(
    group: SequenceGroup, count: int, pin_ids: np.ndarray, popularity: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    events = np.zeros(count, group.dtype)
    events["pin_id"] = rng.choice(pin_ids, count, p=popularity)
    events["time_ms"] = np.arange(count) * 1_000
    events["action"] = rng.integers(len(group.actions), size=count)
    events["surface"] = rng.integers(len(group.surfaces), size=count)
    return events
