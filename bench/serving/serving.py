"""Compare the demo server with its limits: the engine alone, an ideal queue, an echo server, and plain grpc.aio.

Each round measures all of them in turn on the same cores and requests, so that a slower machine affects all of them.
The claims are about medians over the rounds. Deadlines are multiples of the time of one run on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import client
from bench.engines import engine_alone
from bench.engines.peers import echo_process, plain_process
from bench.harness import Claim, Conclusion, Raw, markdown_table
from bench.processes import cpu_seconds
from bench.provenance import instructions
from bench.serving import ideal_queue
from bench.test_bed import (
    CONFIG,
    SEED,
    TestBed,
    check_all_ok,
    known_median,
    median,
    on_a_quiet_machine,
    one_run_p50_ms,
    saturated,
    scene,
)
from loadtest.arrivals import poisson
from loadtest.open_loop import STAGES, Samples
from loadtest.report import Percentiles, summarise

#: Deadlines: multiples of the P50 of one run on one stream with nothing beside it, and the least milliseconds. A small
#: network runs in less time than a call takes; then the budget of 10 ms counts, and half of it.
DEADLINES = {"tight": (2.5, 5.0), "loose": (6.0, 10.0)}
#: What the goodput must be over plain grpc.aio's, and over the ideal queue's.
_GOODPUT = {"tight": (1.5, 0.5), "loose": (1.25, 0.8)}
_LIGHT_SHARE = 0.2
_FEATURES_SHARE = 0.8
#: Limit for P99 at a light load, by the processor's vectors: with AVX-512, or without.
_LIGHT_P99_MS = {True: 8.0, False: 12.0}


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """The amount of measurement. Seconds are per round."""

    rounds: int = 3
    one_run_s: float = 2.0
    engine_s: float = 3.0
    run_times_s: float = 5.0
    warmup_s: float = 0.5
    saturated_s: float = 4.0
    lone_s: float = 6.0
    lone_per_s: float = 10.0
    light_s: float = 8.0
    features_s: float = 6.0
    search_s: float = 3.0
    search_tries: int = 6
    callers: int = 8


QUICK = ServingPlan(
    rounds=1, one_run_s=0.2, engine_s=0.2, run_times_s=0.3, warmup_s=0.1, saturated_s=0.3, lone_s=0.5, light_s=0.5,
    features_s=0.5, search_s=0.3, search_tries=2,
)  # fmt: skip


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Measure the server of a configuration file.

    Raises:
        BenchmarkError: the server did not start, or refused or degraded an answer.
    """
    plan = QUICK if quick else ServingPlan()
    with scene(config) as stage:
        one_run_ms = one_run_p50_ms(stage, plan.one_run_s)
        stage.client.submit(client.saturate, *stage.server[:2], stage.subject.requests, 2, 0.0, 0.5).result()
        deadlines_ms = {name: deadline_ms(name, one_run_ms) for name in DEADLINES}
        rounds: list[dict[str, Any]] = []
        raw = {
            "setup": {
                "candidates": 128, "streams": stage.subject.streams, "cores": len(os.sched_getaffinity(0)),
                "instructions": instructions(), "seed": SEED, "cores_kept_awake": stage.awake,
                "one_run_ms": one_run_ms, "deadlines_ms": deadlines_ms,
            },
            "rounds": rounds,
        }  # fmt: skip
        for number in range(plan.rounds):
            rounds.append(_round(plan, number, stage, deadlines_ms))
            yield raw


def deadline_ms(name: str, one_run_ms: float) -> float:
    """Return a deadline for requests of which one run takes so long."""
    times, least_ms = DEADLINES[name]
    return max(times * one_run_ms, least_ms)


def _round(plan: ServingPlan, number: int, stage: TestBed, deadlines_ms: dict[str, float]) -> dict[str, Any]:
    subject, server = stage.subject, stage.server
    alone = stage.engine.submit(engine_alone.throughput, subject, plan.engine_s).result()
    times = stage.engine.submit(engine_alone.run_times, subject, plan.run_times_s).result()
    # What is compared is measured one after the other: the machine may change within a round.
    lone = _offered(plan, number, stage, plan.lone_per_s, plan.lone_s)
    ideal = {name: ideal_queue.goodput_per_s(times, ms / 1e3, SEED + number) for name, ms in deadlines_ms.items()}
    with plain_process(subject) as (plain_address, plain_pid):
        full = saturated(stage, subject.requests, plan.callers, plan.warmup_s, plan.saturated_s)
        plain_per_s = _saturated_peer(plan, stage, plain_address, plain_pid)
        alone_again = stage.engine.submit(engine_alone.throughput, subject, plan.engine_s).result()
        held: dict[str, Any] = {}
        plain_held: dict[str, Any] = {}
        for name, deadline_ms in deadlines_ms.items():
            first_per_s = max(8.0, max(ideal[name].values()) / 2)
            for found, address in ((held, server.address), (plain_held, plain_address)):
                found[name] = _highest(plan, number, stage, address, deadline_ms, first_per_s)
    with plain_process(subject, stage.settings.near_cache_bytes) as (address, pid):
        cached_per_s = _saturated_peer(plan, stage, address, pid)
    with echo_process(subject) as (address, pid):
        echo = _echo(plan, stage, address, pid, full["achieved_per_s"])
    light = _offered(plan, number, stage, _LIGHT_SHARE * full["achieved_per_s"], plan.light_s)
    features_per_s = _FEATURES_SHARE * max(held["loose"]["per_s"], plan.lone_per_s)
    features = _offered(plan, number, stage, features_per_s, plan.features_s)
    runs_per_s = [run.runs / run.wall_s for run in (alone, alone_again)]
    return {
        "engine_alone": {
            "runs_per_s": float(np.mean(runs_per_s)),
            "cores": float(np.mean([run.cpu_s / run.wall_s for run in (alone, alone_again)])),
            "cpu_ms_per_run": float(np.mean([run.cpu_s / run.runs * 1e3 for run in (alone, alone_again)])),
            "alone_ms": _quantiles(times.alone), "beside_ms": _quantiles(times.beside),
            "halves_ms": _quantiles(times.halves),
            "alone_rested_ms": _quantiles(times.alone_rested),
            "halves_rested_ms": _quantiles(times.halves_rested),
        },
        "ideal_per_s": ideal,
        "saturated": full,
        "lone": lone,
        "light": light,
        "features": features,
        "echo": echo,
        "goodput": held,
        "plain": {
            "saturated_per_s": plain_per_s,
            "with_near_cache_saturated_per_s": cached_per_s,
            "goodput": plain_held,
        },
    }  # fmt: skip


def _offered(plan: ServingPlan, number: int, stage: TestBed, rate_per_s: float, duration_s: float) -> dict[str, Any]:
    """Offer requests at a rate that must be answered in full, with deadlines that do not matter."""
    due_s = poisson(rate_per_s, plan.warmup_s + duration_s, SEED + number)
    samples: Samples = stage.client.submit(
        client.offer_at, stage.server.address, stage.subject.requests, due_s, client.LONG_S
    ).result()
    samples = samples.since(plan.warmup_s)
    summary = summarise(samples, duration_s, client.LONG_S * 1e3)
    check_all_ok(f"{rate_per_s:.0f} requests/s", summary)
    both_us = samples.stage_us[:, [STAGES.index("fetch"), STAGES.index("assemble")]].sum(axis=1)
    both_ms = Percentiles.of(both_us / 1e3)
    return {**summary.as_json(), "fetch_and_assemble_ms": both_ms and asdict(both_ms)}


def _saturated_peer(plan: ServingPlan, stage: TestBed, address: str, pid: int) -> float:
    """Return the highest throughput of a peer, in requests per second, with as many callers as the server had."""
    done = stage.client.submit(
        client.saturate, address, pid, stage.subject.requests, plan.callers, plan.warmup_s, plan.saturated_s
    ).result()
    check_all_ok("plain grpc.aio, saturated", done.summary)
    return float(done.summary.achieved_per_s)


def _echo(plan: ServingPlan, stage: TestBed, address: str, pid: int, rate_per_s: float) -> dict[str, float | None]:
    """Measure the CPU time of an echo per call, at the rate of the server's measurement."""
    used_s = cpu_seconds(pid)
    summary = stage.client.submit(
        client.offer, address, stage.subject.requests, rate_per_s, 0.0, plan.saturated_s, SEED
    ).result()
    calls = sum(summary.statuses.values())
    latency = summary.latency_ms
    return {
        "cpu_ms_per_call": (cpu_seconds(pid) - used_s) / calls * 1e3,
        "p50_ms": latency.p50 if latency else None,
        "p99_ms": latency.p99 if latency else None,
    }


def _highest(
    plan: ServingPlan, number: int, stage: TestBed, address: str, deadline_ms: float, first_per_s: float
) -> dict[str, Any]:
    """Search the highest rate with 99% goodput within a deadline."""
    rate_per_s, tried = stage.client.submit(
        client.highest_rate, address, stage.subject.requests, first_per_s, deadline_ms, plan.warmup_s, plan.search_s,
        SEED + 100 * number, plan.search_tries,
    ).result()  # fmt: skip
    return {"per_s": rate_per_s, "tried": [summary.as_json() for summary in tried]}


def _quantiles(seconds: np.ndarray) -> dict[str, float]:
    return dict(zip(("p50", "p99"), (np.percentile(seconds, (50, 99)) * 1e3).tolist(), strict=True))


def conclude(raw: Raw) -> Conclusion:
    setup, rounds = raw["setup"], raw["rounds"]

    def each(*path: str) -> list[Any]:
        values: list[Any] = rounds
        for key in path:
            values = [None if value is None else value[key] for value in values]
        return values

    def of(*path: str) -> float | None:
        return known_median(each(*path))

    alone, served = np.array(each("engine_alone", "runs_per_s")), np.array(each("saturated", "achieved_per_s"))
    left_by_generator = 1 - np.array(each("saturated", "generator_cores")) / setup["cores"]
    good = {name: of("goodput", name, "per_s") for name in DEADLINES}
    plain = {name: of("plain", "goodput", name, "per_s") for name in DEADLINES}
    ideal = {name: median([max(r["ideal_per_s"][name].values()) for r in rounds]) for name in DEADLINES}
    two = setup["streams"] == ideal_queue.STREAMS
    wide = setup["instructions"].startswith("avx512")
    own_ms, echo_ms = each("saturated", "own_cpu_ms_per_request"), each("echo", "cpu_ms_per_call")
    timed = (
        Claim(
            "saturated requests/s over engine alone, the load generator's CPU taken off the cores",
            float(np.median(served / (alone * left_by_generator))), 0.92, "ratio", "at_least",
        ),
        Claim(
            "saturated requests/s over plain grpc.aio's with the same engine",
            float(np.median(served / np.array(each("plain", "saturated_per_s")))), 1.15, "ratio", "at_least",
        ),
        *(
            claim
            for name in DEADLINES
            for claim in goodput_claims(name, good[name], plain[name], ideal[name] if two else None)
        ),
        Claim.ratio(
            "a lone request's P50 at the client, over the P50 of one run on one stream",
            of("lone", "latency_ms", "p50"), of("engine_alone", "alone_ms", "p50"), 0.8, "at_most",
            "no lone request was answered",
        ),
        Claim(
            f"P99 at {_LIGHT_SHARE:.0%} of saturated, on a processor {'with' if wide else 'without'} AVX-512",
            of("light", "latency_ms", "p99"), _LIGHT_P99_MS[wide], "ms", "at_most", "no request was answered",
        ),
        *(
            Claim(
                f"fetch and assembly of a request at {_FEATURES_SHARE:.0%} of the rate that holds, {quantile.upper()}",
                of("features", "fetch_and_assemble_ms", quantile) if good["loose"] else None, limit_ms, "ms", "at_most",
                "no rate holds",
            )
            for quantile, limit_ms in (("p50", 0.6), ("p99", 3.0))
        ),
    )  # fmt: skip
    claims = (
        Claim.ratio(
            "the server's CPU per request beyond the engine's runs, over a bare echo's",
            known_median(own_ms), known_median(echo_ms), 1.7, "at_most", "the echo used less CPU than can be measured",
        ),
        *on_a_quiet_machine(timed, of("engine_alone", "cores"), min(setup["streams"], setup["cores"])),
        Claim(
            "rows run after their deadline or their caller's end",
            of("saturated", "late_run_rows"), 0, "rows", "at_most",
        ),
    )  # fmt: skip
    summary = {
        "engine alone, runs/s": float(np.median(alone)),
        "engine alone, cores that it got": of("engine_alone", "cores"),
        "engine alone, core-ms per run": of("engine_alone", "cpu_ms_per_run"),
        "one run alone, P50 ms": of("engine_alone", "alone_ms", "p50"),
        "one run beside another, P50 ms": of("engine_alone", "beside_ms", "p50"),
        "two halves at once, P50 ms": of("engine_alone", "halves_ms", "p50"),
        "one run after a rest, P50 ms": of("engine_alone", "alone_rested_ms", "p50"),
        "two halves after a rest, P50 ms": of("engine_alone", "halves_rested_ms", "p50"),
        "saturated, requests/s": float(np.median(served)),
        "saturated, requests/s over engine alone": float(np.median(served / alone)),
        "saturated, server core-ms per request": of("saturated", "server_cpu_ms_per_request"),
        "saturated, of it beyond the engine's runs": known_median(own_ms),
        "saturated, client core-ms per request": of("saturated", "client_cpu_ms_per_request"),
        "echo, server core-ms per call": known_median(echo_ms),
        "echo, P50 ms": of("echo", "p50_ms"),
        "plain grpc.aio, saturated, requests/s": of("plain", "saturated_per_s"),
        "plain grpc.aio with our near cache, saturated, requests/s": of("plain", "with_near_cache_saturated_per_s"),
        **{f"the {name} deadline, ms": ms for name, ms in setup["deadlines_ms"].items()},
        **{f"goodput at the {name} deadline, requests/s": good[name] for name in DEADLINES},
        **{f"ideal queue at the {name} deadline, requests/s": ideal[name] for name in DEADLINES},
        **{f"plain grpc.aio at the {name} deadline, requests/s": plain[name] for name in DEADLINES},
        "a lone request, P50 ms": of("lone", "latency_ms", "p50"),
        "a lone request, P99 ms": of("lone", "latency_ms", "p99"),
        f"at {_LIGHT_SHARE:.0%} of saturated, P50 ms": of("light", "latency_ms", "p50"),
        f"at {_LIGHT_SHARE:.0%} of saturated, P99 ms": of("light", "latency_ms", "p99"),
    }
    table = markdown_table(
        "A request's time in the server, by stage (medians)",
        ("stage", "one at a time, ms", "saturated, ms"),
        [
            (stage, f"{of('lone', 'stage_ms', stage):.3f}", f"{of('saturated', 'stage_ms', stage):.3f}")
            for stage in rounds[0]["lone"]["stage_ms"]
        ],
    )
    return Conclusion(summary, claims, table)


def goodput_claims(name: str, good: float | None, plain: float | None, ideal: float | None) -> tuple[Claim, Claim]:
    over_plain, over_ideal = _GOODPUT[name]
    times, least_ms = DEADLINES[name]
    what = f"goodput at the {name} deadline, {times:g}x one run's P50 and at least {least_ms:g} ms"
    return (
        Claim.ratio(
            f"{what}, over plain grpc.aio's", good, plain, over_plain, "at_least", "plain grpc.aio holds no rate"
        ),
        Claim.ratio(
            f"{what}, over an ideal queue's",
            good,
            ideal,
            over_ideal,
            "at_least",
            "the ideal queue holds no rate" if ideal == 0 else "the ideal queue is one of two streams",
        ),
    )
