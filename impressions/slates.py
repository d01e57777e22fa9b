"""Logged answers with their outcomes, as plain arrays: what tuning, evaluation and training read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

#: The arrays of `Slates` with an item per request, and with one per shown pin.
_OF_REQUESTS = ("request_ids", "user_ids", "time_ms", "arms", "party_weights", "order_propensities", "candidates")
_OF_PINS = (
    *("pin_ids", "places", "probabilities", "party_utilities", "attribute_values", "utilities", "propensities"),
    *("labels", "seen"),
)


@dataclass(frozen=True, slots=True)
class Slates:
    """R answered requests of one surface and one model, and what became of their N shown pins.

    Rows are in the order of each answer; request r has the rows `row_splits[r]:row_splits[r + 1]`, best first.

    Attributes:
        surface: the surface of all of them.
        model: "name@version" of the model that scored all of them.
        utility_digest: the digest of the utility table that was in force for all of them.
        heads: the H heads of `probabilities`.
        parties: the P parties of `party_utilities`.
        attributes: the A pin attributes of `attribute_values`, such as "pin.creator_tail".
        actions: the B actions of `labels`.
        request_ids: uint64[R].
        user_ids: uint64[R].
        time_ms: int64[R], Unix time.
        arms: str[R], the arm of the explorer that ordered it; "" for the tuned order.
        party_weights: float64[R, P], those that the order followed.
        order_propensities: float64[R], the probability of the whole order under the logging policy.
        candidates: int64[R], how many the request had; its answer may have left some out.
        row_splits: int64[R + 1].
        pin_ids: uint64[N].
        places: uint32[N], each pin's position in the request. Equal utilities keep the order of these.
        probabilities: float32[N, H], calibrated.
        party_utilities: float64[N, P].
        attribute_values: float64[N, A].
        utilities: float32[N].
        propensities: float64[N], the probability of the pin at its position under the logging policy.
        labels: bool[N, B], whether the user took the action on the pin within the join's window.
        seen: bool[N], whether the user looked at the pin: as reported; all True for a request without a report.
    """

    surface: str
    model: str
    utility_digest: str
    heads: tuple[str, ...]
    parties: tuple[str, ...]
    attributes: tuple[str, ...]
    actions: tuple[str, ...]
    request_ids: np.ndarray
    user_ids: np.ndarray
    time_ms: np.ndarray
    arms: np.ndarray
    party_weights: np.ndarray
    order_propensities: np.ndarray
    candidates: np.ndarray
    row_splits: np.ndarray
    pin_ids: np.ndarray
    places: np.ndarray
    probabilities: np.ndarray
    party_utilities: np.ndarray
    attribute_values: np.ndarray
    utilities: np.ndarray
    propensities: np.ndarray
    labels: np.ndarray
    seen: np.ndarray

    @property
    def requests(self) -> int:
        return len(self.request_ids)

    @property
    def positions(self) -> np.ndarray:
        """int64[N], each row's position in its answer, from 0."""
        starts = np.repeat(self.row_splits[:-1], np.diff(self.row_splits))
        positions: np.ndarray = np.arange(len(self.pin_ids)) - starts
        return positions

    def where(self, kept: np.ndarray) -> Slates:
        """Return some of the requests, bool[R], in the same order."""
        counts = np.diff(self.row_splits)
        rows = np.repeat(kept, counts)
        return replace(
            self,
            row_splits=np.concatenate([[0], np.cumsum(counts[kept])]),
            **{name: getattr(self, name)[kept] for name in _OF_REQUESTS},
            **{name: getattr(self, name)[rows] for name in _OF_PINS},
        )
