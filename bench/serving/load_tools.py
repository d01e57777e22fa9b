"""Compare three load tools on one server at one rate: `pinrank load`, MLPerf's loadgen and Locust."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from bench import client
from bench.harness import ROOT, BenchmarkError, Claim, Conclusion, Raw
from bench.test_bed import CONFIG, SEED, TestBed, check_all_ok, median, scene
from loadtest.open_loop import OK

_BIN = Path(sys.executable).parent
#: Requests per second of a Locust user: few, so that it rarely still waits when its next request is due.
_PER_USER = 0.5


@dataclass(frozen=True, slots=True)
class LoadToolsPlan:
    rounds: int = 5
    rate_per_s: float = 40.0
    duration_s: float = 12.0


QUICK = LoadToolsPlan(rounds=1, rate_per_s=20.0, duration_s=2.0)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a tool fails."""
    plan = QUICK if quick else LoadToolsPlan()
    with scene(config) as stage, tempfile.TemporaryDirectory(prefix="pinrank-tools-") as folder:
        pins, users = Path(folder) / "pins.npy", Path(folder) / "users.npy"
        np.save(pins, stage.pin_ids)
        np.save(users, stage.user_ids)
        stage.client.submit(client.saturate, *stage.server[:2], stage.subject.requests, 2, 0.0, 1.0).result()
        rounds: list[dict[str, Any]] = []
        for number in range(plan.rounds):
            rounds.append(
                {
                    "pinrank": _pinrank(plan, stage, number),
                    "mlperf": _mlperf(plan, stage, users, pins),
                    "locust": _locust(plan, stage, users, pins, Path(folder)),
                }
            )
            yield {"rate_per_s": plan.rate_per_s, "rounds": rounds}


def _pinrank(plan: LoadToolsPlan, stage: TestBed, number: int) -> dict[str, float]:
    summary = stage.client.submit(
        client.offer, stage.server.address, stage.subject.requests, plan.rate_per_s, 0.0, plan.duration_s, SEED + number
    ).result()
    check_all_ok("pinrank load", summary)
    assert summary.latency_ms is not None, "all were answered"  # noqa: S101
    return {"p50_ms": summary.latency_ms.p50, "p99_ms": summary.latency_ms.p99}


def _mlperf(plan: LoadToolsPlan, stage: TestBed, users: Path, pins: Path) -> dict[str, float]:
    command = [
        sys.executable, "-m", "loadtest.judges.mlperf", "--address", stage.server.address,
        "--rate", f"{plan.rate_per_s:g}", "--duration", f"{plan.duration_s:g}",
        "--users", str(users), "--pins", str(pins),
    ]  # fmt: skip
    verdict = json.loads(_output(command))
    if set(verdict["statuses"]) != {OK}:
        raise BenchmarkError(f"loadgen: some answers were not OK: {verdict['statuses']}")
    return {"p50_ms": verdict["p50_ms"], "p99_ms": verdict["p99_ms"]}


def _locust(plan: LoadToolsPlan, stage: TestBed, users: Path, pins: Path, folder: Path) -> dict[str, float]:
    count = max(1, round(plan.rate_per_s / _PER_USER))
    command = [
        str(_BIN / "locust"), "-f", str(ROOT / "loadtest" / "judges" / "locustfile.py"), "--headless", "--host",
        stage.server.address, "-u", str(count), "-r", str(count), "-t", f"{max(3, round(plan.duration_s))}s",
        "--rate-per-user", f"{_PER_USER}", "--user-ids", str(users), "--pin-ids", str(pins), "--csv",
        str(folder / "locust"),
    ]  # fmt: skip
    _output(command)
    with (folder / "locust_stats.csv").open() as file:
        found = next(row for row in csv.DictReader(file) if row["Name"] == "Rank")
    return {"p50_ms": float(found["50%"]), "p99_ms": float(found["99%"])}


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]
    tools = tuple(rounds[0])
    found = {
        (tool, quantile): median([r[tool][f"{quantile}_ms"] for r in rounds])
        for tool in tools
        for quantile in ("p50", "p99")
    }
    claims = []
    for quantile in ("p50", "p99"):
        for one, other in combinations(tools, 2):
            values = found[one, quantile], found[other, quantile]
            name = f"{quantile.upper()} of {one} and {other}, the larger over the smaller"
            claims.append(Claim.ratio(name, max(values), min(values), 1.1, "at_most", "a tool rounds to 0 ms"))
    summary = {f"{tool}, {quantile.upper()} ms": value for (tool, quantile), value in found.items()}
    return Conclusion(summary, tuple(claims))
