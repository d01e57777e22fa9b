"""Restart two servers behind Envoy in turn, again and again, under an even load over mTLS, and count failed calls.

Envoy has the configuration of deploy/envoy/envoy.yaml. A server is stopped with SIGTERM, answers for `lame_duck_s`, and
is started again on its port; when Envoy's health check passes, the other one follows. The client does not retry.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import client
from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from bench.processes import single_process
from bench.test_bed import CONFIG, SEED, fill_store, without_surfaces
from loadtest.arrivals import poisson
from loadtest.open_loop import OK, Samples
from loadtest.report import summarise
from loadtest.workload import Workload
from server.config_sources import load_config
from tests.proxied import Proxied, proxied, until, why_not

#: Long enough for a call that is retried: a late answer is no failure here.
_DEADLINE_S = 10.0
_TARGET_MS = 10.0


@dataclass(frozen=True, slots=True)
class RollingPlan:
    requests: int = 200_000
    rate_per_s: float = 400.0
    candidates: int = 16
    lame_duck_s: float = 2.0


QUICK = RollingPlan(requests=300, rate_per_s=50.0)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if Envoy is not installed."""
    if why := why_not():
        raise BenchmarkError(why)
    plan = QUICK if quick else RollingPlan()
    with tempfile.TemporaryDirectory(prefix="pinrank-rolling-") as temporary, single_process(calls_max=1) as caller:
        folder = Path(temporary)
        settings = load_config(config)
        store = f"lmdb://{folder / 'features'}"
        users, pins = asyncio.run(fill_store(settings, store, None))
        made = tuple(Workload(users, pins, ((plan.candidates, 1.0),), seed=SEED).requests(256))
        due_s = poisson(plan.rate_per_s, 1.1 * plan.requests / plan.rate_per_s, SEED)[: plan.requests]
        top = "\n".join(line for line in without_surfaces(config).splitlines() if not line.startswith("feature_store"))
        given = (
            f'{top}\nmodel_store = "{Path(settings.model_store).absolute()}"\nfeature_store = "{store}"\n'
            f"lame_duck_s = {plan.lame_duck_s}\n"
        )
        with proxied(folder / "proxied", given) as found:
            sent = caller.submit(client.offer_at, found.address, made, due_s, _DEADLINE_S, found.client("feed"))
            restarts = _restart_until_done(found, sent)
            summary = summarise(sent.result(), float(due_s[-1]), _TARGET_MS)
            counted = found.envoy.statistics()
        yield {
            "plan": asdict(plan), "restarts": restarts, **summary.as_json(),
            "envoy": {name: counted[f"cluster.pinrank.{name}"] for name in (
                "upstream_rq_total", "upstream_rq_retry", "upstream_rq_retry_success", "upstream_rq_retry_overflow",
                "outlier_detection.ejections_enforced_total", "health_check.failure",
            )},
        }  # fmt: skip


def _restart_until_done(found: Proxied, sent: Future[Samples]) -> int:
    """Restart the servers in turn until all requests are answered; return the number of restarts."""
    restarts = 0
    while not sent.done():
        server = found.servers[restarts % 2]
        server.stop()
        server.start()
        until(lambda: found.envoy.healthy() == 2)
        restarts += 1
    return restarts


def conclude(raw: Raw) -> Conclusion:
    statuses: dict[str, Any] = raw["statuses"]
    failed = sum(count for status, count in statuses.items() if status != OK)
    summary = {
        "requests": float(sum(statuses.values())),
        "failed": float(failed),
        "restarts": float(raw["restarts"]),
        "retries by Envoy": float(raw["envoy"]["upstream_rq_retry"]),
    }
    claim = Claim(
        "Failed calls while two servers behind Envoy are restarted in turn",
        failed if raw["restarts"] >= 2 else None, 0, "calls", "at_most", "the calls ended before both were restarted",
    )  # fmt: skip
    return Conclusion(summary, (claim,))
