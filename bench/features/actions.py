"""Record actions while ranking: how soon do rankings read them, and does a crash lose or repeat any?

Actions go through the RPC to a server, and through a Redis stream to followers, which are killed (SIGKILL) at random
and restarted. Producers resend unacknowledged actions. At the end, the stored sequence of every user must hold exactly
the newest actions that were sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import redis
import uvloop

from bench.awake import kept_awake
from bench.features.synthetic import fill
from bench.harness import Claim, Conclusion, Raw
from bench.processes import server_process, single_process
from bench.test_bed import CONFIG, SEED, recording_all
from feature_client.codec import decode_sequence
from feature_client.groups import SequenceGroup
from feature_client.stores.open_store import open_store
from loadtest.workload import Workload
from model_store.bundle.files import Bundle
from model_store.registry.store import open_model_store
from pinrank.channels import open_aio_channel
from pinrank.v1 import activity_pb2, activity_pb2_grpc, ranking_pb2, ranking_pb2_grpc
from server.config_sources import load_config
from tests.redis_servers import running

_FIRST_MS = 1_700_000_000_000
_BATCH = 100
_STREAM = "pinrank:actions"


@dataclass(frozen=True, slots=True)
class ActionsPlan:
    actions: int = 1_000_000
    streamed: int = 1_000_000
    users: int = 5_000
    fresh: int = 1_000
    kill_every_s: tuple[float, float] = (3.0, 8.0)
    kill_follower_s: tuple[float, float] = (3.0, 8.0)
    rank_per_s: float = 10.0
    #: Messages in flight.
    senders: int = 8


QUICK = ActionsPlan(actions=3_000, streamed=1_000, users=50, fresh=10, kill_every_s=(0.5, 1.0))


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start."""
    plan = QUICK if quick else ActionsPlan()
    settings = load_config(config)
    models = open_model_store(settings.model_store)
    bundle = models.read(settings.model, models.resolve(settings.model, settings.labels[0]))
    sequence = bundle.manifest.sequence
    assert sequence is not None, "the demo's model reads one"  # noqa: S101
    with ExitStack() as stack:
        awake = stack.enter_context(kept_awake())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-actions-")))
        url = stack.enter_context(running(folder)).url
        pin_ids = asyncio.run(_fill(url, bundle, plan))
        own = folder / "pinrank.toml"
        own.write_text(recording_all(config, settings))
        with server_process(own, url, folder / "fresh.log") as server:
            caller = stack.enter_context(single_process(calls_max=1))
            fresh_ms = caller.submit(_fresh, server.address, plan, sequence, pin_ids).result()
        raw = {"cores_kept_awake": awake, "fresh_ms": fresh_ms}
        yield raw
        print("freshness measured", flush=True)
        raw["rpc"] = uvloop.run(_record_while_killing(url, own, plan, sequence, pin_ids))
        yield raw
        print("recorded through the RPC", flush=True)
        raw["stream"] = _stream_while_killing(url, Path(settings.model_store), settings.model, plan, sequence, pin_ids)
        yield raw


def conclude(raw: Raw) -> Conclusion:
    fresh_ms, recorded, streamed = raw["fresh_ms"], raw["rpc"], raw["stream"]
    claims = (
        Claim("from sending an action to a ranking that read it, P99", fresh_ms["p99"], 50.0, "ms", "at_most"),
        Claim("users whose sequence is not what was sent by RPC", recorded["wrong_users"], 0, "users", "at_most"),
        Claim("users whose sequence is not what was streamed", streamed["wrong_users"], 0, "users", "at_most"),
        Claim("rankings that failed while a server was up", recorded["rank_failures_while_up"], 0, "calls", "at_most"),
    )
    summary = {
        "action to ranking, P50 ms": fresh_ms["p50"],
        "action to ranking, P99 ms": fresh_ms["p99"],
        "actions by RPC": recorded["actions"],
        "actions by RPC, per second": recorded["actions"] / recorded["seconds"],
        "sent again": recorded["sent_again"],
        "servers killed": recorded["kills"],
        "actions by stream": streamed["actions"],
        "actions by stream, per second": streamed["actions"] / streamed["seconds"],
        "followers killed": streamed["kills"],
    }
    return Conclusion(summary, claims)


async def _fill(url: str, bundle: Bundle, plan: ActionsPlan) -> np.ndarray:
    store = open_store(url)
    await store.start()
    _, pin_ids = await fill(store, bundle, plan.users, SEED)
    await store.close()
    return pin_ids


def _fresh(address: str, plan: ActionsPlan, group: SequenceGroup, pin_ids: np.ndarray) -> dict[str, float]:
    """Measure the time from sending a new user's first action to the end of the first ranking that reads it."""

    async def main() -> list[float]:
        took_ms = []
        async with open_aio_channel(address) as channel:
            record = activity_pb2_grpc.ActivityServiceStub(channel).Record
            rank = ranking_pb2_grpc.RankingServiceStub(channel).Rank
            for number in range(plan.fresh):
                user = 1_000_000_000 + number
                action = _action(group, user, 1, int(pin_ids[number % len(pin_ids)]))
                wanted = ranking_pb2.RankRequest(user_id=user, pin_ids=pin_ids[:128].tolist(), surface="home")
                start_s = time.perf_counter()
                await record(activity_pb2.RecordRequest(actions=[action]), timeout=5)
                while (await rank(wanted, timeout=5)).degradation.sequence_missing:
                    pass
                took_ms.append((time.perf_counter() - start_s) * 1e3)
        return took_ms

    p50, p99 = np.percentile(uvloop.run(main()), (50, 99))
    return {"p50": float(p50), "p99": float(p99)}


def _action(group: SequenceGroup, user: int, number: int, pin: int) -> activity_pb2.Action:
    return activity_pb2.Action(
        event_id=number, user_id=user, pin_id=pin, action=group.actions[number % len(group.actions)],
        surface=group.surfaces[0], time_ms=_FIRST_MS + number,
    )  # fmt: skip


def _sent(plan: ActionsPlan, count: int, first_user: int) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of (user, event id) in random order. Event ids, and hence times, are globally unique."""
    order = np.random.default_rng(SEED).permutation(count) + 1
    for start in range(0, count, _BATCH):
        yield [(first_user + number % plan.users, number) for number in order[start : start + _BATCH].tolist()]


async def _wrong_users(url: str, group: SequenceGroup, plan: ActionsPlan, count: int, first_user: int) -> int:
    """Count the users whose sequence is not exactly the newest actions that were sent, in order of time."""
    store = open_store(url)
    await store.start()
    wrong = 0
    for start in range(0, plan.users, 500):
        users = np.arange(start, min(start + 500, plan.users))
        values = await store.multi_get(group.keys(users.astype(np.uint64) + np.uint64(first_user)))
        for user, value in zip(users.tolist(), values, strict=True):
            expected = list(range(user or plan.users, count + 1, plan.users))[-group.length_max :]
            wrong += decode_sequence(group, value)[0]["event_id"].tolist() != expected
    await store.close()
    return wrong


class _RestartingServer:
    """A server that is killed at random and restarted.

    Attributes:
        address: address of the running server, or None.
        starts: number of starts.
        kills: number of kills.
    """

    def __init__(self, own: Path, url: str, plan: ActionsPlan) -> None:
        self._own, self._url, self._plan = own, url, plan
        self._rng = random.Random(SEED)
        self.address: str | None = None
        self.starts = self.kills = 0

    async def live(self, done: asyncio.Event) -> None:
        while not done.is_set():
            with ExitStack() as stack:
                log = self._own.with_name(f"server-{self.kills}.log")
                server = await asyncio.to_thread(stack.enter_context, server_process(self._own, self._url, log))
                self.address, self.starts = server.address, self.starts + 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._rng.uniform(*self._plan.kill_every_s)):
                        await done.wait()
                self.address = None
                if not done.is_set():
                    os.kill(server.pid, signal.SIGKILL)
                    self.kills += 1
                await asyncio.to_thread(stack.close)


class _Line:
    """A connection to the server that is currently running."""

    def __init__(self, server: _RestartingServer, method: str) -> None:
        self._server, self._method = server, method
        self._starts = -1
        self._channel: grpc.aio.Channel | None = None

    async def call(self, content: bytes) -> bool:
        """Send a message, and return whether it was answered."""
        if self._server.address is None:
            await asyncio.sleep(0.02)
            return False
        if self._starts != self._server.starts:
            await self.close()
            self._starts, self._channel = self._server.starts, open_aio_channel(self._server.address)
        assert self._channel is not None, "made at the first start"  # noqa: S101
        try:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(self._method)
            await call(content, timeout=5)
        except grpc.aio.AioRpcError:
            return False
        return True

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()


async def _record_while_killing(
    url: str, own: Path, plan: ActionsPlan, group: SequenceGroup, pin_ids: np.ndarray
) -> dict[str, Any]:
    server, done = _RestartingServer(own, url, plan), asyncio.Event()
    counts = {"sent_again": 0, "ranked": 0, "rank_failures_while_up": 0, "rank_failures_while_down": 0}
    batches = _sent(plan, plan.actions, 2_000_000_000)

    async def send() -> None:
        line = _Line(server, "/pinrank.v1.ActivityService/Record")
        for batch in batches:
            actions = [_action(group, user, number, int(pin_ids[number % len(pin_ids)])) for user, number in batch]
            content = activity_pb2.RecordRequest(actions=actions).SerializeToString()
            while not await line.call(content):
                counts["sent_again"] += len(batch) if server.address else 0
        await line.close()

    async def rank() -> None:
        line = _Line(server, "/pinrank.v1.RankingService/Rank")
        users = np.arange(1, plan.users + 1, dtype=np.uint64)
        for content in itertools.cycle(list(Workload(users, pin_ids, ((64, 1.0),)).requests(64))):
            if done.is_set():
                break
            await asyncio.sleep(1 / plan.rank_per_s)
            was = server.address, server.starts
            if await line.call(content):
                counts["ranked"] += 1
            elif was[0] is not None:
                up = was == (server.address, server.starts)
                counts["rank_failures_while_up" if up else "rank_failures_while_down"] += 1
        await line.close()

    start_s = time.monotonic()
    around = [asyncio.create_task(server.live(done)), asyncio.create_task(rank())]
    await asyncio.gather(*(send() for _ in range(plan.senders)))
    seconds = time.monotonic() - start_s
    done.set()
    await asyncio.gather(*around)
    wrong = await _wrong_users(url, group, plan, plan.actions, 2_000_000_000)
    return {"actions": plan.actions, "seconds": seconds, "wrong_users": wrong, "kills": server.kills, **counts}


def _stream_while_killing(
    url: str, model_store: Path, model: str, plan: ActionsPlan, group: SequenceGroup, pin_ids: np.ndarray
) -> dict[str, Any]:
    rng, kills = random.Random(SEED), 0
    client = redis.Redis.from_url(url)
    command = [
        sys.executable, "-c", "from server.cli.main import app; app()", "features", "follow", "--feature-store", url,
        "--model-store", str(model_store), "--model", model, "--retention-days", "0",
    ]  # fmt: skip
    start_s = time.monotonic()
    sending = threading.Thread(target=_send_stream, args=(client, plan, group, pin_ids))
    sending.start()

    def folded() -> bool:
        return not sending.is_alive() and client.xlen(_STREAM) == 0

    while True:
        follower = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ends_s = time.monotonic() + rng.uniform(*plan.kill_follower_s)
        while time.monotonic() < ends_s and not folded():
            time.sleep(0.05)
        follower.kill()
        follower.wait()
        if folded():
            break
        kills += 1
    sending.join()
    seconds = time.monotonic() - start_s
    client.close()
    wrong = asyncio.run(_wrong_users(url, group, plan, plan.streamed, 3_000_000_000))
    return {"actions": plan.streamed, "seconds": seconds, "wrong_users": wrong, "kills": kills}


def _send_stream(client: redis.Redis, plan: ActionsPlan, group: SequenceGroup, pin_ids: np.ndarray) -> None:
    """Add all actions to the stream, and every tenth batch twice, like a producer that retries."""
    for place, batch in enumerate(_sent(plan, plan.streamed, 3_000_000_000)):
        for _ in range(2 if place % 10 == 0 else 1):
            pipe = client.pipeline(transaction=False)
            for user, number in batch:
                action = _action(group, user, number, int(pin_ids[number % len(pin_ids)]))
                pipe.xadd(_STREAM, {field.name: value for field, value in action.ListFields()})
            pipe.execute()
