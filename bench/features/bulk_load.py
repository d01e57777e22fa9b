"""Load and verify a group of a million rows from a file, compared with plain redis-py pipelines."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import redis

from bench.features.near_cache import GROUP
from bench.harness import Claim, Conclusion, Raw
from bench.test_bed import SEED, median
from feature_client.bulk.load import load
from feature_client.bulk.source import CHUNK_ROWS, Source
from feature_client.codec import encode_rows
from feature_client.stores.open_store import open_store
from tests.redis_servers import running


@dataclass(frozen=True, slots=True)
class BulkLoadPlan:
    rows: int = 1_000_000
    rounds: int = 3


QUICK = BulkLoadPlan(rows=30_000, rounds=1)


def measure(*, quick: bool = False) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if redis-server does not start."""
    plan = QUICK if quick else BulkLoadPlan()
    rounds: list[dict[str, float]] = []
    for _ in range(plan.rounds):
        with tempfile.TemporaryDirectory(prefix="pinrank-load-") as folder, running(Path(folder)) as server:
            source = Source(_file(Path(folder), plan), GROUP)
            found = {
                "redis": asyncio.run(_load(server.url, source)),
                "lmdb": asyncio.run(_load(f"lmdb://{folder}/store", source)),
                "redis_py": _plain(server.port, source),
            }
        rounds.append(found)
        yield {"rows": plan.rows, "row_bytes": GROUP.dtype.itemsize, "rounds": rounds}


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]

    def of(way: str) -> float:
        return median([r[way] for r in rounds])

    claims = (
        Claim("rows a second into Redis, verified", of("redis"), 200_000, "rows/s", "at_least"),
        Claim("rows a second into LMDB, verified", of("lmdb"), 200_000, "rows/s", "at_least"),
    )
    summary = {f"{way}, rows/s": of(way) for way in rounds[0]}
    return Conclusion(summary, claims)


def _file(folder: Path, plan: BulkLoadPlan) -> Path:
    rng = np.random.default_rng(SEED)
    path = folder / "pins.npz"
    np.savez(
        path,
        id=np.arange(1, plan.rows + 1, dtype=np.uint64),
        embedding=rng.random((plan.rows, 32), np.float32).astype(np.float16),
        popularity=rng.random(plan.rows, np.float32),
    )
    return path


async def _load(url: str, source: Source) -> float:
    store = open_store(url)
    await store.start()
    start_s = time.perf_counter()
    await load(store, GROUP, source, lambda _: None)
    took_s = time.perf_counter() - start_s
    await store.close()
    return source.rows / took_s


def _plain(port: int, source: Source) -> float:
    client = redis.Redis(port=port, db=1)
    start_s = time.perf_counter()
    for ids, rows in source.chunks(0):
        keys, values = GROUP.keys(ids), encode_rows(GROUP, rows)
        for first in range(0, CHUNK_ROWS, 1_000):
            pipe = client.pipeline(transaction=False)
            for key, value in zip(keys[first : first + 1_000], values[first : first + 1_000], strict=True):
                pipe.set(key, value)
            pipe.execute()
    took_s = time.perf_counter() - start_s
    client.close()
    return source.rows / took_s
