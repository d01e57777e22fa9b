"""The tables of the impression log, column by column, and the fingerprint that names their version.

A log is a folder or bucket with one subfolder per table, which holds Parquet files by day. `impressions` has one row
per answered request, `actions` one per action that the server recorded, and `seen` one per report of what a user looked
at. Lists of a request's pins are in the order of the answer; tables of pins by heads (or parties, attributes) are
row-major.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa

_NAME = pa.dictionary(pa.int32(), pa.string())

#: One row per answered request. K pins were returned; there are H heads, P parties and A attributes.
IMPRESSIONS = pa.schema(
    [
        pa.field("request_id", pa.uint64(), nullable=False),  # unique, never 0
        pa.field("time_ms", pa.int64(), nullable=False),  # when it was answered: Unix time in milliseconds
        pa.field("user_id", pa.uint64(), nullable=False),
        pa.field("surface", _NAME, nullable=False),
        pa.field("query_pin_id", pa.uint64()),
        pa.field("query_vector", pa.list_(pa.float32())),
        pa.field("label", _NAME, nullable=False),  # empty if the request named a version
        pa.field("model", _NAME, nullable=False),  # "name@version"
        pa.field("model_digest", _NAME, nullable=False),
        pa.field("utility_digest", _NAME, nullable=False),
        pa.field(
            "degradation", pa.map_(pa.string(), pa.uint32()), nullable=False
        ),  # fields of Degradation, without zeros
        pa.field("candidates", pa.uint32(), nullable=False),  # how many the request had
        pa.field("heads", pa.list_(_NAME), nullable=False),
        pa.field("parties", pa.list_(_NAME), nullable=False),
        pa.field("attributes", pa.list_(_NAME), nullable=False),  # what the utility table reads of pins: "pin.field"
        pa.field("party_weights", pa.list_(pa.float64()), nullable=False),  # [P], those that this order followed
        pa.field("explorer", _NAME),  # digest of the explore.toml in force; null if exploration was off
        pa.field("arm", _NAME),  # the arm that ordered it; null if the tuned order was answered
        pa.field("explore_seed", pa.uint64()),
        pa.field("order_propensity", pa.float64(), nullable=False),  # probability of this order, in (0, 1]
        pa.field("pin_ids", pa.list_(pa.uint64()), nullable=False),  # [K]
        pa.field("places", pa.list_(pa.uint32()), nullable=False),  # [K], the pins' positions in the request
        pa.field("probabilities", pa.list_(pa.float32()), nullable=False),  # [K, H], calibrated
        pa.field("party_utilities", pa.list_(pa.float64()), nullable=False),  # [K, P]
        pa.field("attribute_values", pa.list_(pa.float64()), nullable=False),  # [K, A]
        pa.field("utilities", pa.list_(pa.float32()), nullable=False),  # [K], those of the answer
        pa.field("propensities", pa.list_(pa.float64()), nullable=False),  # [K], of the pin at its position, in (0, 1]
        pa.field(
            "features", pa.binary()
        ),  # the stored rows that were read, as golden requests keep them; a share has it
    ]
)

#: One row per action that `ActivityService` accepted, also if it was sent again.
ACTIONS = pa.schema(
    [
        pa.field("event_id", pa.uint64(), nullable=False),
        pa.field("user_id", pa.uint64(), nullable=False),
        pa.field("pin_id", pa.uint64(), nullable=False),
        pa.field("action", _NAME, nullable=False),
        pa.field("surface", _NAME, nullable=False),
        pa.field("time_ms", pa.int64(), nullable=False),  # when it happened, as its producer says
        pa.field("received_ms", pa.int64(), nullable=False),  # the server's clock
        pa.field("request_id", pa.uint64()),  # of the answer that showed the pin; null if the producer did not say
        pa.field("position", pa.uint32()),  # where in that answer, from 0
    ]
)

#: One row per call of `ImpressionService/Seen`.
SEEN = pa.schema(
    [
        pa.field("request_id", pa.uint64(), nullable=False),
        pa.field("received_ms", pa.int64(), nullable=False),
        pa.field("positions", pa.list_(pa.uint32()), nullable=False),  # of the answer, from 0
        pa.field("user_id", pa.uint64()),  # who looked; null if the frontend did not say
    ]
)

#: The tables by the name of their folder.
TABLES = {"impressions": IMPRESSIONS, "actions": ACTIONS, "seen": SEEN}

#: Earlier versions of a table whose rows this version reads: each lacks columns at the end, and these may be null.
EARLIER = {"seen": (pa.schema(list(SEEN)[:3]),)}

#: The key of a file's metadata that holds its table's fingerprint.
FINGERPRINT_KEY = b"pinrank.fingerprint"


def fingerprint(schema: pa.Schema) -> str:
    """Return 16 hex digits that name the version of a table: the SHA-256 of its fields, types and order."""
    fields = "\n".join(f"{field.name} {_named(field.type)}{'' if field.nullable else ' not null'}" for field in schema)
    return hashlib.sha256(fields.encode()).hexdigest()[:16]


def as_today(table: pa.Table, name: str, wanted: Sequence[str] | None = None) -> pa.Table:
    """Return rows of an earlier version of a table as rows of this version: the columns that it lacked are null.

    Args:
        table: the rows.
        name: the table, a name of `TABLES`.
        wanted: the columns to return; None for all.
    """
    for field in TABLES[name]:
        if field.name not in table.column_names and (wanted is None or field.name in wanted):
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.replace_schema_metadata({FINGERPRINT_KEY: fingerprint(TABLES[name]).encode()})


def _named(kind: pa.DataType) -> str:
    """Name a type. pyarrow's own names of nested types change between its versions."""
    if pa.types.is_list(kind):
        return f"list of {_named(kind.value_type)}"
    if pa.types.is_map(kind):
        return f"map of {_named(kind.key_type)} to {_named(kind.item_type)}"
    if pa.types.is_dictionary(kind):
        return "name"
    if pa.types.is_struct(kind):
        return f"struct of {', '.join(f'{field.name} {_named(field.type)}' for field in kind)}"
    return str(kind)
