"""Actions that another system recorded, from a Parquet file of its own."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from impressions.dataset import JoinError
from impressions.schema import ACTIONS

_REQUIRED = ("event_id", "user_id", "pin_id", "action", "time_ms")


def read_action_file(path: Path) -> pa.Table:
    """Read actions as the log keeps them.

    Args:
        path: a file with the columns event_id, user_id, pin_id, action and time_ms (Unix milliseconds). It may also
            have surface, received_ms (default: time_ms), request_id and position. Other columns are ignored.

    Raises:
        JoinError: the file cannot be read, lacks a column, or has values of another type or nulls.
    """
    try:
        found = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise JoinError(f"--actions {path} cannot be read as Parquet: {error}") from error
    lacking = [name for name in _REQUIRED if name not in found.column_names]
    if lacking:
        raise JoinError(
            f"--actions {path} lacks {', '.join(lacking)}; it must have the columns {', '.join(_REQUIRED)}, and may "
            "have surface, received_ms, request_id and position"
        )
    columns = []
    for field in ACTIONS:
        column = _column(found, field.name)
        try:
            # Names may come as plain or large strings, or as a dictionary; all become the log's dictionary.
            columns.append(
                column.cast(pa.string()).dictionary_encode()
                if pa.types.is_dictionary(field.type)
                else column.cast(field.type)
            )
        except (pa.ArrowException, ValueError) as error:
            raise JoinError(f"--actions {path}: column {field.name} must be {field.type}: {error}") from error
    return pa.table(columns, ACTIONS)


def _column(found: pa.Table, name: str) -> pa.ChunkedArray:
    if name in found.column_names:
        return found[name]
    if name == "received_ms":
        return found["time_ms"]
    missing = (
        pa.array([""], pa.string()).take(pa.array([0] * found.num_rows))
        if name == "surface"
        else pa.nulls(found.num_rows)
    )
    return pa.chunked_array([missing])
