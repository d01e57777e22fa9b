"""Actions that another system recorded, from a Parquet file of its own."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_client.action_times import EARLIEST_MS
from impressions.dataset import JoinError
from impressions.schema import ACTIONS

_REQUIRED = ("event_id", "user_id", "pin_id", "action", "time_ms")


def read_action_file(path: Path) -> pa.Table:
    """Read actions as the log keeps them.

    Args:
        path: a file with the columns event_id, user_id, pin_id, action and time_ms (Unix milliseconds). It may also
            have surface, received_ms (default: time_ms), request_id and position. Other columns are ignored.

    Times may also be timestamps of any unit.

    Raises:
        JoinError: the file cannot be read, lacks a column, or has values of another type or unit.
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
        if pa.types.is_floating(column.type) and pa.types.is_uint64(field.type):
            raise JoinError(
                f"--actions {path}: column {field.name} is {column.type}, which rounds ids above 2**53; write it as "
                "uint64 (pandas: dtype UInt64, which also holds missing values)"
            )
        if pa.types.is_timestamp(column.type) and field.name.endswith("_ms"):
            column = column.cast(pa.timestamp("ms", column.type.tz), safe=False)
        try:
            # Names may come as plain or large strings, or as a dictionary; all become the log's dictionary.
            columns.append(
                column.cast(pa.string()).dictionary_encode()
                if pa.types.is_dictionary(field.type)
                else column.cast(field.type)
            )
        except (pa.ArrowException, ValueError) as error:
            raise JoinError(f"--actions {path}: column {field.name} must be {field.type}: {error}") from error
        if field.name.endswith("_ms"):
            _check_unit(path, field.name, columns[-1])
    return pa.table(columns, ACTIONS)


def _check_unit(path: Path, name: str, times: pa.ChunkedArray) -> None:
    latest = pc.max(times).as_py()
    if latest is not None and latest * 1_000 >= EARLIEST_MS and latest < EARLIEST_MS:
        raise JoinError(
            f"--actions {path}: column {name} looks like seconds (the latest is {latest}); it must be Unix time in "
            "milliseconds"
        )


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
