"""Reading the tables of a log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from impressions.dataset import JoinError


def read_tables(where: str, table: str) -> Iterator[pa.Table]:
    """Yield the rows of one table of a log, a row group at a time."""
    folder = Path(where.removeprefix("file://"))
    if not folder.is_dir():
        raise JoinError(f"there is no impression log at {where}; give the address of `[impressions] to = ...`")
    for path in sorted((folder / table).rglob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number)
