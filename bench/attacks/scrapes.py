"""Measure what the HTTP port costs Rank: calls at a moderate rate alone, beside scrapes, and beside a connect flood.

Beside the flood, health checks are made as the image's own is: with a limit of one second.
"""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import create_connection
from typing import Any
from urllib.parse import urlsplit

from bench import client
from bench.attacks.clients import begin, clients, is_over
from bench.harness import Claim, Conclusion, Raw
from bench.test_bed import CONFIG, SEED, TestBed, known_median, known_ratio, saturated_per_s, scene

#: Rate of Rank calls, as a share of what a saturated server answers.
_SHARE = 0.3
_SCRAPES_PER_S = (0, 1, 50)
_CHECKS_PER_S, _CHECK_S = 10, 1.0
#: Connections that the flood makes before it closes them, by each of its processes.
_FLOOD, _FLOODS = 200, 2
_NONE = "no Rank call was answered, or no health check made"


@dataclass(frozen=True, slots=True)
class ScrapesPlan:
    rounds: int = 5
    saturated_s: float = 3.0
    warmup_s: float = 1.0
    step_s: float = 8.0


QUICK = ScrapesPlan(rounds=1, saturated_s=0.3, warmup_s=0.1, step_s=1.0)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the server does not start."""
    plan = QUICK if quick else ScrapesPlan()
    with scene(config, metrics_age_s_max=1.0) as stage:
        rate_per_s = _SHARE * saturated_per_s(stage, stage.subject.requests, plan.saturated_s)
        rounds: list[dict[str, Any]] = []
        for number in range(plan.rounds):
            rounds.append(_round(plan, number, stage, rate_per_s))
            yield {"rate_per_s": rate_per_s, "rounds": rounds}


def _round(plan: ScrapesPlan, number: int, stage: TestBed, rate_per_s: float) -> dict[str, Any]:
    def ranked() -> dict[str, Any]:
        return stage.client.submit(
            client.offer, stage.server.address, stage.subject.requests, rate_per_s, plan.warmup_s, plan.step_s,
            SEED + number,
        ).result().as_json()  # fmt: skip

    found: dict[str, Any] = {}
    for scrapes_per_s in _SCRAPES_PER_S:
        with _regularly(scrapes_per_s, lambda: _read(stage.server.metrics_url, 10.0)) as scraped:
            found[f"{scrapes_per_s} scrapes/s"] = ranked()
        found[f"{scrapes_per_s} scrapes/s"]["scrapes"] = len(scraped)
    health = stage.server.metrics_url.replace("/metrics", "/livez")
    with _flood(stage.server.metrics_url), _regularly(_CHECKS_PER_S, lambda: _read(health, _CHECK_S)) as checked:
        found["flood"] = ranked()
    found["flood"]["checks"] = checked
    return found


def _read(url: str, timeout_s: float) -> bool:
    """Return whether a page was read in time."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=timeout_s) as page:
            return bool(page.read())
    except OSError:
        return False


@contextmanager
def _regularly(per_s: int, do: Callable[[], bool]) -> Iterator[list[bool]]:
    """Do something at this rate on threads of its own; yield the list of its results, complete after the block."""
    ended, results = threading.Event(), list[bool]()

    def work() -> None:
        while not ended.wait(1 / per_s):
            waiting.append(pool.submit(do))

    waiting: list[Any] = []
    with ThreadPoolExecutor(32) as pool:
        thread = threading.Thread(target=work)
        if per_s:
            thread.start()
        try:
            yield results
        finally:
            ended.set()
            if per_s:
                thread.join()
        results += [one.result() for one in waiting]


@contextmanager
def _flood(url: str) -> Iterator[None]:
    """Open connections that say nothing, and close them, over and over, from processes of their own."""
    where = urlsplit(url)
    with clients(*(partial(_connect, where.hostname or "", where.port or 0) for _ in range(_FLOODS))) as floods:
        yield
    for one in floods:
        one.result()


def _connect(host: str, port: int) -> None:
    begin()
    while not is_over():
        with ExitStack() as opened:
            for _ in range(_FLOOD):
                opened.enter_context(create_connection((host, port), timeout=10))


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]

    def of(step: str, quantile: str) -> list[float | None]:
        return [r[step]["latency_ms"][quantile] if r[step]["latency_ms"] else None for r in rounds]

    checks = [check for r in rounds for check in r["flood"]["checks"]]
    claims = (
        Claim(
            "P50 of Rank beside 50 scrapes a second, over beside one",
            known_ratio(of("50 scrapes/s", "p50"), of("1 scrapes/s", "p50")),
            1.2,
            "ratio",
            "at_most",
            _NONE,
        ),
        Claim(
            "health checks answered within 1 s beside a connect flood",
            sum(checks) / len(checks) if checks else None,
            1.0,
            "share",
            "at_least",
            _NONE,
        ),
    )
    summary: dict[str, float | None] = {"requests/s": raw["rate_per_s"]}
    for step in (*(f"{count} scrapes/s" for count in _SCRAPES_PER_S), "flood"):
        for quantile in ("p50", "p99"):
            summary[f"{step}, {quantile.upper()} ms"] = known_median(of(step, quantile))
    return Conclusion(summary, claims)
