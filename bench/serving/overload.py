"""Overload a server at 3x its sustainable load: measure goodput, the time of refusals, and the recovery.

The deadline is the loose one of the serving benchmark. An echo server runs beside the server, on the same cores and
under the same load: its latency is what gRPC and a busy machine cost a call that needs no work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import client
from bench.engines.peers import echo_process, plain_process
from bench.harness import Claim, Conclusion, Raw, markdown_table
from bench.serving.serving import deadline_ms
from bench.test_bed import CONFIG, SEED, TestBed, cores_got, known_median, on_a_quiet_machine, one_run_p50_ms, scene
from loadtest.arrivals import poisson
from loadtest.open_loop import OK, Samples
from loadtest.report import Percentiles, summarise

#: Offered loads, as multiples of the highest sustainable rate.
_FACTORS = (0.7, 1.0, 1.5, 2.0, 3.0)
#: Number of consecutive good answers after a burst that count as recovered.
_NORMAL_RUN = 20
#: Echoes per second beside the load: enough for a P99, and a few percent of a core.
_ECHOES_PER_S = 100.0


@dataclass(frozen=True, slots=True)
class OverloadPlan:
    rounds: int = 3
    one_run_s: float = 2.0
    warmup_s: float = 1.0
    search_s: float = 3.0
    step_s: float = 5.0
    burst_s: float = 3.0


QUICK = OverloadPlan(rounds=1, one_run_s=0.2, warmup_s=0.1, search_s=0.3, step_s=0.5, burst_s=0.5)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the server does not start."""
    plan = QUICK if quick else OverloadPlan()
    with scene(config) as stage:
        target_ms = deadline_ms("loose", one_run_p50_ms(stage, plan.one_run_s))
        stage.client.submit(client.saturate, *stage.server[:2], stage.subject.requests, 2, 0.0, 1.0).result()
        rounds: list[dict[str, Any]] = []
        for number in range(plan.rounds):
            rounds.append(_round(plan, number, stage, target_ms))
            meant = min(stage.subject.streams, len(os.sched_getaffinity(0)))
            yield {"target_ms": target_ms, "cores": meant, "rounds": rounds}


def _round(plan: OverloadPlan, number: int, stage: TestBed, target_ms: float) -> dict[str, Any]:
    address, requests = stage.server.address, stage.subject.requests
    holds_per_s, _ = stage.client.submit(
        client.highest_rate, address, requests, 100.0, target_ms, plan.warmup_s, plan.search_s, SEED + 100 * number
    ).result()
    holds_per_s = max(holds_per_s, 5.0)
    cores = cores_got(stage, plan.one_run_s / 2)
    with echo_process(stage.subject) as (echo_address, _):
        steps = [
            _step(plan, number, stage, (address, echo_address), factor, holds_per_s, target_ms) for factor in _FACTORS
        ]
    burst = 3 * holds_per_s, 0.5 * holds_per_s
    due_s = np.concatenate(
        [poisson(burst[0], plan.burst_s, SEED + number), plan.burst_s + poisson(burst[1], plan.burst_s, SEED + number)]
    )
    after = stage.client.submit(client.offer_at, address, requests, due_s, target_ms / 1e3).result()
    refusal = _refusal_ms(stage)
    with plain_process(stage.subject) as (plain_address, _):
        plain = stage.client.submit(
            client.offer, plain_address, requests, _FACTORS[-1] * holds_per_s, plan.warmup_s, plan.step_s,
            SEED + number, target_ms / 1e3, target_ms,
        ).result()  # fmt: skip
    return {
        "plain": plain.as_json(),
        "holds_per_s": holds_per_s,
        "engine_alone_cores": cores,
        "steps": steps,
        "recovery_s": _recovery_s(after, plan.burst_s, target_ms),
        "refusal_in_server_ms": refusal,
        "late_run_rows": stage.server.metric("pinrank_late_run_rows_total"),
    }


def _step(
    plan: OverloadPlan,
    number: int,
    stage: TestBed,
    addresses: tuple[str, str],
    factor: float,
    holds_per_s: float,
    target_ms: float,
) -> dict[str, Any]:
    """Offer a multiple of the rate that holds, and echoes beside it, from one client."""
    total_s = plan.warmup_s + plan.step_s
    offered, echoes = stage.client.submit(
        client.offer_two,
        client.Offered(
            addresses[0], stage.subject.requests, poisson(factor * holds_per_s, total_s, SEED + number), target_ms / 1e3
        ),
        client.Offered(
            addresses[1], stage.subject.requests, poisson(_ECHOES_PER_S, total_s, SEED + 50 + number), client.LONG_S
        ),
    ).result()
    summary = summarise(offered.since(plan.warmup_s), plan.step_s, target_ms)
    echo_ms = Percentiles.of(echoes.since(plan.warmup_s).latency_s * 1e3)
    return {"factor": factor, "echo_ms": echo_ms and asdict(echo_ms), **summary.as_json()}


def _refusal_ms(stage: TestBed) -> float | None:
    """Return the server's mean time from the start of parsing to a refusal; None if it refused nothing."""
    count = stage.server.metric("pinrank_refusal_seconds_count")
    return stage.server.metric("pinrank_refusal_seconds_sum") / count * 1e3 if count else None


def _recovery_s(samples: Samples, burst_s: float, target_ms: float) -> float | None:
    """Return the seconds from the end of a burst to the first of `_NORMAL_RUN` consecutive good answers, if any."""
    good = np.array([status == OK for status in samples.statuses]) & (samples.latency_s * 1e3 <= target_ms)
    run = 0
    for i in np.flatnonzero(samples.due_s >= burst_s):
        run = run + 1 if good[i] else 0
        if run == _NORMAL_RUN:
            return float(samples.due_s[i - _NORMAL_RUN + 1] - burst_s)
    return None


def conclude(raw: Raw) -> Conclusion:
    rounds, target_ms = raw["rounds"], raw["target_ms"]

    def at(factor: float, *path: str) -> float | None:
        values = []
        for r in rounds:
            value: Any = next(step for step in r["steps"] if step["factor"] == factor)
            for key in path:
                value = None if value is None else value[key]
            values.append(value)
        return known_median(values)

    kept = []
    for r in rounds:
        goods = [step["goodput_per_s"] for step in r["steps"]]
        kept.append(goods[-1] / max(goods) if max(goods) else None)
    recoveries = [r["recovery_s"] for r in rounds]
    timed = (
        Claim(
            "goodput at 3x the rate that holds, over its peak",
            known_median(kept), 0.95, "ratio", "at_least", "no answer was in time at any load",
        ),
        Claim.ratio(
            "P99 of what was accepted at 3x, over the deadline",
            at(3.0, "latency_ms", "p99"), target_ms, 1.0, "at_most", "nothing was accepted at 3x",
        ),
        Claim.ratio(
            "P99 of refusals at 3x, at the client, over an echo's beside them",
            at(3.0, "refused_ms", "p99"), at(3.0, "echo_ms", "p99"), 1.5, "at_most", "nothing was refused at 3x",
        ),
        Claim(
            "mean refusal, in the server",
            known_median([r["refusal_in_server_ms"] for r in rounds]), 2.0, "ms", "at_most", "nothing was refused",
        ),
        Claim(
            "back to normal after a burst, worst round",
            None if None in recoveries else max(recoveries), 1.0, "s", "at_most",
            f"a round ended before {_NORMAL_RUN} good answers in a row",
        ),
    )  # fmt: skip
    claims = (
        *on_a_quiet_machine(timed, known_median([r["engine_alone_cores"] for r in rounds]), raw["cores"]),
        Claim(
            "rows run after their deadline or their caller's end",
            max(r["late_run_rows"] for r in rounds), 0, "rows", "at_most",
        ),
    )  # fmt: skip
    summary = {
        "engine alone, cores that it got": known_median([r["engine_alone_cores"] for r in rounds]),
        "the deadline, ms": target_ms,
        "holds, requests/s": known_median([r["holds_per_s"] for r in rounds]),
        **{f"goodput at {f:g}x, requests/s": at(f, "goodput_per_s") for f in _FACTORS},
        "plain grpc.aio's goodput at 3x, requests/s": known_median([r["plain"]["goodput_per_s"] for r in rounds]),
        "refusals at 3x, P50 ms at the client": at(3.0, "refused_ms", "p50"),
        "refusals at 3x, P99 ms at the client": at(3.0, "refused_ms", "p99"),
        "echoes at 3x, P50 ms at the client": at(3.0, "echo_ms", "p50"),
        "echoes at 3x, P99 ms at the client": at(3.0, "echo_ms", "p99"),
        "client cores at 3x": at(3.0, "generator_cores"),
    }
    columns = (
        ("offered_per_s",), ("achieved_per_s",), ("goodput_per_s",), ("latency_ms", "p99"), ("echo_ms", "p99"),
    )  # fmt: skip
    found = {f: [at(f, *column) for column in columns] for f in _FACTORS}
    rows = [(f"{f:g}x", *("-" if value is None else f"{value:.1f}" for value in found[f])) for f in _FACTORS]
    header = ("offered", "requests/s", "OK /s", "goodput /s", "P99 of OK ms", "P99 of an echo beside it ms")
    return Conclusion(summary, claims, markdown_table("Overload", header, rows))
