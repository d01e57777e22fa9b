"""How fast a log is joined with its actions, and how much memory that takes.

The log has requests of 128 pins in files in order of time, as servers write them, and actions of which some come late,
twice, without a request, or fit none. The larger log is joined as a whole and for a tenth of its time. Each join runs
in a process of its own, whose memory is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.fs import LocalFileSystem

from bench.harness import Claim, Conclusion, Raw
from bench.test_bed import SEED
from impressions.archive import write_parquet
from impressions.schema import TABLES

#: 2026-01-01, and how many milliseconds lie between two requests.
_START_MS, _STEP_MS = 1_767_225_600_000, 1_000
_HEADS, _PARTIES, _ATTRIBUTES = 5, 4, 3


@dataclass(frozen=True, slots=True)
class JoinPlan:
    requests: tuple[int, ...] = (40_000, 150_000)
    pins: int = 128
    users: int = 50_000
    catalogue: int = 1_000_000
    actions_per_request: float = 2.0
    requests_per_file: int = 20_000


QUICK = JoinPlan(requests=(1_000, 3_000), users=300, requests_per_file=1_000)

#: Joins a log; prints its times and the most memory that the process held.
_JOIN = """
import json, resource, sys, time
from pathlib import Path
from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from impressions.joining.records import Span
from impressions.reading import read_tables

started, steps = time.perf_counter(), {}
def progress(step, done, total):
    steps[step] = time.perf_counter() - started
log, out, *times = sys.argv[1:]
def read(table, needed):
    return read_tables(log, table, wanted=needed)
wanted = Wanted(Window(1_800_000, 2_000), Span(*map(int, times)))
joined = join_log(read, Path(out), wanted, progress)
used = resource.getrusage(resource.RUSAGE_SELF)
# The maximum of getrusage includes the parent's, from before this program was loaded.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "cpu_seconds": used.ru_utime + used.ru_stime,
    "bytes_max": int(status["VmHWM"].split()[0]) * 1024,
    "until_end_of_step_s": steps,
    "counts": joined.manifest.counts.model_dump(),
    "repeated_actions": joined.repeated_actions,
}))
"""


def measure(*, quick: bool = False) -> Iterator[Raw]:
    """Run the benchmark."""
    plan = QUICK if quick else JoinPlan()
    raw: dict[str, Any] = {"plan": asdict(plan), "rounds": []}
    for requests in plan.requests:
        with tempfile.TemporaryDirectory(prefix="pinrank-join-") as folder:
            log, out = Path(folder) / "log", Path(folder) / "joined"
            rows = _write_log(log, plan, requests)
            raw["rounds"].append(_join(log, out, requests, rows))
            if requests == plan.requests[-1]:
                since_ms = _START_MS + requests // 2 * _STEP_MS
                span = (since_ms, since_ms + requests // 10 * _STEP_MS)
                raw["tenth"] = _join(log, Path(folder) / "tenth", requests, rows, span)
        yield raw


def _join(log: Path, out: Path, requests: int, rows: int, span: tuple[int, ...] = ()) -> dict[str, Any]:
    command = [sys.executable, "-c", _JOIN, str(log), str(out), *map(str, span)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "requests": requests,
        "action_rows": rows,
        "log_bytes": sum(path.stat().st_size for path in log.rglob("*.parquet")),
        "joined_bytes": sum(path.stat().st_size for path in out.iterdir()),
        **found,
    }


def conclude(raw: Raw) -> Conclusion:
    (small, large), tenth = raw["rounds"], raw["tenth"]
    requests, pins = large["requests"], large["requests"] * raw["plan"]["pins"]
    each_bytes = (large["bytes_max"] - small["bytes_max"]) / (requests - small["requests"])
    million_bytes = large["bytes_max"] + (1_000_000 - requests) * max(0.0, each_bytes)
    summary = {
        "requests/s": requests / large["seconds"],
        "shown pins/s": pins / large["seconds"],
        "core-seconds per million requests": large["cpu_seconds"] / requests * 1e6,
        f"peak memory of {small['requests']:,} requests, MiB": small["bytes_max"] / 2**20,
        f"peak memory of {requests:,} requests, MiB": large["bytes_max"] / 2**20,
        "a tenth of the time, share of the whole join's seconds": tenth["seconds"] / large["seconds"],
        "a tenth of the time, peak memory, MiB": tenth["bytes_max"] / 2**20,
        "log, bytes a request": large["log_bytes"] / requests,
        "joined, bytes a request": large["joined_bytes"] / requests,
        "share of actions that are attributed": large["counts"]["attributed"] / large["counts"]["actions"],
    }
    claims = (
        Claim("shown pins joined a second", pins / large["seconds"], 200_000, "pins/s", "at_least"),
        Claim(
            "peak memory of a million requests, from how it grows with their number",
            million_bytes / 2**20,
            4_096,
            "MiB",
            "at_most",
        ),
    )
    return Conclusion(summary, claims)


def _write_log(folder: Path, plan: JoinPlan, requests: int) -> int:
    """Write a log; return its number of rows of actions."""
    rng = np.random.default_rng(SEED)
    rows = 0
    for number, first in enumerate(range(0, requests, plan.requests_per_file)):
        count = min(plan.requests_per_file, requests - first)
        impressions = _impressions(rng, plan, first, count)
        actions = _actions(rng, plan, impressions)
        rows += actions.num_rows
        for name, table in (("impressions", impressions), ("actions", actions)):
            day = folder / name / "2026-01-01"
            day.mkdir(parents=True, exist_ok=True)
            write_parquet(table, str(day / f"000000-{number:04}.parquet"), LocalFileSystem())
    return rows


def _lists(values: np.ndarray, width: int, count: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * width, pa.int32()), pa.array(values))


def _names(names: list[str], count: int) -> pa.Array:
    """Return the same list of names in each row."""
    codes = pa.array(np.tile(np.arange(len(names), dtype=np.int32), count))
    offsets = pa.array(np.arange(count + 1) * len(names), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.DictionaryArray.from_arrays(codes, pa.array(names)))


def _impressions(rng: np.random.Generator, plan: JoinPlan, first: int, count: int) -> pa.Table:
    pins = count * plan.pins

    def same(name: str) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([name]))

    columns = {
        "request_id": pa.array(rng.permutation(np.arange(first, first + count, dtype=np.uint64)) + np.uint64(1 << 40)),
        "time_ms": pa.array(_START_MS + np.arange(first, first + count) * _STEP_MS),
        "user_id": pa.array(rng.integers(1, plan.users + 1, count).astype(np.uint64)),
        "surface": same("home"),
        "label": same("stable"),
        "model": same("bench@1"),
        "model_digest": same("0" * 64),
        "utility_digest": same("1" * 64),
        "degradation": pa.array([[]] * count, pa.map_(pa.string(), pa.uint32())),
        "candidates": pa.array(np.full(count, plan.pins, np.uint32)),
        "heads": _names([f"head{n}" for n in range(_HEADS)], count),
        "parties": _names([f"party{n}" for n in range(_PARTIES)], count),
        "attributes": _names([f"pin.field{n}" for n in range(_ATTRIBUTES)], count),
        "party_weights": _lists(rng.random(count * _PARTIES), _PARTIES, count),
        "order_propensity": pa.array(np.ones(count)),
        "pin_ids": _lists(rng.integers(1, plan.catalogue, pins).astype(np.uint64), plan.pins, count),
        "places": _lists(np.tile(np.arange(plan.pins, dtype=np.uint32), count), plan.pins, count),
        "probabilities": _lists(rng.random(pins * _HEADS, np.float32), plan.pins * _HEADS, count),
        "party_utilities": _lists(rng.random(pins * _PARTIES), plan.pins * _PARTIES, count),
        "attribute_values": _lists(rng.random(pins * _ATTRIBUTES), plan.pins * _ATTRIBUTES, count),
        "utilities": _lists(rng.random(pins, np.float32), plan.pins, count),
        "propensities": _lists(np.ones(pins), plan.pins, count),
    }
    schema = TABLES["impressions"]
    return pa.table([columns.get(field.name, pa.nulls(count, field.type)) for field in schema], schema)


def _actions(rng: np.random.Generator, plan: JoinPlan, impressions: pa.Table) -> pa.Table:
    """Return actions on shown pins: 60% name their request, 5% are too late, 3% sent twice, 2% on another pin."""
    count = int(impressions.num_rows * plan.actions_per_request)
    request = np.sort(rng.integers(0, impressions.num_rows, count))
    position = rng.integers(0, plan.pins, count)
    pin_ids = impressions["pin_ids"].combine_chunks().flatten().to_numpy()[request * plan.pins + position]
    pin_ids = np.where(rng.random(count) < 0.02, np.uint64(1 << 50), pin_ids)
    delay_ms = rng.exponential(60_000, count).astype(np.int64) + np.where(rng.random(count) < 0.05, 7_200_000, 0)
    time_ms = impressions["time_ms"].to_numpy()[request] + delay_ms
    unnamed = rng.random(count) >= 0.6
    columns = {
        "event_id": pa.array(impressions["request_id"].to_numpy()[request] * 4_096 + np.arange(count, dtype=np.uint64)),
        "user_id": pa.array(impressions["user_id"].to_numpy()[request]),
        "pin_id": pa.array(pin_ids),
        "action": pa.DictionaryArray.from_arrays(
            pa.array(rng.integers(0, _HEADS, count).astype(np.int32)), pa.array([f"head{n}" for n in range(_HEADS)])
        ),
        "surface": pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["home"])),
        "time_ms": pa.array(time_ms),
        "received_ms": pa.array(time_ms + 200),
        "request_id": pa.array(impressions["request_id"].to_numpy()[request], mask=unnamed),
        "position": pa.array(position.astype(np.uint32), mask=unnamed),
    }
    schema = TABLES["actions"]
    table = pa.table([columns[field.name] for field in schema], schema)
    return pa.concat_tables([table, table.take(np.flatnonzero(rng.random(count) < 0.03))])
