"""Converts rows to Arrow, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice

import numpy as np
import pyarrow as pa

from impressions.schema import ACTIONS, IMPRESSIONS, SEEN
from impressions.writing.gathering import gather
from impressions.writing.rows import AnsweredRequest, RecordedAction, RecordedActions, SeenReport
from model_store.exploration.explorer import Propensities
from model_store.exploration.propensities import propensities

#: Actions that are converted, in a quarter of a millisecond, between two pauses.
_ACTIONS_AT_ONCE = 256


def impressions_batch(requests: Sequence[AnsweredRequest], pause: Callable[[], None] = lambda: None) -> pa.RecordBatch:
    """Convert answered requests to a batch of `IMPRESSIONS`.

    Args:
        requests: at least one.
        pause: called now and then, so that other threads get the interpreter lock.
    """
    pins = gather(requests)
    pause()
    counts = np.array([request.scores.top for request in requests])
    chances = _propensities(requests)
    pause()
    # Most requests have the same constants, so each is converted once.
    constants = list({id(request.constants): request.constants for request in requests}.values())
    number_of = {id(one): number for number, one in enumerate(constants)}
    which = np.array([number_of[id(request.constants)] for request in requests], np.int32)
    heads, parties, attributes = (
        np.array([len(getattr(c, name)) for c in constants])[which] for name in ("heads", "parties", "attributes")
    )
    rows = pa.array(which)
    exploring = [request.exploring for request in requests]
    columns = {
        "request_id": pa.array([r.request_id for r in requests], pa.uint64()),
        "time_ms": pa.array([r.time_ms for r in requests], pa.int64()),
        "user_id": pa.array([r.user_id for r in requests], pa.uint64()),
        "surface": _names([c.surface for c in constants]).take(rows),
        "query_pin_id": pa.array([r.query_pin_id for r in requests], pa.uint64()),
        "query_vector": pa.array([r.query_vector for r in requests], pa.list_(pa.float32())),
        "label": _names([r.label for r in requests]),
        "model": _names([c.model for c in constants]).take(rows),
        "model_digest": _names([c.model_digest for c in constants]).take(rows),
        "utility_digest": _names([c.utility_digest for c in constants]).take(rows),
        "degradation": _counts([r.degradation for r in requests]),
        "candidates": pa.array([len(r.pin_ids) for r in requests], pa.uint32()),
        "heads": _name_lists([c.heads for c in constants]).take(rows),
        "parties": _name_lists([c.parties for c in constants]).take(rows),
        "attributes": _name_lists([c.attributes for c in constants]).take(rows),
        "party_weights": _lists(parties, np.concatenate([r.party_weights for r in requests])),
        "explorer": _names([None if e is None else e.explorer for e in exploring]),
        "arm": _names([None if e is None else e.arm for e in exploring]),
        "explore_seed": pa.array([None if e is None else e.seed for e in exploring], pa.uint64()),
        "order_propensity": pa.array([one.order for one in chances], pa.float64()),
        "pin_ids": _lists(counts, pins.pin_ids),
        "places": _lists(counts, pins.places),
        "probabilities": _lists(counts * heads, pins.probabilities),
        "party_utilities": _lists(counts * parties, pins.party_utilities),
        "attribute_values": _lists(counts * attributes, pins.attributes),
        "utilities": _lists(counts, pins.utilities),
        "propensities": _lists(counts, np.concatenate([one.positions for one in chances])),
        "features": pa.array([None if r.features is None else r.features() for r in requests], pa.binary()),
    }
    return pa.record_batch(list(columns.values()), schema=IMPRESSIONS)


def _propensities(requests: Sequence[AnsweredRequest]) -> list[Propensities]:
    """Return those of each request; what could not explore has one order, with the probability 1."""
    asked = [
        (r.exploring.policy, r.scores.party_utilities, r.scores.order) for r in requests if r.exploring is not None
    ]
    found = iter(propensities(asked))
    return [Propensities(1.0, np.ones(r.scores.top)) if r.exploring is None else next(found) for r in requests]


def actions_batch(calls: Sequence[RecordedActions], pause: Callable[[], None] = lambda: None) -> pa.RecordBatch:
    """Convert the actions of calls to a batch of `ACTIONS`; see `impressions_batch`."""
    actions: list[RecordedAction] = []
    for call in calls:
        left = iter(call.actions())
        while some := list(islice(left, _ACTIONS_AT_ONCE)):
            actions += some
            pause()
    columns = []
    for field, values in zip(ACTIONS, zip(*actions, strict=True), strict=True):
        columns.append(_names(values) if pa.types.is_dictionary(field.type) else pa.array(values, field.type))
        pause()
    return pa.record_batch(columns, schema=ACTIONS)


def seen_batch(reports: Sequence[SeenReport]) -> pa.RecordBatch:
    """Convert reports to a batch of `SEEN`."""
    columns = [
        pa.array([r.request_id for r in reports], pa.uint64()),
        pa.array([r.received_ms for r in reports], pa.int64()),
        _lists(np.array([len(r.positions) for r in reports]), np.concatenate([r.positions for r in reports])),
        pa.array([r.user_id for r in reports], pa.uint64()),
    ]
    return pa.record_batch(columns, schema=SEEN)


def _lists(counts: np.ndarray, values: np.ndarray) -> pa.ListArray:
    """Return one list of so many of the values for each count."""
    return pa.ListArray.from_arrays(_offsets(counts), pa.array(values))


def _names(names: Sequence[str | None]) -> pa.DictionaryArray:
    known: dict[str, int] = {}
    numbers = [None if name is None else known.setdefault(name, len(known)) for name in names]
    return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array(list(known), pa.string()))


def _name_lists(lists: Sequence[tuple[str, ...]]) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets([len(names) for names in lists]), _names(list(chain.from_iterable(lists))))


def _counts(maps: Sequence[Mapping[str, int]]) -> pa.MapArray:
    names, values = list(chain.from_iterable(maps)), [int(value) for one in maps for value in one.values()]
    return pa.MapArray.from_arrays(
        _offsets([len(one) for one in maps]), pa.array(names, pa.string()), pa.array(values, pa.uint32())
    )


def _offsets(counts: Sequence[int] | np.ndarray) -> pa.Int32Array:
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.array(offsets)
