"""Keeps a sample of recently answered requests; new model versions are tested on them before they serve."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from server.request.pipeline import Ranking, RankQuery

_KEPT = 64
_EVERY_S = 0.05
_ROWS_MAX = 32


@dataclass(frozen=True, slots=True)
class RecentRequest:
    """A request and its answer, cut to the first candidates.

    Attributes:
        pin_ids: uint64[N], the candidates.
        utilities: float32[N], in the same order.
        user_missing: whether the feature store had no row for the user, for the version that answered.
        pins_missing: how many of these candidates had no row, for the version that answered.
    """

    user_id: int
    pin_ids: np.ndarray
    surface: str
    query_pin_id: int | None
    query_vector: np.ndarray | None
    utilities: np.ndarray
    user_missing: bool
    pins_missing: int


class RecentRequests:
    """A ring buffer of requests, sampled at a bounded rate. Belongs to one event loop."""

    def __init__(self) -> None:
        self._kept: deque[RecentRequest] = deque(maxlen=_KEPT)
        self._noted_s = float("-inf")

    @property
    def seen(self) -> bool:
        """Whether any request has been answered."""
        return bool(self._kept)

    def note(self, query: RankQuery, ranking: Ranking, now_s: float) -> None:
        if now_s - self._noted_s < _EVERY_S:
            return
        self._noted_s = now_s
        self._kept.append(
            RecentRequest(
                query.user_id,
                query.pin_ids[:_ROWS_MAX].copy(),
                query.surface,
                query.query_pin_id,
                query.query_vector,
                ranking.scores.utilities[:_ROWS_MAX].copy(),
                bool(ranking.degradation.get("user_missing")),
                min(_ROWS_MAX, ranking.degradation.get("pins_missing", 0)),
            )
        )

    def latest(self, count: int) -> list[RecentRequest]:
        return list(self._kept)[-count:]
