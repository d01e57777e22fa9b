"""Run a server for two hours under mixed work and faults, and look for what grows and what fails.

Rank, Record and Seen come at steady rates, and clients connect and leave. The label moves between two versions once a
minute, the metrics are read every 10 s, and Redis is killed and started again every 10 minutes: calls may then be
degraded, and Record unavailable, which is counted apart.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import grpc.aio
import numpy as np

from bench.attacks.clients import begin, clients, is_over, own_channel
from bench.attacks.place import place
from bench.harness import Claim, Conclusion, Raw
from bench.processes import ServerProcess, descriptors_and_threads, memory
from bench.serving.swaps import prepared, publish
from bench.test_bed import CONFIG
from loadtest.open_loop import OK
from pinrank.v1 import activity_pb2, activity_pb2_grpc, impressions_pb2, impressions_pb2_grpc, ranking_pb2_grpc
from pinrank.v1.ranking_pb2 import RankRequest
from tests.redis_servers import RedisServer

_DURATION_S = 7_200.0
_CANDIDATES, _TIMEOUT_S = 64, 2.0
_LABEL = "stable"
#: Calls a second, of each kind.
_RATES = {"Rank": 40.0, "Record": 4.0, "Seen": 4.0, "Rank of a visitor": 2.0}
#: After Redis is back, time for the server to find it again.
_REDIS_BACK_S = 15.0
_FAILURES_MAX = 1_000
#: The part of the samples that is not judged, while caches and pools fill.
_SETTLING = 0.25
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class SoakPlan:
    duration_s: float = _DURATION_S
    sample_s: float = 10.0
    swap_s: float = 60.0
    redis_s: float = 600.0
    redis_down_s: float = 5.0


QUICK = SoakPlan(duration_s=60.0, sample_s=1.0, swap_s=10.0, redis_s=25.0, redis_down_s=2.0)


def measure(*, quick: bool = False, config: Path = CONFIG, plan: SoakPlan | None = None) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the server does not start."""
    plan = plan or (QUICK if quick else SoakPlan())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="pinrank-soak-")))
        own, models, bundle = prepared(folder, config)
        first = bundle.manifest.version
        publish(models, bundle, first + 1, {}, {}, folder)
        redis = RedisServer(folder, "--appendonly", "yes")
        redis.start()
        stack.callback(redis.kill)
        ground = stack.enter_context(place(own, redis.url))
        settings = {"record_actions": True, "near_cache_stale_s": 5}
        tables = f'[impressions]\nto = "file://{folder / "impressions"}"\n[swap]\npoll_s = 1\nretry_s = 5\n'
        server = stack.enter_context(ground.server("server", settings, tables))
        sequence = bundle.manifest.sequence
        action = sequence.actions[0] if sequence else ""
        samples: list[dict[str, float]] = []
        downs: list[tuple[float, float]] = []
        job = partial(work, server.address, ground.requests(_CANDIDATES), action)
        with clients(job) as (working,):
            begun_s = time.monotonic()
            versions = (first + 1 - i % 2 for i in count())
            due: dict[str, tuple[float, Callable[[], object]]] = {
                "sample": (plan.sample_s, lambda: samples.append(_sample(server, begun_s))),
                "swap": (
                    plan.swap_s,
                    lambda: models.set_label(bundle.manifest.name, _LABEL, next(versions), by="bench"),
                ),
                "redis": (plan.redis_s, lambda: downs.append(_restart(redis, plan.redis_down_s, begun_s))),
            }
            done: Counter[str] = Counter()
            while (passed_s := time.monotonic() - begun_s) < plan.duration_s:
                for name, (every_s, do) in due.items():
                    if passed_s >= (done[name] + 1) * every_s:
                        done[name] += 1
                        do()
                        # What is there if the rest of the two hours fails.
                        yield {"plan_s": plan.duration_s, "samples": samples, "redis_down": downs}
                time.sleep(_LOOK_S)
            swaps = server.samples("pinrank_model_swaps_total")
        yield {
            "plan_s": plan.duration_s, "samples": samples, "redis_down": downs, "done": dict(done),
            "swaps": {labels["outcome"]: value for labels, value in swaps}, **working.result().as_json(begun_s),
        }  # fmt: skip


def _sample(server: ServerProcess, begun_s: float) -> dict[str, float]:
    server.metric("pinrank_requests_total")
    held = memory(server.pid)
    descriptors, threads = descriptors_and_threads(server.pid)
    return {
        "at_s": time.monotonic() - begun_s, "rss_bytes": held.own_bytes + held.file_bytes, "own_bytes": held.own_bytes,
        "descriptors": descriptors, "threads": threads,
    }  # fmt: skip


def _restart(redis: RedisServer, down_s: float, begun_s: float) -> tuple[float, float]:
    """Kill Redis and start it again; return when it was gone and when it was back."""
    gone_s = time.monotonic() - begun_s
    redis.kill()
    time.sleep(down_s)
    redis.start()
    return gone_s, time.monotonic() - begun_s


@dataclass(slots=True)
class Work:
    """What became of calls: statuses by kind, the number of degraded answers, the first failures and their times."""

    statuses: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in _RATES})
    degraded: int = 0
    failures: list[tuple[float, str, str]] = field(default_factory=list)

    def add(self, kind: str, status: str) -> None:
        self.statuses[kind][status] += 1
        if status != OK and len(self.failures) < _FAILURES_MAX:
            self.failures.append((time.monotonic(), kind, status))

    def as_json(self, begun_s: float) -> dict[str, Any]:
        """Return it with times from a moment on the monotonic clock, which all processes share."""
        return {
            "statuses": {kind: dict(counts) for kind, counts in self.statuses.items()},
            "degraded": self.degraded,
            "failures": [(at_s - begun_s, kind, status) for at_s, kind, status in self.failures],
        }


def work(address: str, requests: tuple[bytes, ...], action: str) -> Work:
    """Call at steady rates, in a job, until the benchmark is over."""
    done, rng = Work(), random.Random(0)
    #: Newest answers, which Seen reports.
    answered: deque[int] = deque(maxlen=100)

    async def rank(channel: grpc.aio.Channel) -> None:
        request = RankRequest.FromString(rng.choice(requests))
        answer = await ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=_TIMEOUT_S)
        done.degraded += bool(answer.degradation.ListFields())
        answered.append(answer.request_id)

    async def record(channel: grpc.aio.Channel) -> None:
        shown = RankRequest.FromString(rng.choice(requests))
        made = activity_pb2.Action(
            event_id=rng.randrange(1, 2**63), user_id=shown.user_id, pin_id=shown.pin_ids[0], action=action,
            surface=shown.surface, time_ms=int(time.time() * 1e3),
        )  # fmt: skip
        sent = activity_pb2.RecordRequest(actions=[made])
        await activity_pb2_grpc.ActivityServiceStub(channel).Record(sent, timeout=_TIMEOUT_S)

    async def see(channel: grpc.aio.Channel) -> None:
        if answered:
            seen = impressions_pb2.SeenRequest(request_id=rng.choice(answered), positions=[0, 1])
            await impressions_pb2_grpc.ImpressionServiceStub(channel).Seen(seen, timeout=_TIMEOUT_S)

    async def main() -> None:
        async with own_channel(address) as lasting:
            await lasting.channel_ready()
            begin()

            async def visit() -> None:
                async with own_channel(address) as channel:
                    await rank(channel)

            ways: tuple[Callable[[], Awaitable[None]], ...] = (
                partial(rank, lasting), partial(record, lasting), partial(see, lasting), visit
            )  # fmt: skip
            await asyncio.gather(*(_steadily(done, kind, way) for kind, way in zip(_RATES, ways, strict=True)))

    asyncio.run(main())
    return done


async def _steadily(done: Work, kind: str, way: Callable[[], Awaitable[None]]) -> None:
    async def once() -> None:
        try:
            await way()
            done.add(kind, OK)
        except grpc.aio.AioRpcError as error:
            done.add(kind, error.code().name)

    async with asyncio.TaskGroup() as calls:
        while not is_over():
            calls.create_task(once())
            await asyncio.sleep(1 / _RATES[kind])


def conclude(raw: Raw) -> Conclusion:
    settled = [one for one in raw["samples"] if one["at_s"] >= _SETTLING * raw["plan_s"]]
    at_h = np.array([one["at_s"] for one in settled]) / 3_600
    enough = len(settled) >= 6
    few = "too few samples"

    def grown(what: str) -> float | None:
        """Return the growth over the judged time, by the regression line."""
        if not enough:
            return None
        values = np.array([one[what] for one in settled], np.float64)
        return float(np.polyfit(at_h, values, 1)[0] * (at_h[-1] - at_h[0]))

    def shifted(what: str) -> float | None:
        """Return by how much the median of the last third exceeds that of the first third."""
        values = [one[what] for one in settled]
        third = len(values) // 3
        return float(np.median(values[-third:]) - np.median(values[:third])) if enough else None

    rss = grown("rss_bytes")
    hours = float(at_h[-1] - at_h[0]) if enough else None
    typical = float(np.median([one["rss_bytes"] for one in settled])) if settled else None
    rss_share = rss / typical / hours * 100 if rss is not None and typical and hours else None
    failed = sum(sum(counts.values()) - counts.get(OK, 0) for counts in raw["statuses"].values())
    # Those beyond the first thousand have no times.
    failures = failed - len(raw["failures"]) + sum(
        1 for at_s, _, _ in raw["failures"]
        if not any(gone_s <= at_s <= back_s + _REDIS_BACK_S for gone_s, back_s in raw["redis_down"])
    )  # fmt: skip
    claims = (
        Claim("duration", raw["plan_s"], _DURATION_S, "s", "at_least"),
        Claim("growth of RSS an hour", rss_share, 2.0, "%", "at_most", few),
        Claim("growth of RSS over the judged time", None if rss is None else rss / 1e6, 20.0, "MB", "at_most", few),
        Claim("growth of descriptors", shifted("descriptors"), 0, "descriptors", "at_most", few),
        Claim("growth of threads", shifted("threads"), 0, "threads", "at_most", few),
        Claim("calls that failed while Redis ran", failures, 0, "calls", "at_most"),
    )
    own = grown("own_bytes")
    summary: dict[str, float | None] = {
        "RSS, MB": None if typical is None else typical / 1e6,
        "growth of own memory, MB": None if own is None else own / 1e6,
        "Redis restarts": len(raw["redis_down"]),
        "calls that failed during Redis restarts": failed - failures,
        "degraded answers": raw["degraded"],
    }
    summary |= {f"swaps {outcome}": value for outcome, value in raw["swaps"].items()}
    summary |= {f"{kind} calls": sum(counts.values()) for kind, counts in raw["statuses"].items()}
    return Conclusion(summary, claims)
