"""The rows of the log as the server hands them over, and their conversion to Arrow, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from impressions.schema import ACTIONS, IMPRESSIONS, SEEN

#: So many requests are gathered between two chances for other threads to run.
_GATHERED = 8


class ScoredPins(Protocol):
    """The scores of a request's N candidates, and the order of the K that were returned."""

    @property
    def order(self) -> np.ndarray:
        """int64[K], positions in the request."""

    @property
    def utilities(self) -> np.ndarray:
        """float32[N]."""

    @property
    def probabilities(self) -> np.ndarray:
        """float32[N, H]."""

    @property
    def party_utilities(self) -> np.ndarray:
        """float64[N, P]."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What all answers of one model on one surface have in common.

    Attributes:
        attributes: names of the A pin attributes.
    """

    surface: str
    model: str
    model_digest: str
    utility_digest: str
    heads: tuple[str, ...]
    parties: tuple[str, ...]
    attributes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exploring:
    """How a request could explore.

    Attributes:
        explorer: the digest of the exploration table.
        seed: its seed.
        arm: the arm that ordered the answer; None if the tuned order was answered.
        propensities: gives the probability of the whole order, and float64[K] of each pin at its position; called on
            the log's thread.
    """

    explorer: str
    seed: int
    arm: str | None
    propensities: Callable[[], tuple[float, np.ndarray]]


@dataclass(frozen=True, slots=True)
class AnsweredRequest:
    """One answered request. The log reads it on its own thread, so nothing in it may change any more.

    Attributes:
        time_ms: when it was answered, Unix time in milliseconds.
        label: empty if the request named a version.
        degradation: fields of `pinrank.v1.Degradation`, without zeros.
        party_weights: float64[P], those that the order followed.
        pin_ids: uint64[N], the candidates.
        scores: their scores and order.
        attribute_values: float64[A, M], of the first M candidates, those that were scored.
        query_vector: float32[D], if the query is a vector.
        exploring: None if the request could not explore.
        features: gives the stored rows that were read; None if they are not logged. Called on the log's thread.
        features_bytes: the memory that they hold until then.
    """

    request_id: int
    time_ms: int
    user_id: int
    label: str
    constants: Constants
    degradation: Mapping[str, int]
    party_weights: np.ndarray
    pin_ids: np.ndarray
    scores: ScoredPins
    attribute_values: np.ndarray
    query_pin_id: int | None = None
    query_vector: np.ndarray | None = None
    exploring: Exploring | None = None
    features: Callable[[], bytes] | None = None
    features_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RecordedAction:
    """One action that a server accepted; see `ACTIONS`."""

    event_id: int
    user_id: int
    pin_id: int
    action: str
    surface: str
    time_ms: int
    received_ms: int
    request_id: int | None
    position: int | None


@dataclass(frozen=True, slots=True)
class RecordedActions:
    """The actions of one call.

    Attributes:
        count: how many there are.
        actions: gives them; called on the log's thread.
    """

    count: int
    actions: Callable[[], Sequence[RecordedAction]]


@dataclass(frozen=True, slots=True)
class SeenReport:
    """What a user looked at: positions, uint32[S], of one answer."""

    request_id: int
    received_ms: int
    positions: np.ndarray


def impressions_batch(requests: Sequence[AnsweredRequest], pause: Callable[[], None] = lambda: None) -> pa.RecordBatch:
    """Convert answered requests to a batch of `IMPRESSIONS`.

    Args:
        requests: at least one.
        pause: called after every few requests, so that other threads get the interpreter lock.
    """
    rows = [_gathered(request, pause if i % _GATHERED == 0 else None) for i, request in enumerate(requests)]
    counts = np.array([len(row.places) for row in rows])
    constants = [request.constants for request in requests]
    exploring = [request.exploring for request in requests]
    pause()

    def per_pin(name: str, width: np.ndarray | int = 1) -> pa.Array:
        return _lists(counts * width, [getattr(row, name).ravel() for row in rows])

    heads, parties, attributes = (
        np.array([len(getattr(c, name)) for c in constants]) for name in ("heads", "parties", "attributes")
    )
    columns = {
        "request_id": pa.array([r.request_id for r in requests], pa.uint64()),
        "time_ms": pa.array([r.time_ms for r in requests], pa.int64()),
        "user_id": pa.array([r.user_id for r in requests], pa.uint64()),
        "surface": _names([c.surface for c in constants]),
        "query_pin_id": pa.array([r.query_pin_id for r in requests], pa.uint64()),
        "query_vector": pa.array([r.query_vector for r in requests], pa.list_(pa.float32())),
        "label": _names([r.label for r in requests]),
        "model": _names([c.model for c in constants]),
        "model_digest": _names([c.model_digest for c in constants]),
        "utility_digest": _names([c.utility_digest for c in constants]),
        "degradation": pa.array(
            [[(name, int(value)) for name, value in r.degradation.items()] for r in requests],
            pa.map_(pa.string(), pa.uint32()),
        ),
        "candidates": pa.array([len(r.pin_ids) for r in requests], pa.uint32()),
        "heads": _name_lists([c.heads for c in constants]),
        "parties": _name_lists([c.parties for c in constants]),
        "attributes": _name_lists([c.attributes for c in constants]),
        "party_weights": _lists(parties, [r.party_weights for r in requests]),
        "explorer": _names([None if e is None else e.explorer for e in exploring]),
        "arm": _names([None if e is None else e.arm for e in exploring]),
        "explore_seed": pa.array([None if e is None else e.seed for e in exploring], pa.uint64()),
        "order_propensity": pa.array([row.order_propensity for row in rows], pa.float64()),
        "pin_ids": per_pin("pin_ids"),
        "places": per_pin("places"),
        "probabilities": per_pin("probabilities", heads),
        "party_utilities": per_pin("party_utilities", parties),
        "attribute_values": per_pin("attribute_values", attributes),
        "utilities": per_pin("utilities"),
        "propensities": per_pin("propensities"),
        "features": pa.array([None if r.features is None else r.features() for r in requests], pa.binary()),
    }
    return pa.record_batch(list(columns.values()), schema=IMPRESSIONS)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """One request's pins in the order of the answer."""

    pin_ids: np.ndarray
    places: np.ndarray
    probabilities: np.ndarray
    party_utilities: np.ndarray
    attribute_values: np.ndarray
    utilities: np.ndarray
    propensities: np.ndarray
    order_propensity: float


def _gathered(request: AnsweredRequest, pause: Callable[[], None] | None) -> _Gathered:
    if pause is not None:
        pause()
    scores, exploring = request.scores, request.exploring
    order = scores.order
    if exploring is None:
        order_propensity, propensities = 1.0, np.ones(len(order))
    else:
        order_propensity, propensities = exploring.propensities()
    return _Gathered(
        request.pin_ids[order],
        order.astype(np.uint32),
        scores.probabilities[order],
        scores.party_utilities[order],
        _of_order(request.attribute_values, order),
        scores.utilities[order],
        propensities,
        order_propensity,
    )


def _of_order(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return float64[K, A] of float64[A, M]; candidates from M on were trimmed, and have no values."""
    if order.max(initial=-1) < values.shape[1]:
        whole: np.ndarray = values.T[order]
        return whole
    found = np.full((len(order), len(values)), np.nan)
    scored = order < values.shape[1]
    found[scored] = values.T[order[scored]]
    return found


def actions_batch(calls: Sequence[RecordedActions]) -> pa.RecordBatch:
    """Convert the actions of calls to a batch of `ACTIONS`."""
    actions = [action for call in calls for action in call.actions()]
    named = {"action", "surface"}
    columns = [
        _names([getattr(a, field.name) for a in actions])
        if field.name in named
        else pa.array([getattr(a, field.name) for a in actions], field.type)
        for field in ACTIONS
    ]
    return pa.record_batch(columns, schema=ACTIONS)


def seen_batch(reports: Sequence[SeenReport]) -> pa.RecordBatch:
    """Convert reports to a batch of `SEEN`."""
    columns = [
        pa.array([r.request_id for r in reports], pa.uint64()),
        pa.array([r.received_ms for r in reports], pa.int64()),
        _lists(np.array([len(r.positions) for r in reports]), [r.positions for r in reports]),
    ]
    return pa.record_batch(columns, schema=SEEN)


def _lists(counts: np.ndarray, values: Sequence[np.ndarray]) -> pa.ListArray:
    """Return one list for each array; there must be one at least."""
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values)))


def _names(names: Sequence[str | None]) -> pa.DictionaryArray:
    return pa.array(names, pa.string()).dictionary_encode()


def _name_lists(lists: Sequence[tuple[str, ...]]) -> pa.ListArray:
    flat = [name for names in lists for name in names]
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum([len(names) for names in lists], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), _names(flat))
