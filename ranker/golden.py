"""Golden requests of invented users over real pins.

Datasets like MovieLens must not be passed on, so a bundle carries nobody's history: the users, their actions and their
rows are drawn from a seed. Pin rows are aggregates over many users.
"""

from __future__ import annotations

import numpy as np

from feature_client.codec import Rows, State
from feature_client.fetcher import Fetched
from feature_client.groups import FeatureGroup, SequenceGroup
from model_store.manifest import Manifest
from ranker.actions import ACTIONS
from ranker.features import PIN_GROUP, USER_GROUP, Groups

#: Candidates, actions as a share of the sequence length, surface; the last user is unknown to the store.
_SHAPES = ((12, 1.0, "home"), (8, 0.4, "related"), (9, 0.0, "home"), (7, 0.05, "related"))
_TIME_MS = 1_600_000_000_000


def golden_inputs(manifest: Manifest, pin_ids: np.ndarray, pins: Rows, seed: int) -> list[tuple[Fetched, str]]:
    """Invent a few requests that reach every path: empty and full sequences, both surfaces, missing rows.

    Args:
        manifest: whose groups and sequence length to fill.
        pin_ids: uint64[P].
        pins: those pins' rows of `Groups.pin`.
        seed: of everything drawn.
    """
    rng = np.random.default_rng([seed, 1])
    groups = Groups.served_by(manifest)
    requests = []
    for candidates, fill, surface in _SHAPES:
        known = surface == "home" or fill > 0.1
        actions = round(fill * manifest.sequence_length)
        requests.append((_invent(rng, groups, pin_ids, pins, candidates, actions, surface, known), surface))
    return requests


def _invent(
    rng: np.random.Generator,
    groups: Groups,
    pin_ids: np.ndarray,
    pins: Rows,
    candidates: int,
    actions: int,
    surface: str,
    known: bool,
) -> Fetched:
    wanted = candidates + actions + (surface == "related")
    place = rng.integers(len(pin_ids), size=wanted)
    distinct, index = np.unique(place, return_inverse=True)
    rows, states = pins.rows[distinct], pins.states[distinct].copy()
    lost = index[candidates - 1]
    rows[lost], states[lost] = groups.pin.default_row, State.MISSING
    events = np.zeros(actions, SequenceGroup.dtype)
    events["pin_id"] = pin_ids[place[candidates : candidates + actions]]
    events["time_ms"] = _TIME_MS - np.cumsum(rng.integers(1_000, 3_600_000, actions))
    events["action"] = rng.integers(len(ACTIONS), size=actions)
    return Fetched(
        user={USER_GROUP: _invent_user(rng, groups.user, known)},
        pins={PIN_GROUP: Rows(rows, states)},
        candidate_index=index[:candidates],
        events=events,
        event_index=index[candidates : candidates + actions],
        query_index=int(index[-1]) if surface == "related" else None,
        sequence_state=State.PRESENT,
    )


def _invent_user(rng: np.random.Generator, group: FeatureGroup, known: bool) -> Rows:
    rows = np.zeros(1, group.dtype)
    rows[0] = group.default_row
    if known:
        vector = rng.normal(size=rows["embedding"].shape)
        rows["embedding"] = vector / np.linalg.norm(vector)
        rows["log_actions"] = np.log1p(rng.integers(1, 500))
        for name in ("save_share", "like_share", "hide_share"):
            rows[name] = rng.uniform(0.05, 0.6)
    return Rows(rows, np.array([State.PRESENT if known else State.MISSING], np.uint8))
