"""Measure what the impression log costs a server at 70% of its saturated rate: CPU time and P99.

Rounds alternate between a server without a log and one that logs every answer with all its pins. Both servers run all
the time, but only one of them gets requests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import client
from bench.harness import Claim, Conclusion, Raw
from bench.processes import cpu_seconds
from bench.test_bed import CONFIG, SEED, TestBed, check_all_ok, known_median, known_ratio, saturated, scene

#: What the log may cost a request, in milliseconds of one core, and by what P99 may grow.
_COST_MS_MAX, _P99_RATIO_MAX = 0.10, 1.03
_LOAD = 0.7


@dataclass(frozen=True, slots=True)
class LogPlan:
    rounds: int = 7
    warmup_s: float = 1.0
    step_s: float = 12.0
    saturated_s: float = 4.0
    callers: int = 8


QUICK = LogPlan(rounds=1, warmup_s=0.2, step_s=1.0, saturated_s=0.5)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start, or refuses or degrades an answer."""
    plan = QUICK if quick else LogPlan()
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-log-"))
        plain = stack.enter_context(scene(config))
        logging = stack.enter_context(scene(config, extra=f'[impressions]\nto = "file://{folder}"\n'))
        highest = saturated(plain, plain.subject.requests, plan.callers, plan.warmup_s, plan.saturated_s)
        rate_per_s = _LOAD * highest["achieved_per_s"]
        for number in range(plan.rounds):
            both = {"without": plain, "with": logging}
            order = list(both) if number % 2 == 0 else list(both)[::-1]
            found = {name: _offered(plan, number, both[name], rate_per_s) for name in order}
            rounds.append(found)
            written = _counts(logging)
            yield {"plan": asdict(plan), "rate_per_s": rate_per_s, "rounds": rounds, "log": written}


def _offered(plan: LogPlan, number: int, stage: TestBed, rate_per_s: float) -> dict[str, float | None]:
    """Offer requests at a rate that must be answered in full, and take the server's CPU time around it."""
    stage.client.submit(
        client.offer, stage.server.address, stage.subject.requests, rate_per_s, 0.0, plan.warmup_s, SEED
    ).result()
    runs_s, used_s = stage.server.metric("pinrank_run_cpu_seconds_total"), cpu_seconds(stage.server.pid)
    summary = stage.client.submit(
        client.offer, stage.server.address, stage.subject.requests, rate_per_s, 0.0, plan.step_s, SEED + number
    ).result()
    used_s = cpu_seconds(stage.server.pid) - used_s
    runs_s = stage.server.metric("pinrank_run_cpu_seconds_total") - runs_s
    check_all_ok(f"{rate_per_s:.0f} requests/s", summary)
    calls, latency = sum(summary.statuses.values()), summary.latency_ms
    return {
        "cpu_ms_per_request": used_s / calls * 1e3,
        "own_cpu_ms_per_request": (used_s - runs_s) / calls * 1e3,
        "p50_ms": latency.p50 if latency else None,
        "p99_ms": latency.p99 if latency else None,
    }


def _counts(stage: TestBed) -> dict[str, float]:
    counts = stage.server.samples("pinrank_impression_log_rows_total")
    outcomes = {"written", "dropped", "unfit"}
    found = {outcome: sum(v for labels, v in counts if labels["outcome"] == outcome) for outcome in sorted(outcomes)}
    return {**found, "answered": stage.server.metric("pinrank_request_seconds_count")}


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]

    def of(side: str, name: str) -> list[float | None]:
        return [one[side][name] for one in rounds]

    own = [(one["with"]["own_cpu_ms_per_request"], one["without"]["own_cpu_ms_per_request"]) for one in rounds]
    cost_ms = known_median([a - b for a, b in own])
    p99 = known_ratio(of("with", "p99_ms"), of("without", "p99_ms"))
    dropped = raw["log"]["dropped"] + raw["log"]["unfit"]
    claims = (
        Claim("the log's CPU time a request", cost_ms, _COST_MS_MAX, "core-ms", "at_most"),
        Claim("P99 with the log / without it", p99, _P99_RATIO_MAX, "ratio", "at_most"),
        Claim("rows dropped", dropped, 0, "rows", "at_most"),
    )
    summary = {
        "requests/s": raw["rate_per_s"],
        "core-ms a request without the log": known_median(of("without", "own_cpu_ms_per_request")),
        "core-ms a request with the log": known_median(of("with", "own_cpu_ms_per_request")),
        "P99 without the log, ms": known_median(of("without", "p99_ms")),
        "P99 with the log, ms": known_median(of("with", "p99_ms")),
        "P50 without the log, ms": known_median(of("without", "p50_ms")),
        "P50 with the log, ms": known_median(of("with", "p50_ms")),
    }
    return Conclusion(summary, claims)
