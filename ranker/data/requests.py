"""Past interactions as requests: who asked and when, what the user had done before, and what the user did next.

A dataset of interactions has no requests. By convention, up to `PINS_MAX` consecutive actions of one user within one
time slice are the result of one request, which was made at the time of the first of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from ranker.data.actions import ActionLog
from ranker.errors import SettingError

PINS_MAX = 8

#: A request may start from a pin that received an action of at least this affinity: the user wants more like it.
QUERY_AFFINITY = 0.5

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Split:
    """The boundaries of the parts, as shares of all events in order of time, and the number of slices of each part.

    A slice models the daily refresh of stored features: rows are as of the start of their slice.
    """

    producer_until: float = 0.60
    train_until: float = 0.80
    validation_until: float = 0.90
    train_slices: int = 24
    validation_slices: int = 12
    test_slices: int = 12

    def __post_init__(self) -> None:
        cuts = (0.0, self.producer_until, self.train_until, self.validation_until, 1.0)
        if any(later <= earlier for earlier, later in pairwise(cuts)):
            raise SettingError(f"the boundaries of the split must rise from 0 to 1, but are {cuts}")


@dataclass(frozen=True, slots=True)
class Slice:
    """A time span with `start_ms` included and `stop_ms` excluded, numbered across all parts."""

    number: int
    start_ms: int
    stop_ms: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as positions in the log; it copies no values.

    Attributes:
        user: position in `log.user_ids`.
        time_ms: time of the request, Unix time in milliseconds.
        chosen: int64[K], numbers of the events that resulted from it.
        history: int64[<= L], numbers of the user's newest events strictly before it, newest first.
        activity: number of the user's events strictly before it, including those beyond `history`.
        query_pin: position in `log.pin_ids` of the pin that it starts from; None for a request from home.
    """

    user: int
    time_ms: int
    chosen: np.ndarray
    history: np.ndarray
    activity: int
    query_pin: int | None

    @property
    def surface(self) -> str:
        return "home" if self.query_pin is None else "related"


def producer_until_ms(log: ActionLog, split: Split) -> int:
    """Return the end of the window for fitting embeddings, exclusive, as Unix time in milliseconds."""
    return _time_at(log.time_ms, split.producer_until)


def part_slices(log: ActionLog, split: Split, part: Part) -> list[Slice]:
    """Divide a part into slices with equal numbers of events; slices left empty by equal times are dropped."""
    return _slices(log.time_ms, split, part, 0.0)


def request_slices(time_ms: np.ndarray, split: Split, part: Part) -> list[Slice]:
    """Divide a part of logged requests into slices with equal numbers of requests.

    Embeddings are fitted on interactions before the first request, so the parts after the producer's window share all
    requests, in the proportions of the split.

    Args:
        time_ms: int64[R], ascending, times of the requests.
        split: the boundaries of the parts.
        part: the part.
    """
    return _slices(time_ms, split, part, split.producer_until)


def _slices(time_ms: np.ndarray, split: Split, part: Part, origin: float) -> list[Slice]:
    """Return the slices of a part; the times are those of the events from the share `origin` of all on."""
    first, start, stop, count = {
        "train": (0, split.producer_until, split.train_until, split.train_slices),
        "validation": (split.train_slices, split.train_until, split.validation_until, split.validation_slices),
        "test": (split.train_slices + split.validation_slices, split.validation_until, 1.0, split.test_slices),
    }[part]
    bounds = [_time_at(time_ms, (share - origin) / (1 - origin)) for share in np.linspace(start, stop, count + 1)]
    return [Slice(first + i, a, b) for i, (a, b) in enumerate(pairwise(bounds)) if a < b]


def slice_requests(log: ActionLog, span: Slice, history_max: int, rng: np.random.Generator) -> list[Request]:
    """Return the requests of a slice, in order of user and time.

    A random half of them, drawn by `rng`, starts from the user's last pin with an action of at least `QUERY_AFFINITY`
    (with ratings: the last pin that the user saved or liked). A user without such a pin asks from home.
    """
    first, stop = log.before(span.start_ms), log.before(span.stop_ms)
    last_wanted = _last_wanted(log)
    requests = []
    for user in np.unique(log.user[first:stop]):
        events = log.by_user[log.user_splits[user] : log.user_splits[user + 1]]
        start, end = np.searchsorted(events, (first, stop))
        times = log.time_ms[events]
        for chunk in range(start, end, PINS_MAX):
            time_ms = int(times[chunk])
            known = int(np.searchsorted(times, time_ms))
            wanted = last_wanted[log.user_splits[user] + known]
            related = bool(rng.random() < 0.5) and wanted >= 0
            requests.append(
                Request(
                    user=int(user),
                    time_ms=time_ms,
                    chosen=events[chunk : min(chunk + PINS_MAX, end)],
                    history=events[max(0, known - history_max) : known][::-1],
                    activity=known,
                    query_pin=int(wanted) if related else None,
                )
            )
    return requests


def _last_wanted(log: ActionLog) -> np.ndarray:
    """Return int64[E]: for each entry of `by_user`, the user's last pin before it to start from; -1 for none."""
    event = log.by_user
    wanted = log.schema.affinities[log.action[event]] >= QUERY_AFFINITY
    place = np.maximum.accumulate(np.where(wanted, np.arange(len(event)), -1))
    previous = np.concatenate([[-1], place[:-1]])
    own_start = log.user_splits[log.user[event]]
    return np.where(previous >= own_start, log.pin[event[previous]], -1)


def _time_at(time_ms: np.ndarray, share: float) -> int:
    number = int(share * len(time_ms))
    return int(time_ms[-1]) + 1 if number >= len(time_ms) else int(time_ms[number])
