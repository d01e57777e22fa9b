"""Measure what the impression log costs a server that explores, at 70% of its saturated rate: CPU time and P99.

Four servers run all the time: two without a log, whose difference shows the machine's noise, and two that log every
answer with all its pins, one for each kind of exploration. They get the same requests at the same times, one server
after the other, in many short rounds. P99 of one round says more about the machine than about the server, so
percentiles are of all rounds together, and intervals are of rounds drawn again (percentile bootstrap). The CPU time is
that of the server and of the process that makes Parquet files.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram

from bench.harness import Claim, Conclusion, Raw
from bench.processes import ServerProcess, cpu_seconds
from bench.test_bed import CONFIG, SEED, TestBed, saturated, scene, without_surfaces
from loadtest import open_loop
from loadtest.arrivals import poisson
from loadtest.open_loop import OK
from loadtest.report import Summary, summarise
from model_store.bundle.files import EXPLORATION, write_bundle
from model_store.registry.store import open_model_store
from pinrank.channels import open_aio_channel
from server.config_sources import load_config

#: What the log may cost a request, in milliseconds of one core, and by what P99 may grow.
_COST_MS_MAX, _P99_RATIO_MAX = 0.10, 1.03
_LOAD, _DEADLINE_S, _TARGET_MS = 0.7, 2.0, 10.0
_RESAMPLES = 2_000
#: Four arms around the demo's weights, or orders of the best six.
_EXPLORE = {
    "weights": """
seed = 7
[surfaces.home]
kind = "weights"
share = 0.0125
regret_max = 0.05
[surfaces.home.arms]
more_creator.weights = { creator = 0.5 }
less_creator.weights = { creator = 0.3 }
more_merchant.weights = { merchant = 0.3 }
less_merchant.weights = { merchant = 0.1 }
""",
    "order": """
seed = 7
[surfaces.home]
kind = "order"
share = 0.0125
regret_max = 0.05
best = 6
temperature = 0.05
floor = 0.05
""",
}
_PLAIN, _CONTROL = "without", "also without"


@dataclass(frozen=True, slots=True)
class LogPlan:
    rounds: int = 24
    warmup_s: float = 0.3
    step_s: float = 2.8
    #: After a step, so that its last rows are written within the time that is measured, and beside no other server.
    settle_s: float = 0.7
    saturated_s: float = 4.0
    callers: int = 8


QUICK = LogPlan(rounds=2, step_s=1.0, saturated_s=0.5)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start, or refuses or degrades when saturated."""
    plan = QUICK if quick else LogPlan()
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-log-")))
        exploring = {kind: _exploring(config, folder / kind, text) for kind, text in _EXPLORE.items()}
        beds = {name: stack.enter_context(scene(exploring["weights"])) for name in (_PLAIN, _CONTROL)}
        for kind, own in exploring.items():
            beds[kind] = stack.enter_context(scene(own, extra=_log_settings(folder / f"log-{kind}")))
        plain = beds[_PLAIN]
        highest = saturated(plain, plain.subject.requests, plan.callers, plan.warmup_s, plan.saturated_s)
        rate_per_s = _LOAD * highest["achieved_per_s"]
        _round(plan, plan.rounds, beds, rate_per_s)  # does not count: only one server is warm so far
        for number in range(plan.rounds):
            rounds.append(_round(plan, number, beds, rate_per_s))
            logs = {kind: _counts(beds[kind]) for kind in _EXPLORE}
            yield {"plan": asdict(plan), "rate_per_s": rate_per_s, "rounds": rounds, "logs": logs}


def _exploring(config: Path, folder: Path, explore: str) -> Path:
    """Copy the model store with an exploration table in each labelled version; return settings that name the copy."""
    settings = load_config(config)
    models, copied = open_model_store(settings.model_store), open_model_store(folder / "models")
    for label in settings.labels:
        bundle = models.read(settings.model, models.resolve(settings.model, label))
        fields = bundle.manifest.model_dump(exclude={"files"})
        made = folder / f"bundle-{label}"
        write_bundle(made, fields, {**bundle.files, EXPLORATION: explore.encode()})
        copied.publish(made)
        copied.set_label(settings.model, label, bundle.manifest.version)
    own = folder / "pinrank.toml"
    own.write_text(f'{without_surfaces(config)}\nmodel_store = "{folder / "models"}"\n')
    return own


def _log_settings(folder: Path) -> str:
    """Return the settings of a log that makes a Parquet file every few steps, and only where rows are written."""
    return f'[impressions]\nto = "file://{folder}"\nrotate_bytes = {32 << 20}\nrotate_s = 3600.0\n'


def _round(plan: LogPlan, number: int, beds: Mapping[str, TestBed], rate_per_s: float) -> dict[str, Any]:
    """Offer the same requests to each server in turn, in a process of its own; the next round starts with the next."""
    names = [*beds][number % len(beds) :] + [*beds][: number % len(beds)]
    servers = [beds[name].server for name in names]
    plain = beds[_PLAIN]
    due_s = poisson(rate_per_s, plan.warmup_s + plan.step_s, SEED + number)
    steps = plain.client.submit(offer_in_turn, plan, servers, plain.subject.requests, due_s).result()
    return {
        name: {"requests": len(due_s), **used, "short": _short(summary), "latency_hdr": summary.latency_hdr}
        for name, (summary, used) in zip(names, steps, strict=True)
    }


def _short(summary: Summary) -> int:
    """Return how many requests were refused or degraded, which happens when a neighbour takes the cores."""
    return sum(summary.statuses.values()) - summary.statuses.get(OK, 0) + summary.degraded


def offer_in_turn(
    plan: LogPlan, servers: Sequence[ServerProcess], requests: tuple[bytes, ...], due_s: np.ndarray
) -> list[tuple[Summary, dict[str, float]]]:
    """Offer requests to one server after the other; return of each a summary, and the CPU time of a request."""

    async def offered(server: ServerProcess) -> open_loop.Samples:
        async with open_aio_channel(server.address) as channel:
            await channel.channel_ready()
            return await open_loop.open_loop(open_loop.sender(channel, _DEADLINE_S), requests, due_s)

    async def main() -> list[tuple[Summary, dict[str, float]]]:
        found = []
        for server in servers:
            runs_s, used_s = server.metric("pinrank_run_cpu_seconds_total"), cpu_seconds(server.pid)
            samples = await offered(server)
            time.sleep(plan.settle_s)  # noqa: ASYNC251 - nothing else runs in this loop
            used_s = cpu_seconds(server.pid) - used_s
            runs_s = server.metric("pinrank_run_cpu_seconds_total") - runs_s
            used = {
                "cpu_ms_per_request": used_s / len(due_s) * 1e3,
                "own_cpu_ms_per_request": (used_s - runs_s) / len(due_s) * 1e3,
            }
            found.append((summarise(samples.since(plan.warmup_s), plan.step_s, _TARGET_MS), used))
        return found

    return open_loop.run(main())


def _counts(stage: TestBed) -> dict[str, float]:
    counts = stage.server.samples("pinrank_impression_log_rows_total")
    outcomes = ("dropped", "unfit", "written")
    found = {outcome: sum(v for labels, v in counts if labels["outcome"] == outcome) for outcome in outcomes}
    explored = stage.server.metric("pinrank_explored_requests_total")
    return {**found, "answered": stage.server.metric("pinrank_request_seconds_count"), "explored": explored}


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]
    drawn = np.random.default_rng(SEED).multinomial(len(rounds), np.full(len(rounds), 1 / len(rounds)), _RESAMPLES)
    # The first row takes each round once: the estimate. The others give its interval.
    times = np.vstack([np.ones(len(rounds), np.int64), drawn])
    p50, p99 = ({name: _pooled_ms(rounds, name, share, times) for name in rounds[0]} for share in (0.5, 0.99))
    own, cpu = (
        {name: _mean(rounds, name, field, times) for name in rounds[0]}
        for field in ("own_cpu_ms_per_request", "cpu_ms_per_request")
    )
    summary: dict[str, float | None] = {"requests/s": raw["rate_per_s"], "rounds": len(rounds)}
    claims: list[Claim] = []
    for kind in _EXPLORE:
        cost_ms, ratio = own[kind] - own[_PLAIN], p99[kind] / p99[_PLAIN]
        cost_name, ratio_name = f"{kind}: the log's CPU time a request", f"{kind}: P99 with the log / without it"
        claims += [
            Claim(cost_name, float(cost_ms[0]), _COST_MS_MAX, "core-ms", "at_most"),
            Claim(ratio_name, float(ratio[0]), _P99_RATIO_MAX, "ratio", "at_most"),
        ]
        summary |= _with_interval(f"{cost_name}, core-ms", cost_ms)
        summary |= _with_interval(f"{kind}: with engine runs, core-ms", cpu[kind] - cpu[_PLAIN])
        summary |= _with_interval(ratio_name, ratio)
        summary |= _with_interval(f"{kind}: P50 with the log / without it", p50[kind] / p50[_PLAIN])
        summary[f"{kind}: answers that explored"] = raw["logs"][kind]["explored"]
    noise = f"{_CONTROL} / {_PLAIN}"
    summary |= _with_interval(f"{noise}: CPU time a request more, core-ms", own[_CONTROL] - own[_PLAIN])
    summary |= _with_interval(f"{noise}: P99", p99[_CONTROL] / p99[_PLAIN])
    dropped = sum(log["dropped"] + log["unfit"] for log in raw["logs"].values())
    claims.append(Claim("rows dropped", dropped, 0, "rows", "at_most"))
    summary |= {f"{name}: refused or degraded": sum(one[name]["short"] for one in rounds) for name in rounds[0]}
    summary |= {f"{name}: core-ms a request": float(ms[0]) for name, ms in own.items()}
    summary |= {f"{name}: P99 of all rounds, ms": float(ms[0]) for name, ms in p99.items()}
    return Conclusion(summary, tuple(claims))


def _with_interval(name: str, values: np.ndarray) -> dict[str, float]:
    """Name an estimate, the first value, and the 95% interval of the others."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return {name: float(values[0]), f"{name}, 95% from": float(low), f"{name}, 95% to": float(high)}


def _mean(rounds: Sequence[Mapping[str, Any]], name: str, field: str, times: np.ndarray) -> np.ndarray:
    """Return float64[B], the mean over requests, with each round taken so many times."""
    requests = times * np.array([one[name]["requests"] for one in rounds])
    means: np.ndarray = requests @ np.array([one[name][field] for one in rounds]) / requests.sum(axis=1)
    return means


def _pooled_ms(rounds: Sequence[Mapping[str, Any]], name: str, share: float, times: np.ndarray) -> np.ndarray:
    """Return float64[B], a percentile of a server's latencies, with each round taken so many times.

    A request that was refused or degraded counts as late as the deadline: leaving it out would flatter its server.
    """
    counts: list[dict[int, int]] = []
    for one in rounds:
        histogram = HdrHistogram.decode(one[name]["latency_hdr"])
        counts.append({i.value_iterated_to: i.count_at_value_iterated_to for i in histogram.get_recorded_iterator()})
        counts[-1][int(_DEADLINE_S * 1e6)] = one[name]["short"]
    values_us = np.array(sorted(set().union(*counts)))
    below = np.cumsum(times @ np.array([[count.get(us, 0) for us in values_us.tolist()] for count in counts]), axis=1)
    pooled: np.ndarray = values_us[np.argmax(below >= share * below[:, -1:], axis=1)] / 1e3
    return pooled
