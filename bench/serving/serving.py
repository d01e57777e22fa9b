"""Compare the demo server with its limits: the engine alone, an ideal queue, an echo server, and plain grpc.aio.

Each round measures all of them in turn on the same cores and requests, so that a slower machine affects all of them.
The claims are about medians over the rounds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import client
from bench.engines import engine_alone
from bench.engines.peers import echo_process, plain_process
from bench.harness import Claim, Measurement, markdown_table
from bench.processes import ServerProcess, cpu_seconds
from bench.serving import ideal_queue
from bench.test_bed import CONFIG, SEED, TestBed, check_all_ok, median, scene
from loadtest.open_loop import OK

TARGETS_MS = (10.0, 25.0)
#: Limit for the server's own CPU time per request, and the CPU time of an echo on the machine for which it was set.
_OWN_CPU_MS, _ECHO_CPU_MS = 0.45, 0.23


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """The amount of measurement. Seconds are per round."""

    rounds: int = 3
    engine_s: float = 3.0
    run_times_s: float = 5.0
    warmup_s: float = 0.5
    saturated_s: float = 4.0
    quiet_s: float = 4.0
    quiet_per_s: float = 25.0
    search_s: float = 3.0
    search_tries: int = 7
    callers: int = 8


QUICK = ServingPlan(
    rounds=1, engine_s=0.2, run_times_s=0.3, warmup_s=0.1, saturated_s=0.3, quiet_s=0.5, search_s=0.3, search_tries=2
)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Measurement:
    """Measure the server of a configuration file.

    Raises:
        BenchmarkError: the server did not start, or refused or degraded an answer.
    """
    plan = QUICK if quick else ServingPlan()
    with scene(config) as stage:
        stage.engine.submit(engine_alone.throughput, stage.subject, 0.2).result()
        stage.client.submit(client.saturate, *stage.server[:2], stage.subject.requests, 2, 0.0, 0.5).result()
        rounds = [_round(plan, number, stage) for number in range(plan.rounds)]
    return _conclude(stage, rounds)


def _round(plan: ServingPlan, number: int, stage: TestBed) -> dict[str, Any]:
    subject, server = stage.subject, stage.server
    alone = stage.engine.submit(engine_alone.throughput, subject, plan.engine_s).result()
    times = stage.engine.submit(engine_alone.run_times, subject, plan.run_times_s).result()
    ideal = {target: ideal_queue.goodput_per_s(times, target / 1e3, SEED + number) for target in TARGETS_MS}
    saturated = _saturated(plan, stage, server)
    alone_again = stage.engine.submit(engine_alone.throughput, subject, plan.engine_s).result()
    quiet = stage.client.submit(
        client.offer, server.address, subject.requests, plan.quiet_per_s, plan.warmup_s, plan.quiet_s, SEED + number
    ).result()
    check_all_ok("quiet", quiet)
    with echo_process(subject) as (address, pid):
        echo = _echo(plan, stage, address, pid, saturated["achieved_per_s"])
    held = _highest(plan, number, stage, server.address, ideal)
    with plain_process(subject) as (address, _):
        plain = _highest(plan, number, stage, address, ideal)
    runs_per_s = [run.runs / run.wall_s for run in (alone, alone_again)]
    return {
        "engine_alone": {
            "runs_per_s": float(np.mean(runs_per_s)),
            "cpu_ms_per_run": float(np.mean([run.cpu_s / run.runs * 1e3 for run in (alone, alone_again)])),
            "alone_ms": _quantiles(times.alone), "beside_ms": _quantiles(times.beside),
            "halves_ms": _quantiles(times.halves),
            "alone_rested_ms": _quantiles(times.alone_rested),
            "halves_rested_ms": _quantiles(times.halves_rested),
        },
        "ideal_per_s": {f"{target:g}": found for target, found in ideal.items()},
        "saturated": saturated,
        "quiet": quiet.as_json(),
        "echo": echo,
        "goodput": held,
        "plain": plain,
    }  # fmt: skip


def _saturated(plan: ServingPlan, stage: TestBed, server: ServerProcess) -> dict[str, Any]:
    before_s = server.metric("pinrank_run_cpu_seconds_total"), cpu_seconds(server.pid)
    done = stage.client.submit(
        client.saturate, *server[:2], stage.subject.requests, plan.callers, plan.warmup_s, plan.saturated_s
    ).result()
    run_s = server.metric("pinrank_run_cpu_seconds_total") - before_s[0]
    all_s = cpu_seconds(server.pid) - before_s[1]
    check_all_ok("saturated", done.summary)
    answered = done.summary.statuses[OK]
    per_request_ms = done.server_cpu_s / answered * 1e3
    return {
        **done.summary.as_json(),
        "callers": plan.callers,
        "server_cpu_ms_per_request": per_request_ms,
        # For the whole call, because the two counters cannot be read at the ends of the window.
        "own_cpu_ms_per_request": per_request_ms * (1 - run_s / all_s),
        "client_cpu_ms_per_request": done.summary.generator_cores * plan.saturated_s / answered * 1e3,
        "late_run_rows": server.metric("pinrank_late_run_rows_total"),
    }


def _echo(plan: ServingPlan, stage: TestBed, address: str, pid: int, rate_per_s: float) -> dict[str, float]:
    """Measure the CPU time of an echo per call, at the rate of the server's measurement."""
    used_s = cpu_seconds(pid)
    summary = stage.client.submit(
        client.offer, address, stage.subject.requests, rate_per_s, 0.0, plan.saturated_s, SEED
    ).result()
    calls = sum(summary.statuses.values())
    latency = summary.latency_ms
    return {
        "cpu_ms_per_call": (cpu_seconds(pid) - used_s) / calls * 1e3,
        "p50_ms": latency.p50 if latency else float("nan"),
        "p99_ms": latency.p99 if latency else float("nan"),
    }


def _highest(
    plan: ServingPlan, number: int, stage: TestBed, address: str, ideal: dict[float, dict[str, float]]
) -> dict[str, Any]:
    found = {}
    for target_ms in TARGETS_MS:
        first_per_s = max(8.0, max(ideal[target_ms].values()) / 2)
        rate_per_s, tried = stage.client.submit(
            client.highest_rate, address, stage.subject.requests, first_per_s, target_ms, plan.warmup_s, plan.search_s,
            SEED + 100 * number, plan.search_tries,
        ).result()  # fmt: skip
        found[f"{target_ms:g}"] = {"per_s": rate_per_s, "tried": [summary.as_json() for summary in tried]}
    return found


def _quantiles(seconds: np.ndarray) -> dict[str, float]:
    return dict(zip(("p50", "p99"), (np.percentile(seconds, (50, 99)) * 1e3).tolist(), strict=True))


def _conclude(stage: TestBed, rounds: list[dict[str, Any]]) -> Measurement:
    cores = len(os.sched_getaffinity(0))

    def of(*path: str) -> float:
        values: list[Any] = rounds
        for key in path:
            values = [value[key] for value in values]
        return median(values)

    alone = np.array([r["engine_alone"]["runs_per_s"] for r in rounds])
    served = np.array([r["saturated"]["achieved_per_s"] for r in rounds])
    left_by_generator = 1 - np.array([r["saturated"]["generator_cores"] for r in rounds]) / cores
    own_ms, echo_ms = of("saturated", "own_cpu_ms_per_request"), of("echo", "cpu_ms_per_call")
    over_echo = median([r["saturated"]["own_cpu_ms_per_request"] / r["echo"]["cpu_ms_per_call"] for r in rounds])
    good = {f"{t:g}": of("goodput", f"{t:g}", "per_s") for t in TARGETS_MS}
    plain = {f"{t:g}": of("plain", f"{t:g}", "per_s") for t in TARGETS_MS}
    ideal = {f"{t:g}": median([max(r["ideal_per_s"][f"{t:g}"].values()) for r in rounds]) for t in TARGETS_MS}
    claims = (
        Claim(
            "saturated requests/s over engine alone, the load generator's CPU taken off the cores",
            float(np.median(served / (alone * left_by_generator))), 0.9, "ratio", "at_least",
        ),
        *(
            Claim(f"goodput at P99 <= {t} ms over an ideal queue's", good[t] / ideal[t], 0.9, "ratio", "at_least")
            for t in good
        ),
        Claim("server CPU per request beyond the engine's runs", own_ms, _OWN_CPU_MS, "core-ms", "at_most"),
        Claim(
            "the same over a bare echo's, where 0.45 and 0.23 core-ms are meant",
            over_echo, _OWN_CPU_MS / _ECHO_CPU_MS, "ratio", "at_most",
        ),
        Claim(
            "rows run after their deadline or their caller's end",
            of("saturated", "late_run_rows"), 0, "rows", "at_most",
        ),
    )  # fmt: skip
    summary = {
        "engine alone, runs/s": float(np.median(alone)),
        "engine alone, core-ms per run": of("engine_alone", "cpu_ms_per_run"),
        "one run alone, P50 ms": of("engine_alone", "alone_ms", "p50"),
        "one run beside another, P50 ms": of("engine_alone", "beside_ms", "p50"),
        "two halves at once, P50 ms": of("engine_alone", "halves_ms", "p50"),
        "one run after a rest, P50 ms": of("engine_alone", "alone_rested_ms", "p50"),
        "two halves after a rest, P50 ms": of("engine_alone", "halves_rested_ms", "p50"),
        "saturated, requests/s": float(np.median(served)),
        "saturated, requests/s over engine alone": float(np.median(served / alone)),
        "saturated, server core-ms per request": of("saturated", "server_cpu_ms_per_request"),
        "saturated, of it beyond the engine's runs": own_ms,
        "saturated, client core-ms per request": of("saturated", "client_cpu_ms_per_request"),
        "echo, server core-ms per call": echo_ms,
        "echo, P50 ms": of("echo", "p50_ms"),
        **{f"goodput at P99 <= {t} ms, requests/s": good[t] for t in good},
        **{f"ideal queue at P99 <= {t} ms, requests/s": ideal[t] for t in ideal},
        **{f"plain grpc.aio at P99 <= {t} ms, requests/s": plain[t] for t in plain},
        "quiet, P50 ms": of("quiet", "latency_ms", "p50"),
        "quiet, P99 ms": of("quiet", "latency_ms", "p99"),
    }
    setup = {
        "candidates": 128, "streams": stage.subject.streams, "cores": cores, "seed": SEED,
        "cores_kept_awake": stage.awake,
    }  # fmt: skip
    stages = rounds[0]["quiet"]["stage_ms"]
    table = markdown_table(
        "A request's time in the server, by stage (medians, one request at a time)",
        ("stage", "quiet ms", "saturated ms"),
        [(s, f"{of('quiet', 'stage_ms', s):.3f}", f"{of('saturated', 'stage_ms', s):.3f}") for s in stages],
    )
    return Measurement(summary, claims, {"setup": setup, "rounds": rounds}, table)
