"""Measure what 2,000-candidate requests, at the share of their surface, cost concurrent 64-candidate requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import client
from bench.harness import Claim, Conclusion, Raw
from bench.test_bed import CONFIG, SEED, TestBed, known_median, known_ratio, median, saturated_per_s, scene
from loadtest.arrivals import poisson
from loadtest.report import summarise
from loadtest.workload import Workload
from pinrank.v1 import ranking_pb2

_SHARE = 0.3
_NONE = "no small request was answered beside large ones, or without"
_SMALL, _LARGE = 64, 2_000
_SMALL_DEADLINE_S, _LARGE_DEADLINE_S = 0.25, 2.0
_SURFACES = f"""
[surfaces.home]
share = {1 - _SHARE}
priority = 1
[surfaces.related]
share = {_SHARE}
"""


@dataclass(frozen=True, slots=True)
class IsolationPlan:
    rounds: int = 4
    saturated_s: float = 2.0
    warmup_s: float = 1.0
    step_s: float = 8.0
    #: Load of small requests, as a share of how many of them a saturated server answers.
    small_share: float = 0.25


QUICK = IsolationPlan(rounds=1, saturated_s=0.3, warmup_s=0.2, step_s=1.0)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the server does not start."""
    plan = QUICK if quick else IsolationPlan()
    with scene(config, extra=_SURFACES, candidates=_SMALL) as stage:
        large = tuple(_related(stage))
        stage.client.submit(client.saturate, *stage.server[:2], stage.subject.requests, 2, 0.0, 1.0).result()
        rounds: list[dict[str, Any]] = []
        for number in range(plan.rounds):
            rounds.append(_round(plan, number, stage, large))
            yield {"share": _SHARE, "rounds": rounds}


def _related(stage: TestBed) -> list[bytes]:
    """Create large requests for the other surface, which ranks against a query."""
    made = []
    workload = Workload(stage.user_ids, stage.pin_ids, ((_LARGE, 1.0),), surface="related", seed=SEED + 1)
    for content in workload.requests(32):
        request = ranking_pb2.RankRequest.FromString(content)
        request.query.pin_id = int(stage.pin_ids[0])
        made.append(request.SerializeToString())
    return made


def _round(plan: IsolationPlan, number: int, stage: TestBed, large: tuple[bytes, ...]) -> dict[str, Any]:
    small_per_s = plan.small_share * saturated_per_s(stage, stage.subject.requests, plan.saturated_s)
    large_per_s = _SHARE * saturated_per_s(stage, large, plan.saturated_s)
    total_s = plan.warmup_s + plan.step_s
    small_due_s = poisson(small_per_s, total_s, SEED + number)
    large_due_s = poisson(large_per_s, total_s, SEED + 50 + number)
    small = client.Offered(stage.server.address, stage.subject.requests, small_due_s, _SMALL_DEADLINE_S)
    huge_ones = client.Offered(stage.server.address, large, large_due_s, _LARGE_DEADLINE_S)
    without, _ = stage.client.submit(client.offer_two, small, replace(huge_ones, due_s=np.empty(0))).result()
    beside, huge = stage.client.submit(client.offer_two, small, huge_ones).result()
    return {
        "small_per_s": small_per_s,
        "large_per_s": large_per_s,
        **{
            name: summarise(samples.since(plan.warmup_s), plan.step_s, 1e3 * _SMALL_DEADLINE_S).as_json()
            for name, samples in (("without", without), ("beside", beside))
        },
        "large": summarise(huge.since(plan.warmup_s), plan.step_s, 1e3 * _LARGE_DEADLINE_S).as_json(),
    }


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]

    def of(step: str, quantile: str) -> list[float | None]:
        return [r[step]["latency_ms"][quantile] if r[step]["latency_ms"] else None for r in rounds]

    ratio = known_ratio(of("beside", "p99"), of("without", "p99"))
    claims = (
        Claim(
            "P99 of 64-candidate requests beside 2,000-candidate ones, over without",
            ratio,
            1.5,
            "ratio",
            "at_most",
            _NONE,
        ),
    )
    summary = {
        "64 candidates, requests/s": median([r["small_per_s"] for r in rounds]),
        "2,000 candidates, requests/s": median([r["large_per_s"] for r in rounds]),
        "64 candidates without, P50 ms": known_median(of("without", "p50")),
        "64 candidates without, P99 ms": known_median(of("without", "p99")),
        "64 candidates beside, P50 ms": known_median(of("beside", "p50")),
        "64 candidates beside, P99 ms": known_median(of("beside", "p99")),
        "2,000 candidates, P50 ms": known_median(of("large", "p50")),
        "2,000 candidates answered in time, part": median([r["large"]["good_share"] for r in rounds]),
    }
    return Conclusion(summary, claims)
