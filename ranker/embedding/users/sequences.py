"""Users' actions as sequences, oldest first, and the windows of them that a network reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranker.data.actions import CLOSEUPS, ActionLog
from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.graph.edges import Edges
from ranker.errors import DatasetError

_DAY_S = 86_400.0
#: What may repeat in what people do, in seconds: parts of a day, of a week, of a year.
PERIODS_S = tuple(_DAY_S * days for days in (0.25, 0.5, 1, 3.5, 7, 365.25 / 12, 365.25 / 4, 365.25))
#: Numbers that describe the time of an action.
TIME_NUMBERS = 2 * len(PERIODS_S) + 1
#: Of the logarithm of a gap in seconds; a year is 17.3.
_GAP_SCALE = 1 / 8


@dataclass(frozen=True, slots=True)
class PinRows:
    """What is known of pins: of each, its row in the network's table, and its given vector.

    Attributes:
        rows: int64[P], counted from 1; 0 for a pin that was not known in training.
        vectors: float16[P, D], zeros for a pin without one; D is 0 for networks that read none.
    """

    rows: np.ndarray
    vectors: np.ndarray

    @staticmethod
    def of(pin_ids: np.ndarray, known_ids: np.ndarray, vectors: PinEmbeddings | None) -> PinRows:
        """Look up uint64[P] pins among those of a table, uint64[K] ascending, and among given vectors."""
        place = np.searchsorted(known_ids, pin_ids)
        rows = np.zeros(len(pin_ids), np.int64)
        if len(known_ids):
            found = known_ids[place.clip(max=len(known_ids) - 1)] == pin_ids
            rows[found] = place[found] + 1
        given = np.zeros((len(pin_ids), 0), np.float16) if vectors is None else vectors.of(pin_ids)
        return PinRows(rows, given)

    @property
    def readable(self) -> np.ndarray:
        """bool[P], the pins of which anything is known."""
        found: np.ndarray = (self.rows > 0) | self.vectors.any(axis=1)
        return found


@dataclass(frozen=True, slots=True)
class Sequences:
    """The actions of all users.

    Attributes:
        splits: int64[U + 1]; user u's actions are those from `splits[u]` to `splits[u + 1]`, oldest first.
        events: int64[E], the number of each action in the log; ascending for each user.
        pins: int64[E], positions of pins.
        actions: uint8[E].
        liked: bool[E], whether the action shows that the user liked the pin.
        time_ms: int64[E]; None for data that has an order and no times.
    """

    splits: np.ndarray
    events: np.ndarray
    pins: np.ndarray
    actions: np.ndarray
    liked: np.ndarray
    time_ms: np.ndarray | None

    @staticmethod
    def of_log(log: ActionLog, readable: np.ndarray, before_ms: int, *, timed: bool) -> Sequences:
        """Return the actions strictly before a time on pins that are readable, bool[P]."""
        events = log.by_user[(log.by_user < log.before(before_ms)) & readable[log.pin[log.by_user]]]
        counts = np.bincount(log.user[events], minlength=len(log.user_ids))
        action = log.action[events]
        return Sequences(
            np.concatenate([[0], np.cumsum(counts)]),
            events,
            log.pin[events],
            action,
            log.schema.affinities[action] > 0,
            log.time_ms[events] if timed else None,
        )

    @property
    def users(self) -> np.ndarray:
        """int64[E], the user of each action."""
        return np.repeat(np.arange(len(self.splits) - 1), np.diff(self.splits))

    def stops(self, users: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Return int64[N]: for int64[N] users, the place behind their actions that the log numbers below int64[N]."""
        # One ascending number for user and event.
        apart = int(max(self.events.max(initial=0), before.max(initial=0))) + 1
        found: np.ndarray = np.searchsorted(self.users * apart + self.events, users * apart + before)
        return found


@dataclass(frozen=True, slots=True)
class Windows:
    """Parts of sequences as the rows of arrays, the oldest action first, and zeros behind the newest.

    A later action is to the right of an earlier one, so a causal mask also hides what is behind the newest.

    Attributes:
        rows: int64[B, L], of the table.
        vectors: float32[B, L, D].
        actions: int64[B, L].
        times: float32[B, L, TIME_NUMBERS]; None for data without times.
        lengths: int64[B].
    """

    rows: np.ndarray
    vectors: np.ndarray
    actions: np.ndarray
    times: np.ndarray | None
    lengths: np.ndarray


def ordered_log(edges: Edges) -> ActionLog:
    """Return lists of pins as a log: the contexts are its users, and their pins are in the order of the lists.

    The log has no times: an action's place in its list stands in their stead, and says only what came before it.

    Raises:
        DatasetError: the edges cannot be read, or there are none.
    """
    contexts, pins = zip((nothing := np.zeros(0, np.uint64), nothing), *edges.batches(), strict=True)
    user_ids, user = np.unique(np.concatenate(contexts), return_inverse=True)
    pin_ids, pin = np.unique(np.concatenate(pins), return_inverse=True)
    if not len(user):
        raise DatasetError("the lists hold no pins")
    by_user = np.argsort(user, kind="stable")
    splits = np.concatenate([[0], np.cumsum(np.bincount(user))])
    place = np.empty(len(user), np.int64)
    place[by_user] = np.arange(len(user)) - np.repeat(splits[:-1], np.diff(splits))
    order = np.argsort(place, kind="stable")
    user, pin = user[order], pin[order]
    return ActionLog(
        schema=CLOSEUPS,
        user_ids=user_ids,
        pin_ids=pin_ids,
        user=user,
        pin=pin,
        time_ms=place[order],
        labels=np.ones((len(user), 1), bool),
        action=np.zeros(len(user), np.uint8),
        by_user=np.argsort(user, kind="stable"),
        user_splits=splits,
    )


def windows(sequences: Sequences, pins: PinRows, first: np.ndarray, stop: np.ndarray, width: int) -> Windows:
    """Read windows.

    Args:
        sequences: the actions.
        pins: what is known of their pins.
        first: int64[B], the first action of each window.
        stop: int64[B], the action after its last; of the same user.
        width: number of columns L, at least the length of the longest window.
    """
    lengths = stop - first
    place = first[:, None] + np.arange(width)
    inside = place < stop[:, None]
    place = np.where(inside, place, 0)
    pin = sequences.pins[place]
    return Windows(
        np.where(inside, pins.rows[pin], 0),
        np.where(inside[..., None], pins.vectors[pin], np.float16(0)).astype(np.float32),
        np.where(inside, sequences.actions[place], 0).astype(np.int64),
        None if sequences.time_ms is None else _time_numbers(sequences.time_ms[place], inside),
        lengths,
    )


def _time_numbers(time_ms: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Describe times by what came before: the gap to the previous action, and the phases of periods."""
    time_s = time_ms / 1e3
    gap_s = np.diff(time_s, axis=1, prepend=time_s[:, :1])
    gap = np.log1p(np.maximum(gap_s, 0)) * _GAP_SCALE
    # In float64: a float32 of the Unix time is a minute off.
    phase = (time_s[..., None] / np.array(PERIODS_S)) % 1.0 * (2 * np.pi)
    numbers = np.concatenate([gap[..., None], np.sin(phase), np.cos(phase)], axis=-1)
    return np.where(inside[..., None], numbers, 0.0).astype(np.float32)
