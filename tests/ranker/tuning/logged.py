"""A store with a tiny model, and a joined dataset of the answers that it gave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from model_store.model.utility import load_utility
from model_store.registry.store import ModelStore, open_model_store
from tests import tiny
from tests.impressions.logs import Row, action, impression, log_of

START_MS = 1_796_000_000_000


def publish_tiny(folder: Path, version: int = 1, changes: Mapping[str, Any] = MappingProxyType({})) -> ModelStore:
    """Publish a version of the tiny model into `folder/models`; `changes` are those of `tiny.write_tiny_bundle`."""
    tiny.write_tiny_bundle(folder / f"bundle-{version}", version, **changes)
    store = open_model_store(folder / "models")
    store.publish(folder / f"bundle-{version}")
    return store


def join_answers(
    folder: Path, requests: int = 120, model: str = "tiny@1", seed: int = 0, users: int = 40, whole: int = 0,
    **fields: Any,
) -> Path:  # fmt: skip
    """Write a joined dataset of answers of 8 pins on home, with random scores; some pins were saved.

    The first `whole` answers hold all candidates of their requests; the others left 3 out, unless `fields` say so.
    """
    rng = np.random.default_rng(seed)
    table = load_utility(tiny.UTILITY.encode(), tiny.manifest())
    impressions: list[Row] = []
    actions: list[Row] = []
    for number in range(1, requests + 1):
        probabilities = rng.beta(0.5, 3, (8, 2)).astype(np.float32)
        popularity = rng.random(8).astype(np.float32)
        columns = dict.fromkeys(table.attributes, popularity)
        parties = table.party_utilities_of_rows("home", probabilities, columns)
        utilities = table.combine("home", parties)
        order = np.argsort(-utilities, kind="stable")
        user, time_ms = number % users + 1, START_MS + 1_000 * number
        pins = rng.choice(50, 8, replace=False) + 1
        answer: Row = {
            "model": model, "attributes": ["pin.popularity"], "utilities": utilities[order].tolist(),
            "probabilities": probabilities[order].ravel().tolist(), "attribute_values": popularity[order].tolist(),
            "party_utilities": parties[order].ravel().tolist(), **({"candidates": 8} if number <= whole else {}),
            **fields,
        }  # fmt: skip
        impressions.append(impression(number, time_ms, user, pins[order].tolist(), **answer))
        saved = np.flatnonzero(rng.random(8) < probabilities[order, 0])
        actions += [
            action(100 * number + place, user, int(pins[order][place]), time_ms + 10, request_id=number, position=place)
            for place in saved.tolist()
        ]
    join_log(log_of(impressions, actions), folder, Wanted(Window(after_ms=60_000, skew_ms=0)))
    return folder
