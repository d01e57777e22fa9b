"""Which parts of a Parquet file need not be read, by its statistics."""

from __future__ import annotations

import pyarrow.parquet as pq


def outside(group: pq.RowGroupMetaData, since_ms: int | None, until_ms: int | None) -> bool:
    """Return whether no `time_ms` of a row group can lie in a span, from `since_ms` to before `until_ms`."""
    columns = (group.column(i) for i in range(group.num_columns))
    statistics = next((column.statistics for column in columns if column.path_in_schema == "time_ms"), None)
    if statistics is None or not statistics.has_min_max:
        return False
    return bool(
        (since_ms is not None and statistics.max < since_ms) or (until_ms is not None and statistics.min >= until_ms)
    )
