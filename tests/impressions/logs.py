"""Logs of a few rows, as Arrow tables with the log's own schemas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from impressions.reading import Selection
from impressions.schema import TABLES

Row = dict[str, Any]


def impression(request_id: int, time_ms: int, user_id: int, pin_ids: Sequence[int], **fields: Any) -> Row:
    """Return a row of two heads, two parties and one attribute, whose scores depend on its pins only."""
    count = len(pin_ids)
    row: Row = {
        "request_id": request_id,
        "time_ms": time_ms,
        "user_id": user_id,
        "surface": "home",
        "label": "stable",
        "model": "toy@1",
        "model_digest": "m1",
        "utility_digest": "u1",
        "degradation": [],
        "candidates": count + 3,
        "heads": ["save", "hide"],
        "parties": ["pinner", "creator"],
        "attributes": ["pin.creator_tail"],
        "party_weights": [1.0, 0.5],
        "order_propensity": 1.0,
        "pin_ids": list(pin_ids),
        "places": list(range(count)),
        "probabilities": [((pin % 7) + head) / 10 for pin in pin_ids for head in range(2)],
        "party_utilities": [float(pin % 5 + party) for pin in pin_ids for party in range(2)],
        "attribute_values": [pin % 3 / 4 for pin in pin_ids],
        "utilities": [float(count - place) for place in range(count)],
        "propensities": [1.0] * count,
    }
    assert fields.keys() <= set(TABLES["impressions"].names)
    return {**row, **fields}


def action(event_id: int, user_id: int, pin_id: int, time_ms: int, **fields: Any) -> Row:
    row: Row = {
        "event_id": event_id,
        "user_id": user_id,
        "pin_id": pin_id,
        "action": "save",
        "surface": "home",
        "time_ms": time_ms,
        "received_ms": time_ms,
    }
    assert fields.keys() <= set(TABLES["actions"].names)
    return {**row, **fields}


def seen(request_id: int, *positions: int, user_id: int | None = None) -> Row:
    return {"request_id": request_id, "received_ms": 1, "positions": list(positions), "user_id": user_id}


def table(name: str, rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), TABLES[name])


def reader(tables: Mapping[str, Sequence[pa.Table]]) -> Callable[[str, Selection], Iterator[pa.Table]]:
    """Return what reads a log's tables, from tables in memory."""
    return lambda name, _needed: iter(tables.get(name, ()))


def log_of(
    impressions: Sequence[Row], actions: Sequence[Row] = (), seen: Sequence[Row] = ()
) -> Callable[[str, Selection], Iterator[pa.Table]]:
    """Return what reads a log with one file per table."""
    rows = {"impressions": impressions, "actions": actions, "seen": seen}
    return reader({name: [table(name, found)] for name, found in rows.items() if found})
