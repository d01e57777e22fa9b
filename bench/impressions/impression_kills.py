"""Kill a server that logs impressions, again and again under load, and look for answers that the log has lost.

Each answer that a caller got must be in the log once, unless it was answered within one second before a kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from bench.processes import server_process, single_process
from bench.test_bed import CONFIG, SEED, fill_store, without_surfaces
from impressions.reading import read_tables
from loadtest import open_loop
from loadtest.workload import Workload
from pinrank.channels import open_aio_channel
from pinrank.v1 import ranking_pb2
from server.config_sources import load_config

_LOST_S_MAX = 1.0
_PINS, _CALLERS, _DEADLINE_S = 8, 16, 2.0


@dataclass(frozen=True, slots=True)
class KillsPlan:
    requests: int = 1_000_000
    kills: int = 20


QUICK = KillsPlan(requests=2_000, kills=2)


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers that callers got: ids, uint64[K], and when, float64[K], Unix time in seconds; and the kill's time."""

    request_ids: np.ndarray
    answered_s: np.ndarray
    killed_s: float | None
    failed: int


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start or a run ends early."""
    plan = QUICK if quick else KillsPlan()
    rng = random.Random(SEED)
    cuts = sorted(rng.sample(range(plan.requests), plan.kills))
    shares = np.diff([0, *cuts, plan.requests]).tolist()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-log-kills-")))
        settings = load_config(config)
        own, log = folder / "pinrank.toml", folder / "log"
        own.write_text(
            without_surfaces(config)
            + f'\nmodel_store = "{Path(settings.model_store).absolute()}"\n[impressions]\nto = "file://{log}"\n'
        )
        features = f"lmdb://{folder / 'features'}"
        user_ids, pin_ids = asyncio.run(fill_store(settings, features, None))
        requests = tuple(Workload(user_ids, pin_ids, ((_PINS, 1.0),), seed=SEED).requests(256))
        runs: list[Answers] = []
        for number, count in enumerate(shares):
            killed = number < plan.kills
            client = stack.enter_context(single_process(calls_max=1))
            with server_process(own, features, folder / f"server-{number}.log") as server:
                run: Answers = client.submit(
                    answers, server.address, requests, count, server.pid if killed else None
                ).result()
            if len(run.request_ids) < count:
                raise BenchmarkError(f"run {number} got {len(run.request_ids)} of {count} answers")
            runs.append(run)
        yield {"plan": asdict(plan), "runs": [_outline(run) for run in runs], "log": _looked_up(log, runs)}


def answers(address: str, requests: tuple[bytes, ...], count: int, kill_pid: int | None) -> Answers:
    """Rank in a closed loop until `count` answers have come, and then kill the server, if one is named, under load."""
    ids: list[int] = []
    times_s: list[float] = []
    killed_s: list[float] = []
    failed = 0
    done = asyncio.Event()

    async def caller(rank: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes], first: int) -> None:
        nonlocal failed
        turn = first
        while not done.is_set():
            turn += 1
            try:
                content = await rank(requests[turn % len(requests)], timeout=_DEADLINE_S)
            except grpc.aio.AioRpcError:
                failed += 1
                continue
            ids.append(ranking_pb2.RankResponse.FromString(content).request_id)
            times_s.append(time.time())
            if len(ids) >= count and not done.is_set():
                if kill_pid is not None:
                    os.kill(kill_pid, signal.SIGKILL)
                    killed_s.append(time.time())
                done.set()

    async def main() -> None:
        async with open_aio_channel(address) as channel, asyncio.TaskGroup() as calls:
            rank: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(open_loop.RANK)
            for number in range(_CALLERS):
                calls.create_task(caller(rank, number * 16))

    with contextlib.suppress(ProcessLookupError):
        open_loop.run(main())
    return Answers(np.array(ids, np.uint64), np.array(times_s), killed_s[0] if killed_s else None, failed)


def _outline(run: Answers) -> dict[str, Any]:
    took_s = float(run.answered_s[-1] - run.answered_s[0]) if len(run.answered_s) > 1 else 0.0
    return {
        "answers": len(run.request_ids),
        "failed": run.failed,
        "killed": run.killed_s is not None,
        "answers_per_s": len(run.request_ids) / took_s if took_s else None,
    }


def _looked_up(log: Path, runs: list[Answers]) -> dict[str, Any]:
    """Look every answer up in the log."""
    logged = np.concatenate([table["request_id"].to_numpy() for table in read_tables(f"file://{log}", "impressions")])
    distinct, counts = np.unique(logged, return_counts=True)
    lost, lost_early, ages_s = 0, 0, [0.0]
    for run in runs:
        missing = ~np.isin(run.request_ids, distinct)
        lost += int(missing.sum())
        before_s = np.inf if run.killed_s is None else run.killed_s - run.answered_s[missing]
        ages = np.broadcast_to(before_s, int(missing.sum()))
        lost_early += int(np.count_nonzero(ages > _LOST_S_MAX))
        ages_s += [float(age) for age in ages if np.isfinite(age)]
    files = sorted((log / "impressions").rglob("*.parquet"))
    return {
        "rows": len(logged),
        "twice": int(np.count_nonzero(counts > 1)),
        "lost": lost,
        "lost_early": lost_early,
        "oldest_lost_s": max(ages_s),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }


def conclude(raw: Raw) -> Conclusion:
    log, runs = raw["log"], raw["runs"]
    answered = sum(run["answers"] for run in runs)
    claims = (
        Claim("answers lost longer than 1 s before a kill", log["lost_early"], 0, "answers", "at_most"),
        Claim("answers logged twice", log["twice"], 0, "answers", "at_most"),
        Claim("age of the oldest lost answer at its kill", log["oldest_lost_s"], _LOST_S_MAX, "s", "at_most"),
        Claim("answers", answered, raw["plan"]["requests"], "answers", "at_least"),
    )
    summary = {
        "answers": float(answered),
        "kills": float(sum(run["killed"] for run in runs)),
        "lost within 1 s before a kill": float(log["lost"] - log["lost_early"]),
        "rows in the log": float(log["rows"]),
        "files": float(log["files"]),
        "bytes a row": log["bytes"] / log["rows"],
    }
    return Conclusion(summary, claims)
