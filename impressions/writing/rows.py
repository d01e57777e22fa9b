"""The rows of the log as the server hands them over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from model_store.exploration.explorer import Explorer


class ScoredPins(Protocol):
    """The scores of a request's N candidates, and the order of the K that were returned."""

    @property
    def top(self) -> int:
        """K."""

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """Where `order`, `utilities`, `probabilities` and `party_utilities` begin; each of them has no gaps."""

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
        policy: how its surface explores; asked for propensities on the log's thread.
    """

    explorer: str
    seed: int
    arm: str | None
    policy: Explorer


class AnsweredRequest(NamedTuple):
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


class RecordedAction(NamedTuple):
    """One action that a server accepted: a row of `ACTIONS`, in its order. There may be 10,000 in a call."""

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
        actions: gives them; called on the log's thread, which rests now and then while it takes them.
    """

    count: int
    actions: Callable[[], Iterable[RecordedAction]]


@dataclass(frozen=True, slots=True)
class SeenReport:
    """What a user looked at: positions, uint32[S], of one answer. The user is None if the frontend did not say."""

    request_id: int
    received_ms: int
    positions: np.ndarray
    user_id: int | None = None
