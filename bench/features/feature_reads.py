"""Measure feature reads of one request from a real Redis: with pinrank, plain redis-py, Feast, and a bare socket.

Every round reads the same users and pins in each way, in turns, so that a slower machine affects all of them. Then
the server gets 80% of its sustainable load, and reports the times of its own fetch and assembly stages.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis.asyncio as redis
import uvloop

from bench import client
from bench.awake import kept_awake
from bench.features.synthetic import fill, power_law
from bench.harness import ROOT, BenchmarkError, Claim, Conclusion, Raw
from bench.processes import server_process, single_process
from bench.test_bed import CONFIG, SEED, known_median, without_surfaces
from feature_client.codec import decode_rows
from feature_client.fetch import fetch
from feature_client.groups import FeatureNeeds
from feature_client.near_cache import NearCache, near_caches
from feature_client.stores.open_store import open_store
from loadtest.workload import Workload
from model_store.bundle.files import Bundle
from model_store.registry.store import open_model_store
from server.config_sources import load_config
from tests.redis_servers import running

CANDIDATES = 128
_CACHE_BYTES = 64 << 20
_FEAST_PINS = 20_000


@dataclass(frozen=True, slots=True)
class FeatureReadsPlan:
    pins: int = 1_000_000
    users: int = 2_000
    rounds: int = 5
    reads: int = 300
    serve_s: float = 8.0
    search_s: float = 3.0
    search_tries: int = 7


QUICK = FeatureReadsPlan(pins=5_000, users=50, rounds=1, reads=5, serve_s=0.5, search_s=0.3, search_tries=2)


def measure(*, quick: bool = False, config: Path = CONFIG, feast_python: Path | None = None) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start.

    Args:
        quick: measure little.
        config: TOML file with the server's settings.
        feast_python: Python interpreter with `feast[redis]`; None means `.venv-feast`, if it exists (see
            bench/features/feast_reads.py).
    """
    plan = QUICK if quick else FeatureReadsPlan()
    feast_python = feast_python or ROOT / ".venv-feast" / "bin" / "python"
    settings = load_config(config)
    models = open_model_store(settings.model_store)
    bundle = models.read(settings.model, models.resolve(settings.model, settings.labels[0]))
    with ExitStack() as stack:
        awake = stack.enter_context(kept_awake())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-reads-")))
        port = stack.enter_context(running(folder)).port
        url = f"redis://127.0.0.1:{port}/0"
        user_ids, pin_ids = asyncio.run(_fill(url, bundle, plan))
        reader = stack.enter_context(single_process())
        raw: Raw = {"pins": plan.pins, "users": plan.users, "cores_kept_awake": awake, "rounds": [], "served": []}
        for number in range(plan.rounds):
            read = reader.submit(_read_all, url, port, bundle, plan, SEED + number).result()
            feast = _feast(feast_python, port, plan, SEED + number, fill_first=number == 0)
            raw["rounds"].append({**read, "feast": feast})
            yield raw
        own = folder / "pinrank.toml"
        own.write_text(without_surfaces(config) + f'\nmodel_store = "{Path(settings.model_store).absolute()}"\n')
        server = stack.enter_context(server_process(own, url, folder / "server.log"))
        caller = stack.enter_context(single_process(calls_max=1))
        requests = tuple(Workload(user_ids, pin_ids, ((CANDIDATES, 1.0),), seed=SEED).requests(2_000))
        caller.submit(client.saturate, server.address, server.pid, requests, 2, 0.0, 2.0).result()
        raw["holds_per_s"], _ = caller.submit(
            client.highest_rate, server.address, requests, 60.0, 25.0, 0.5, plan.search_s, SEED, plan.search_tries
        ).result()
        rate_per_s = 0.8 * max(raw["holds_per_s"], 10.0)
        for number in range(plan.rounds):
            served = caller.submit(
                client.offer, server.address, requests, rate_per_s, 1.0, plan.serve_s, SEED + number, 1.0, 25.0
            ).result()
            raw["served"].append(served.as_json())
            yield raw


async def _fill(url: str, bundle: Bundle, plan: FeatureReadsPlan) -> tuple[np.ndarray, np.ndarray]:
    store = open_store(url)
    await store.start()
    found = await fill(store, bundle, plan.users, SEED, plan.pins)
    await store.close()
    return found


def _read_all(url: str, port: int, bundle: Bundle, plan: FeatureReadsPlan, seed: int) -> dict[str, Any]:
    """Time every way to read, in a separate process, in milliseconds."""
    return uvloop.run(_read_each(url, port, bundle.manifest.needs, plan, seed))


async def _read_each(  # noqa: C901 - four ways to read in one function
    url: str, port: int, needs: FeatureNeeds, plan: FeatureReadsPlan, seed: int
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shares = power_law(plan.pins)
    wanted = [
        (
            int(rng.integers(1, plan.users + 1)),
            np.unique(rng.choice(plan.pins, CANDIDATES, p=shares)).astype(np.uint64) + 1,
        )
        for _ in range(plan.reads)
    ]
    store = open_store(url)
    await store.start()
    plain = redis.Redis.from_url(url)
    caches = near_caches(needs.pin_groups, _CACHE_BYTES, 3_600)

    async def ours(user: int, pins: np.ndarray, near: dict[bytes, NearCache] | None = None) -> int:
        fetched = await fetch(store, needs, user, pins, None, 5.0, near)
        if fetched.store_unavailable:
            raise BenchmarkError(f"a read failed: {fetched.store_failure}")
        return len(fetched.pins[needs.pin_groups[0].name].rows)

    async def pipelined(user: int, pins: np.ndarray) -> int:
        """The simple way: one pipeline for the user, and one for the pins."""
        pipe = plain.pipeline(transaction=False)
        for group in needs.user_groups:
            pipe.get(group.key(user))
        if needs.sequence:
            pipe.get(needs.sequence.key(user))
        values = await pipe.execute()
        if needs.sequence:
            events = np.frombuffer(values[-1][8:], needs.sequence.dtype)[-needs.sequence_length :]
            pins = np.concatenate([pins, events["pin_id"]])
        distinct = np.unique(pins)
        pipe = plain.pipeline(transaction=False)
        for group in needs.pin_groups:
            for key in group.keys(distinct):
                pipe.get(key)
        read = await pipe.execute()
        return len(decode_rows(needs.pin_groups[0], read[: len(distinct)]).rows)

    async def cached(user: int, pins: np.ndarray) -> int:
        return await ours(user, pins, caches)

    bytes_alone = _BytesAlone(port, needs)

    async def alone(user: int, pins: np.ndarray) -> int:
        return bytes_alone.read(user, pins)

    for user, pins in wanted:  # the pins are cached; each request reads its user
        await cached(user, pins)
    ways: dict[str, Callable[[int, np.ndarray], Awaitable[int]]] = {
        "cold": ours, "cached": cached, "redis_py": pipelined, "bytes_alone": alone,
    }  # fmt: skip
    took_s: dict[str, list[float]] = {name: [] for name in ways}
    for number, (user, pins) in enumerate(wanted):
        # Whoever reads first finds the pins in none of the server's caches, so each way has its turn.
        order = [*ways, *ways][number % len(ways) :][: len(ways)]
        for name in order:
            start_s = time.perf_counter()
            await ways[name](user, pins)
            took_s[name].append(time.perf_counter() - start_s)
    bytes_alone.close()
    await plain.aclose()
    await store.close()
    return {
        name: dict(zip(("p50_ms", "p99_ms"), (np.percentile(seconds, (50, 99)) * 1e3).tolist(), strict=True))
        for name, seconds in took_s.items()
    }


class _BytesAlone:
    """A blocking socket that sends the same two MGETs, encoded in advance, and reads the replies without parsing them.

    `redis-benchmark` with one client would measure the same two round trips.
    """

    def __init__(self, port: int, needs: FeatureNeeds) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._needs = needs

    def read(self, user: int, pins: np.ndarray) -> int:
        groups = self._needs.user_groups
        keys = [group.key(user) for group in groups]
        sizes = [group.stored_dtype.itemsize for group in groups]
        if sequence := self._needs.sequence:
            keys.append(sequence.key(user))
            sizes.append(8 + sequence.length_max * sequence.dtype.itemsize)
        received = self._ask(keys, sizes)
        events = np.zeros(0, np.uint64)
        if self._needs.sequence:
            body = received[-2 - sizes[-1] + 8 : -2]
            events = np.frombuffer(body, self._needs.sequence.dtype)["pin_id"][-self._needs.sequence_length :]
        distinct = np.unique(np.concatenate([pins, events]))
        for group in self._needs.pin_groups:
            self._ask(group.keys(distinct), [group.stored_dtype.itemsize] * len(distinct))
        return len(distinct)

    def _ask(self, keys: list[bytes], sizes: list[int]) -> bytes:
        parts = [f"*{len(keys) + 1}\r\n$4\r\nMGET\r\n".encode()]
        parts += [b"$%d\r\n%b\r\n" % (len(key), key) for key in keys]
        self._socket.sendall(b"".join(parts))
        expected = len(f"*{len(keys)}\r\n") + sum(len(f"${size}\r\n") + size + 2 for size in sizes)
        received = bytearray()
        while len(received) < expected:
            received += self._socket.recv(1 << 18)
        return bytes(received)

    def close(self) -> None:
        self._socket.close()


def _feast(python: Path, port: int, plan: FeatureReadsPlan, seed: int, *, fill_first: bool) -> dict[str, float] | None:
    """Time Feast's online read of the same number of entities. Return None if Feast is not installed."""
    if not python.exists():
        return None
    import json  # noqa: PLC0415

    command = [
        str(python), str(ROOT / "bench" / "features" / "feast_reads.py"), str(port), str(min(_FEAST_PINS, plan.pins)),
        str(CANDIDATES + 100), str(max(3, plan.reads // 10)), str(seed), str(int(fill_first)),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"Feast failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def conclude(raw: Raw) -> Conclusion:
    rounds, served = raw["rounds"], raw["served"]

    def of(way: str, quantile: str = "p50_ms") -> float | None:
        return known_median([r[way][quantile] for r in rounds if r[way]])

    def stages(kind: str) -> float | None:
        return known_median([s[kind]["fetch"] + s[kind]["assemble"] for s in served])

    claims = (
        Claim("fetch and assembly in the server at 80% of its rate, P50", stages("stage_ms"), 0.6, "ms", "at_most"),
        Claim("fetch and assembly, the sum of both P99", stages("stage_p99_ms"), 3.0, "ms", "at_most"),
        Claim.ratio(
            "Feast's read over ours, cold", of("feast"), of("cold"), 5.0, "at_least", without="Feast is not installed"
        ),
        Claim.ratio("our cold read over the bytes alone", of("cold"), of("bytes_alone"), 1.6, "at_most"),
    )
    summary = {
        **{
            f"{name}, {quantile.upper()} ms": of(way, f"{quantile}_ms")
            for way, name in (
                ("cold", "ours, nothing cached"), ("cached", "ours, pins cached"),
                ("redis_py", "redis-py pipelines"), ("feast", "Feast"), ("bytes_alone", "the bytes alone"),
            )
            for quantile in ("p50", "p99")
        },
        "the server holds, requests/s": raw["holds_per_s"],
        "fetch in the server at 80%, P50 ms": known_median([s["stage_ms"]["fetch"] for s in served]),
        "fetch in the server at 80%, P99 ms": known_median([s["stage_p99_ms"]["fetch"] for s in served]),
    }  # fmt: skip
    return Conclusion(summary, claims)
