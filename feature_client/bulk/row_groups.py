"""Reads Parquet files in memory that does not grow with their length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def batches(parquet: Any, rows: int, columns: Sequence[str]) -> Iterator[Any]:
    """Yield the rows of a `pyarrow.parquet.ParquetFile` as record batches, in their order.

    Arrow keeps the bytes of the row groups that it has read, or will read, until an iteration ends, so that one over a
    long file would hold all of it in the end. So there is one for each row group.

    Args:
        parquet: the file.
        rows: maximum number of rows of a batch; the last one of a row group may have fewer.
        columns: names of the columns.
    """
    for group in range(parquet.num_row_groups):
        yield from parquet.iter_batches(rows, row_groups=[group], columns=list(columns))
