from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_client.bulk.row_groups import batches


def test_every_row_comes_once_and_in_order(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": list(range(25)), "b": ["x"] * 25}), path, row_group_size=10)
    found = list(batches(pq.ParquetFile(path), 4, ["a"]))
    assert [len(batch) for batch in found] == [4, 4, 2, 4, 4, 2, 4, 1]
    assert [value for batch in found for value in batch.column("a").to_pylist()] == list(range(25))
    assert found[0].schema.names == ["a"]


def test_a_file_without_rows_has_no_batches(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), path)
    assert sum(map(len, batches(pq.ParquetFile(path), 4, ["a"]))) == 0


def test_memory_does_not_grow_with_the_length_of_the_file(tmp_path):
    path, groups = tmp_path / "rows.parquet", 24
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, pa.schema([("a", pa.uint64())])) as writer:
        for _ in range(groups):
            writer.write_table(pa.table({"a": rng.integers(2**63, size=100_000).astype(np.uint64)}))
    held = []
    before = pa.total_allocated_bytes()
    for batch in batches(pq.ParquetFile(path), 100_000, ["a"]):
        assert len(batch) == 100_000
        held.append(pa.total_allocated_bytes() - before)
        del batch
    assert len(held) == groups
    assert max(held) < path.stat().st_size / 4
