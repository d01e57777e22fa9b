"""Overload a server at 3x its sustainable load: measure goodput, the time of refusals, and the recovery."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import client
from bench.engines.peers import plain_process
from bench.harness import Claim, Measurement, markdown_table
from bench.test_bed import CONFIG, SEED, TestBed, median, scene
from loadtest.arrivals import poisson
from loadtest.open_loop import OK, Samples

TARGET_MS = 25.0
#: Offered loads, as multiples of the highest sustainable rate.
_FACTORS = (0.7, 1.0, 1.5, 2.0, 3.0)
#: Number of consecutive good answers after a burst that count as recovered.
_NORMAL_RUN = 20


@dataclass(frozen=True, slots=True)
class OverloadPlan:
    rounds: int = 3
    warmup_s: float = 1.0
    search_s: float = 3.0
    step_s: float = 5.0
    burst_s: float = 3.0


QUICK = OverloadPlan(rounds=1, warmup_s=0.1, search_s=0.3, step_s=0.5, burst_s=0.5)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Measurement:
    """Run the benchmark. Raises BenchmarkError if the server does not start."""
    plan = QUICK if quick else OverloadPlan()
    with scene(config) as stage:
        stage.client.submit(client.saturate, *stage.server[:2], stage.subject.requests, 2, 0.0, 1.0).result()
        rounds = [_round(plan, number, stage) for number in range(plan.rounds)]
    return _conclude(rounds)


def _round(plan: OverloadPlan, number: int, stage: TestBed) -> dict[str, Any]:
    address, requests = stage.server.address, stage.subject.requests
    holds_per_s, _ = stage.client.submit(
        client.highest_rate, address, requests, 100.0, TARGET_MS, plan.warmup_s, plan.search_s, SEED + 100 * number
    ).result()
    holds_per_s = max(holds_per_s, 5.0)
    steps = []
    for factor in _FACTORS:
        summary = stage.client.submit(
            client.offer, address, requests, factor * holds_per_s, plan.warmup_s, plan.step_s, SEED + number,
            TARGET_MS / 1e3, TARGET_MS,
        ).result()  # fmt: skip
        steps.append({"factor": factor, **summary.as_json()})
    burst = 3 * holds_per_s, 0.5 * holds_per_s
    due_s = np.concatenate(
        [poisson(burst[0], plan.burst_s, SEED + number), plan.burst_s + poisson(burst[1], plan.burst_s, SEED + number)]
    )
    after = stage.client.submit(client.offer_at, address, requests, due_s, TARGET_MS / 1e3).result()
    refusal = _refusal_seconds(stage)
    with plain_process(stage.subject) as (plain_address, _):
        plain = stage.client.submit(
            client.offer, plain_address, requests, _FACTORS[-1] * holds_per_s, plan.warmup_s, plan.step_s,
            SEED + number, TARGET_MS / 1e3, TARGET_MS,
        ).result()  # fmt: skip
    return {
        "plain": plain.as_json(),
        "holds_per_s": holds_per_s,
        "steps": steps,
        "recovery_s": _recovery_s(after, plan.burst_s),
        "refusal_in_server_ms": refusal,
        "late_run_rows": stage.server.metric("pinrank_late_run_rows_total"),
    }


def _refusal_seconds(stage: TestBed) -> float:
    """Return the server's mean time from the start of parsing to a refusal, in milliseconds."""
    count = stage.server.metric("pinrank_refusal_seconds_count")
    return stage.server.metric("pinrank_refusal_seconds_sum") / count * 1e3 if count else float("nan")


def _recovery_s(samples: Samples, burst_s: float) -> float:
    """Return the seconds from the end of a burst to the first of `_NORMAL_RUN` consecutive good answers."""
    good = np.array([status == OK for status in samples.statuses]) & (samples.latency_s * 1e3 <= TARGET_MS)
    run = 0
    for i in np.flatnonzero(samples.due_s >= burst_s):
        run = run + 1 if good[i] else 0
        if run == _NORMAL_RUN:
            return float(samples.due_s[i - _NORMAL_RUN + 1] - burst_s)
    return float("inf")


def _conclude(rounds: list[dict[str, Any]]) -> Measurement:
    def at(factor: float, *path: str) -> float:
        values = []
        for r in rounds:
            value: Any = next(step for step in r["steps"] if step["factor"] == factor)
            for key in path:
                value = float("nan") if value is None else value[key]
            values.append(value)
        return median(values)

    kept = []
    for r in rounds:
        goods = [step["goodput_per_s"] for step in r["steps"]]
        kept.append(goods[-1] / max(goods) if max(goods) else float("nan"))
    recovery_s = max(r["recovery_s"] for r in rounds)
    claims = (
        Claim("goodput at 3x the rate that holds, over its peak", median(kept), 0.95, "ratio", "at_least"),
        Claim("P99 of what was accepted at 3x", at(3.0, "latency_ms", "p99"), TARGET_MS, "ms", "at_most"),
        Claim("P99 of refusals at 3x, at the client", at(3.0, "refused_ms", "p99"), 2.0, "ms", "at_most"),
        Claim("mean refusal, in the server", median([r["refusal_in_server_ms"] for r in rounds]), 2.0, "ms", "at_most"),
        Claim("back to normal after a burst, worst round", min(recovery_s, 1e6), 1.0, "s", "at_most"),
        Claim(
            "rows run after their deadline or their caller's end",
            max(r["late_run_rows"] for r in rounds), 0, "rows", "at_most",
        ),
    )  # fmt: skip
    summary = {
        "holds, requests/s": median([r["holds_per_s"] for r in rounds]),
        **{f"goodput at {f:g}x, requests/s": at(f, "goodput_per_s") for f in _FACTORS},
        "plain grpc.aio's goodput at 3x, requests/s": median([r["plain"]["goodput_per_s"] for r in rounds]),
        "refusals at 3x, P50 ms at the client": at(3.0, "refused_ms", "p50"),
        "client cores at 3x": at(3.0, "generator_cores"),
    }
    rows = [
        (
            f"{f:g}x", f"{at(f, 'offered_per_s'):.0f}", f"{at(f, 'achieved_per_s'):.0f}",
            f"{at(f, 'goodput_per_s'):.0f}", f"{at(f, 'latency_ms', 'p99'):.1f}",
        )
        for f in _FACTORS
    ]  # fmt: skip
    header = ("offered", "requests/s", "OK /s", "goodput /s", "P99 of OK ms")
    for r in rounds:
        r["recovery_s"] = min(r["recovery_s"], 1e6)
    return Measurement(
        summary, claims, {"target_ms": TARGET_MS, "rounds": rounds}, markdown_table("Overload", header, rows)
    )
