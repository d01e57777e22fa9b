"""Overload a server at 3x its sustainable load with clients that retry, and with clients that do not.

The documented policy retries UNAVAILABLE and has a budget. For contrast, another one retries RESOURCE_EXHAUSTED
too, and a third only DATA_LOSS, which never comes: it shows what gRPC's machinery for retries costs by itself.
The deadline is 100 ms, so that there is time for retries: the first one waits for up to 10 ms.

The server and the clients have a core each, as they have machines of their own in production: on shared cores, what the
clients spend is missing at the server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import client
from bench.attacks.clients import Load, offer, outcome, results_of
from bench.harness import Claim, Conclusion, Raw
from bench.test_bed import CONFIG, SEED, TestBed, known_median, known_ratio, scene
from loadtest.arrivals import poisson
from pinrank.channels import SERVICE_CONFIG

_FACTOR, _DEADLINE_MS = 3.0, 100.0
#: The least that is offered, where a busy machine holds no rate.
_HOLDS_PER_S_MIN = 5.0
#: So many that three times what the server holds is little work for the clients, which share its cores.
_CANDIDATES = 1_000


def _retrying(*statuses: str) -> dict[str, Any]:
    """Return the documented policy with other statuses."""
    config = deepcopy(SERVICE_CONFIG)
    config["methodConfig"][0]["retryPolicy"]["retryableStatusCodes"] = list(statuses)
    return config


_POLICIES = {
    "none": None,
    "documented": SERVICE_CONFIG,
    "RESOURCE_EXHAUSTED too": _retrying("UNAVAILABLE", "RESOURCE_EXHAUSTED"),
    "never": _retrying("DATA_LOSS"),
}


@dataclass(frozen=True, slots=True)
class RetriesPlan:
    rounds: int = 6
    warmup_s: float = 1.0
    search_s: float = 3.0
    step_s: float = 6.0


QUICK = RetriesPlan(rounds=1, warmup_s=0.1, search_s=0.3, step_s=0.5)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the server does not start."""
    plan = QUICK if quick else RetriesPlan()
    *others, last = sorted(os.sched_getaffinity(0))
    with _on_cores(others or [last]), scene(config, candidates=_CANDIDATES) as stage, _on_cores([last]):
        stage.client.submit(client.saturate, *stage.server[:2], stage.subject.requests, 2, 0.0, 1.0).result()
        rounds: list[dict[str, Any]] = []
        for number in range(plan.rounds):
            rounds.append(_round(plan, number, stage))
            yield {"deadline_ms": _DEADLINE_MS, "step_s": plan.step_s, "rounds": rounds}


@contextmanager
def _on_cores(some: list[int]) -> Iterator[None]:
    """Let the processes that are started in the block use these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, some)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _round(plan: RetriesPlan, number: int, stage: TestBed) -> dict[str, Any]:
    address, requests = stage.server.address, stage.subject.requests
    holds_per_s, _ = stage.client.submit(
        client.highest_rate, address, requests, 100.0, _DEADLINE_MS, plan.warmup_s, plan.search_s, SEED + 100 * number
    ).result()
    holds_per_s = max(holds_per_s, _HOLDS_PER_S_MIN)
    due_s = poisson(_FACTOR * holds_per_s, plan.warmup_s + plan.step_s, SEED + number)
    found: dict[str, Any] = {"holds_per_s": holds_per_s}
    for name in _POLICIES if number % 2 else reversed(_POLICIES):
        load = Load(address, requests, _DEADLINE_MS / 1e3, due_s, service_config=_POLICIES[name])
        before = stage.server.metric("pinrank_requests_total")
        ((samples,),) = results_of(partial(offer, (load,)))
        calls = stage.server.metric("pinrank_requests_total") - before
        made = len(samples.statuses)
        found[name] = {
            **outcome(samples.since(plan.warmup_s), _DEADLINE_MS / 1e3),
            "calls_at_server_per_call": calls / made if made else None,
        }
    return found


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]
    goods: dict[str, list[float | None]] = {
        name: [r[name]["good"] / raw["step_s"] for r in rounds] for name in _POLICIES
    }
    none = "without retries, nothing was answered in time"
    claims = (
        Claim(
            "goodput at 3x with the documented retries, over without",
            known_ratio(goods["documented"], goods["none"]), 0.95, "ratio", "at_least", none,
        ),
    )  # fmt: skip
    summary: dict[str, float | None] = {"holds, requests/s": known_median([r["holds_per_s"] for r in rounds])}
    for name in ("RESOURCE_EXHAUSTED too", "never"):
        summary[f"retries: {name}, goodput over without"] = known_ratio(goods[name], goods["none"])
    for name in _POLICIES:
        summary[f"retries: {name}, goodput /s"] = known_median(goods[name])
        summary[f"retries: {name}, calls at the server for one"] = known_median(
            [r[name]["calls_at_server_per_call"] for r in rounds]
        )
    return Conclusion(summary, claims)
