"""Measure Feast's online read from Redis for bench/features/feature_reads.py, in a separate environment.

    python -m venv .venv-feast && .venv-feast/bin/pip install 'feast[redis]'

Usage: feast_reads.py PORT PINS ENTITIES READS SEED FILL(0|1). Prints JSON with milliseconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Array, Float32

DIM = 32


def main(port: int, pins: int, entities: int, reads: int, seed: int, *, fill: bool) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        repo = RepoConfig(
            project="bench",
            provider="local",
            registry=str(Path(folder) / "registry.db"),
            online_store={"type": "redis", "connection_string": f"127.0.0.1:{port},db=1"},
            offline_store={"type": "file"},
            entity_key_serialization_version=3,
        )
        store = FeatureStore(config=repo)
        pin = Entity(name="pin", join_keys=["pin_id"], value_type=ValueType.INT64)
        parquet = Path(folder) / "pins.parquet"
        pd.DataFrame({"pin_id": [1], "event_timestamp": [datetime.now(UTC)]}).to_parquet(parquet)
        view = FeatureView(
            name="pins",
            entities=[pin],
            ttl=timedelta(days=1),
            schema=[Field(name="embedding", dtype=Array(Float32)), Field(name="popularity", dtype=Float32)],
            source=FileSource(path=str(parquet), timestamp_field="event_timestamp"),
        )
        store.apply([pin, view])
        if fill:
            for start in range(1, pins + 1, 5_000):
                ids = np.arange(start, min(start + 5_000, pins + 1))
                frame = pd.DataFrame(
                    {
                        "pin_id": ids,
                        "embedding": list(rng.normal(size=(len(ids), DIM)).astype(np.float32)),
                        "popularity": rng.random(len(ids)).astype(np.float32),
                        "event_timestamp": datetime.now(UTC),
                    }
                )
                store.write_to_online_store("pins", frame)
        features = ["pins:embedding", "pins:popularity"]
        took_s = []
        for number in range(reads + 2):
            rows = [{"pin_id": int(i)} for i in rng.choice(pins, entities, replace=False) + 1]
            start_s = time.perf_counter()
            found = store.get_online_features(features=features, entity_rows=rows).to_dict()
            if number >= 2:
                took_s.append(time.perf_counter() - start_s)
        if any(value is None for value in found["popularity"]):
            sys.exit("Feast did not find all pins")
    p50, p99 = np.percentile(took_s, (50, 99)) * 1e3
    print(json.dumps({"p50_ms": p50, "p99_ms": p99}))


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:6]]
    main(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], fill=sys.argv[6] == "1")
