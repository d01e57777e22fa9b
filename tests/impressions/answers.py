"""Answers as a server hands them to the log: their utilities and order follow from their parts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from impressions.writing.rows import AnsweredRequest, Constants
from kernels.native.library import address

CONSTANTS = Constants(
    surface="home",
    model="toy@1",
    model_digest="d" * 64,
    utility_digest="u" * 64,
    heads=("save", "click", "hide"),
    parties=("pinner", "creator"),
    attributes=("pin.creator_tail",),
)
WEIGHTS = np.array([1.0, 0.3])


@dataclass(frozen=True, slots=True)
class ToyScores:
    order: np.ndarray
    utilities: np.ndarray
    probabilities: np.ndarray
    party_utilities: np.ndarray

    @property
    def top(self) -> int:
        return len(self.order)

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        order, utilities = address(self.order), address(self.utilities)
        return order, utilities, address(self.probabilities), address(self.party_utilities)


def answered(request_id: int, pins: int = 5, **changes: Any) -> AnsweredRequest:
    """Return an answer whose numbers follow from its id."""
    random = np.random.default_rng(request_id)
    probabilities = random.random((pins, 3), np.float32)
    parties = probabilities.astype(np.float64) @ random.normal(size=(3, 2))
    utilities = (parties[:, 0] * WEIGHTS[0] + parties[:, 1] * WEIGHTS[1]).astype(np.float32)
    fields: dict[str, Any] = {
        "request_id": request_id,
        "time_ms": int(time.time() * 1_000),
        "user_id": request_id % 7 + 1,
        "label": "stable",
        "constants": CONSTANTS,
        "degradation": {},
        "party_weights": WEIGHTS,
        "pin_ids": random.integers(1, 1 << 62, pins, np.uint64),
        "scores": ToyScores(np.argsort(-utilities, kind="stable"), utilities, probabilities, parties),
        "attribute_values": random.random((1, pins)),
    }
    return AnsweredRequest(**{**fields, **changes})
