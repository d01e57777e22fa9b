"""Measure what docs/capacity.md plans with: CPU time by the number of candidates, and the memory of a server process.

Callers without pause keep the server busy with requests of one size after the other. CPU time is what the kernel
charges the server's process: the client beside it takes cores and caches, but adds nothing to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import client
from bench.harness import Conclusion, Raw, markdown_table
from bench.processes import memory
from bench.provenance import instructions
from bench.test_bed import CONFIG, SEED, TestBed, median, saturated, scene
from loadtest.workload import Workload

CANDIDATES = (64, 128, 500, 1_000, 5_000)
#: As many pins as two of the largest requests.
_PINS = 10_000


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    rounds: int = 3
    callers: int = 4
    warmup_s: float = 1.0
    saturated_s: float = 4.0
    requests: int = 64


QUICK = CapacityPlan(rounds=1, callers=2, warmup_s=0.1, saturated_s=0.4, requests=4)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark.

    Raises:
        BenchmarkError: the server did not start, or refused or degraded an answer.
    """
    plan = QUICK if quick else CapacityPlan()
    with scene(config, pins=_PINS) as stage:
        started = memory(stage.server.pid)
        requests = {count: _requests(stage, count, plan.requests) for count in CANDIDATES}
        stage.client.submit(client.saturate, *stage.server[:2], requests[CANDIDATES[0]], 2, 0.0, 0.5).result()
        rounds: list[dict[str, Any]] = []
        raw = {
            "setup": {
                "streams": stage.subject.streams, "cores": len(os.sched_getaffinity(0)), "instructions": instructions(),
                "engine": stage.settings.engine, "callers": plan.callers, "cores_kept_awake": stage.awake,
                "near_cache_bytes": stage.settings.near_cache_bytes, "memory_at_start": asdict(started),
            },
            "rounds": rounds,
        }  # fmt: skip
        for _ in range(plan.rounds):
            rounds.append({})
            for count, contents in requests.items():
                done = saturated(stage, contents, plan.callers, plan.warmup_s, plan.saturated_s)
                rounds[-1][str(count)] = {**done, "memory": asdict(memory(stage.server.pid))}
            yield raw


def _requests(stage: TestBed, candidates: int, count: int) -> tuple[bytes, ...]:
    return tuple(Workload(stage.user_ids, stage.pin_ids, ((candidates, 1.0),), seed=SEED).requests(count))


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]
    summary: dict[str, float | None] = {}
    rows = []
    for count in rounds[0]:

        def of(*path: str, count: str = count) -> float:
            values: list[Any] = [r[count] for r in rounds]
            for key in path:
                values = [value[key] for value in values]
            return median(values)

        core_ms, own_ms = of("server_cpu_ms_per_request"), of("own_cpu_ms_per_request")
        rows_per_core_s = int(count) / core_ms * 1e3
        summary[f"{count} candidates, core-ms a request"] = core_ms
        summary[f"{count} candidates, of it beyond the engine's runs"] = own_ms
        summary[f"{count} candidates, rows/s a core"] = rows_per_core_s
        summary[f"{count} candidates, requests/s"] = of("achieved_per_s")
        rows.append(
            (count, f"{core_ms:.2f}", f"{own_ms:.2f}", f"{rows_per_core_s:,.0f}", f"{of('achieved_per_s'):.0f}")
        )
    last = rounds[-1][str(max(map(int, rounds[-1])))]["memory"]
    summary["memory of its own, MB"] = last["own_bytes"] / 1e6
    summary["pages of mapped files, MB"] = last["file_bytes"] / 1e6
    header = ("candidates", "core-ms a request", "of it beyond the engine", "rows/s a core", "requests/s")
    return Conclusion(summary, (), markdown_table("CPU time by candidates", header, rows))
