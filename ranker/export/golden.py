"""Golden requests of synthetic users over pins with synthetic counts.

Datasets such as MovieLens must not be redistributed, so a bundle contains only what was learned from them. Users, their
actions and all rows are drawn from a seed; only the pin vectors are real, and the bundle carries these anyway.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from feature_client.codec import Rows, RowState
from feature_client.features import FetchedFeatures
from feature_client.groups import Embedding, FeatureGroup, Scalar, SequenceGroup
from model_store.bundle.manifest import Manifest
from ranker.data.embeddings import PinEmbeddings
from ranker.data.features import PIN_GROUP, USER_GROUP, Groups

#: Number of candidates, actions as a share of the sequence length, surface; the last user is unknown to the store.
_SHAPES = ((12, 1.0, "home"), (8, 0.4, "related"), (9, 0.0, "home"), (7, 0.05, "related"))
_TIME_MS = 1_600_000_000_000


def golden_inputs(manifest: Manifest, embeddings: PinEmbeddings, seed: int) -> list[tuple[FetchedFeatures, str]]:
    """Generate a few requests that cover every path: empty and full sequences, both surfaces, missing rows.

    Args:
        manifest: gives the groups and the sequence length.
        embeddings: the pins and their vectors.
        seed: random seed.
    """
    rng = np.random.default_rng([seed, 1])
    groups = Groups.served_by(manifest)
    requests = []
    for candidates, fill, surface in _SHAPES:
        known = surface == "home" or fill > 0.1
        actions = round(fill * manifest.sequence_length)
        fetched = _invent(rng, groups, embeddings, candidates, actions, surface, known)
        user = {one.group.name: _invent_further(rng, one.group, embeddings, fill, known) for one in groups.further}
        requests.append((replace(fetched, user={**fetched.user, **user}), surface))
    return requests


def _invent(
    rng: np.random.Generator,
    groups: Groups,
    embeddings: PinEmbeddings,
    candidates: int,
    actions: int,
    surface: str,
    known: bool,
) -> FetchedFeatures:
    wanted = candidates + actions + (surface == "related")
    place = rng.integers(len(embeddings.pin_ids), size=wanted)
    distinct, index = np.unique(place, return_inverse=True)
    rows = _invent_rows(rng, groups.pin, embeddings.vectors[distinct])
    states = np.zeros(len(rows), np.uint8)
    lost = index[candidates - 1]
    rows[lost], states[lost] = groups.pin.default_row, RowState.MISSING
    events = np.zeros(actions, SequenceGroup.dtype)
    events["pin_id"] = embeddings.pin_ids[place[candidates : candidates + actions]]
    events["time_ms"] = _TIME_MS - np.cumsum(rng.integers(1_000, 3_600_000, actions))
    if groups.sequence is not None:
        events["action"] = rng.integers(len(groups.sequence.actions), size=actions)
    return FetchedFeatures(
        user={USER_GROUP: _invent_user(rng, groups.user, known)},
        pins={PIN_GROUP: Rows(rows[index], states[index])},
        candidates=candidates,
        events=events,
        has_query_pin=surface == "related",
        sequence_state=RowState.PRESENT,
        read_ms=_TIME_MS,
    )


def _invent_user(rng: np.random.Generator, group: FeatureGroup, known: bool) -> Rows:
    if not known:
        return Rows(np.array([group.default_row], group.dtype), np.array([RowState.MISSING], np.uint8))
    vector = rng.normal(size=(1, *group.dtype["embedding"].shape))
    return Rows(_invent_rows(rng, group, vector / np.linalg.norm(vector)), np.array([RowState.PRESENT], np.uint8))


def _invent_further(
    rng: np.random.Generator, group: FeatureGroup, embeddings: PinEmbeddings, fill: float, known: bool
) -> Rows:
    """Return a user's row of a further group: vectors of pins or of another space, and shares that add up to 1.

    Fields beyond a share `fill` of them keep their zeros, as they do for users with few interests.
    """
    rows, fields = np.array([group.default_row], group.dtype), group.fields
    if not known:
        return Rows(rows, np.array([RowState.MISSING], np.uint8))
    vectors = [field for field in fields if isinstance(field, Embedding)]
    held = max(1, round(fill * len(vectors)))
    for field in vectors[:held]:
        if field.space == embeddings.space:
            rows[field.name] = embeddings.vectors[rng.integers(len(embeddings.vectors))]
        else:
            vector = rng.normal(size=field.space.dim)
            rows[field.name] = vector / np.linalg.norm(vector)
    scalars = [field.name for field in fields if isinstance(field, Scalar)][:held]
    shares = np.sort(rng.dirichlet(np.ones(len(scalars))))[::-1]
    for name, share in zip(scalars, shares, strict=True):
        rows[name] = share
    return Rows(rows, np.array([RowState.PRESENT], np.uint8))


def _invent_rows(rng: np.random.Generator, group: FeatureGroup, vectors: np.ndarray) -> np.ndarray:
    """Return rows with the given vectors, and scalars in a realistic range."""
    rows = np.zeros(len(vectors), group.dtype)
    rows["embedding"] = vectors
    for field in group.fields:
        if isinstance(field, Scalar):
            counted = field.name == "log_actions"
            values = np.log1p(rng.integers(1, 3_000, len(rows))) if counted else rng.uniform(0, 0.6, len(rows))
            rows[field.name] = values
    return rows
