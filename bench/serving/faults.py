"""Break Redis under steady load, and measure what callers see: statuses, P99, degradations and recovery time."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench import client
from bench.awake import kept_awake
from bench.features.synthetic import fill
from bench.harness import BenchmarkError, Claim, Conclusion, Raw, markdown_table
from bench.processes import server_process, single_process
from bench.test_bed import CONFIG, SEED, without_surfaces
from feature_client.bulk.write import write_rows
from feature_client.groups import FeatureGroup
from feature_client.stores.open_store import open_store
from loadtest.open_loop import OK, Samples
from loadtest.workload import Workload
from model_store.bundle.files import Bundle
from model_store.registry.store import open_model_store
from server.config_sources import load_config
from tests.faulty_proxy import FaultyProxy
from tests.redis_servers import RedisServer

#: Time between the message of the sending process that it is ready, and its first request, in seconds.
_LEAD_S = 0.1
#: Cached rows expire quickly, so that every request needs the store, or stale rows while the store is down.
_SETTINGS = "near_cache_stale_s = 0.2\n"


@dataclass(frozen=True, slots=True)
class FaultsPlan:
    rate_per_s: float = 40.0
    before_s: float = 4.0
    fault_s: float = 5.0
    after_s: float = 6.0
    users: int = 500
    deadline_s: float = 0.1


#: With a deadline that holds on a busy machine.
QUICK = FaultsPlan(rate_per_s=20.0, before_s=0.5, fault_s=0.6, after_s=1.5, users=20, deadline_s=1.0)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start."""
    plan = QUICK if quick else FaultsPlan()
    settings = load_config(config)
    models = open_model_store(settings.model_store)
    bundle = models.read(settings.model, models.resolve(settings.model, settings.labels[0]))
    with ExitStack() as stack:
        awake = stack.enter_context(kept_awake())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-faults-")))
        redis = RedisServer(folder)
        redis.start()
        stack.callback(redis.kill)
        users, pins = asyncio.run(_fill(redis.url, bundle, plan))
        network = _Network(redis.port)
        stack.callback(network.close)
        own = folder / "pinrank.toml"
        own.write_text(
            without_surfaces(config) + f'\nmodel_store = "{Path(settings.model_store).absolute()}"\n{_SETTINGS}'
        )
        server = stack.enter_context(server_process(own, network.proxy.url, folder / "server.log"))
        requests = tuple(Workload(users, pins, ((128, 1.0),), seed=SEED).requests(512))
        with single_process(calls_max=1) as caller:
            caller.submit(client.saturate, server.address, server.pid, requests, 2, 0.0, 1.0).result()

        def refill() -> None:
            redis.start()
            asyncio.run(_fill(redis.url, bundle, plan))

        faults: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            "silent": (lambda: network.set(silent=True), network.heal),
            f"{plan.deadline_s * 1e3:g} ms slow": (lambda: network.set(delay_s=plan.deadline_s), network.heal),
            "cut off": (lambda: network.set(refusing=True), network.heal),
            "killed, back empty, refilled": (redis.kill, refill),
            "values of another space": (
                lambda: asyncio.run(_overwrite(redis.url, bundle, pins, foreign=True)),
                lambda: asyncio.run(_overwrite(redis.url, bundle, pins, foreign=False)),
            ),
        }
        raw: Raw = {
            "deadline_ms": plan.deadline_s * 1e3,
            "rate_per_s": plan.rate_per_s,
            "cores_kept_awake": awake,
            "faults": {},
        }
        for name, (fault, heal) in faults.items():
            raw["faults"][name] = _under(plan, fault, heal, server.address, requests)
            yield raw


class _Network:
    """The faulty proxy, on an event loop in its own thread."""

    def __init__(self, port: int) -> None:
        self.proxy = FaultyProxy(port)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        ready = threading.Event()

        async def run() -> None:
            async with self.proxy.running():
                ready.set()
                await self._stop.wait()

        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(run()), daemon=True)
        self._thread.start()
        if not ready.wait(10):
            raise BenchmarkError("the proxy did not start")

    def set(self, **state: Any) -> None:
        done = threading.Event()

        def change() -> None:
            for name, value in state.items():
                setattr(self.proxy, name, value)
            done.set()

        self._loop.call_soon_threadsafe(change)
        done.wait(10)

    def heal(self) -> None:
        """End the fault, and close half-open connections."""
        self.set(silent=False, delay_s=0.0, refusing=True)
        self.set(refusing=False)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()


async def _fill(url: str, bundle: Bundle, plan: FaultsPlan) -> tuple[np.ndarray, np.ndarray]:
    store = open_store(url)
    await store.start()
    found = await fill(store, bundle, plan.users, SEED)
    await store.close()
    return found


async def _overwrite(url: str, bundle: Bundle, pins: np.ndarray, *, foreign: bool) -> None:
    """Overwrite half of the pins with rows of another group, or rewrite all of them."""
    store = open_store(url)
    await store.start()
    for group in bundle.manifest.needs.pin_groups:
        some = pins[::2]
        if foreign:
            other = FeatureGroup(
                **{**{name: getattr(group, name) for name in FeatureGroup.model_fields}, "version": 999}
            )
            await store.multi_put(
                (key, other.fingerprint + np.zeros(1, other.dtype).tobytes()) for key in group.keys(some)
            )
        else:
            await write_rows(store, group, some, np.zeros(len(some), group.dtype))
    await store.close()


def _offer_from(
    parent: Connection, address: str, requests: tuple[bytes, ...], due_s: np.ndarray, deadline_s: float
) -> None:
    """Offer requests from the time on the monotonic clock, which all processes share, that the parent says."""
    parent.send("ready")
    time.sleep(max(0.0, parent.recv() - time.monotonic()))
    parent.send(client.offer_at(address, requests, due_s, deadline_s))


@contextmanager
def _caller(address: str, requests: tuple[bytes, ...], due_s: np.ndarray, deadline_s: float) -> Iterator[Connection]:
    """Start a process that offers requests, and wait until it can: it needs only to be told when."""
    context = get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_offer_from, args=(its, address, requests, due_s, deadline_s))
    process.start()
    its.close()
    try:
        ours.recv()
        yield ours
    except EOFError as error:
        raise BenchmarkError("the process that sends the requests ended; its standard error says why") from error
    finally:
        process.kill()
        process.join()


def _under(
    plan: FaultsPlan, fault: Callable[[], None], heal: Callable[[], None], address: str, requests: tuple[bytes, ...]
) -> dict[str, Any]:
    """Offer requests at a steady rate, and start and end the fault meanwhile."""
    due_s = np.arange(int((plan.before_s + plan.fault_s + plan.after_s) * plan.rate_per_s)) / plan.rate_per_s
    times: dict[str, float] = {}
    with _caller(address, requests, due_s, plan.deadline_s) as caller:
        start_s = time.monotonic() + _LEAD_S
        caller.send(start_s)
        time.sleep(max(0.0, start_s + plan.before_s - time.monotonic()))
        fault()
        times["broken_s"] = time.monotonic() - start_s
        time.sleep(max(0.0, start_s + plan.before_s + plan.fault_s - time.monotonic()))
        heal()
        times["healed_s"] = time.monotonic() - start_s
        samples: Samples = caller.recv()
    status = np.array(samples.statuses)
    during = (samples.due_s >= times["broken_s"]) & (samples.due_s < times["healed_s"])
    ms = samples.latency_s * 1e3
    degraded = np.array([bool(kinds) for kinds in samples.degradations])
    after = np.flatnonzero((samples.due_s >= times["healed_s"]) & (degraded | (status != OK)))
    recovered_s = float(samples.due_s[after[-1]] - times["healed_s"]) if len(after) else 0.0
    return {
        **times,
        "requests_during": int(np.count_nonzero(during)),
        "errors": int(np.count_nonzero(status != OK)),
        "errors_during": int(np.count_nonzero(during & (status != OK))),
        "p99_before_ms": float(np.percentile(ms[samples.due_s < times["broken_s"]], 99)),
        "p99_during_ms": float(np.percentile(ms[during], 99)),
        "degraded_during": float(np.mean(degraded[during])),
        "recovered_s": recovered_s,
    }


def conclude(raw: Raw) -> Conclusion:
    found = raw["faults"]
    failed = sum(f["errors_during"] for f in found.values())
    worst_ms = max(f["p99_during_ms"] for f in found.values())
    claims = (
        Claim("calls that failed under any fault", failed, 0, "calls", "at_most"),
        Claim("P99 under the worst fault", worst_ms, raw["deadline_ms"], "ms", "at_most"),
    )
    header = ("fault", "calls", "failed", "degraded", "P99 before ms", "P99 during ms", "undegraded again after s")
    rows = [
        (
            name, str(f["requests_during"]), str(f["errors_during"]), f"{f['degraded_during']:.0%}",
            f"{f['p99_before_ms']:.1f}", f"{f['p99_during_ms']:.1f}", f"{f['recovered_s']:.1f}",
        )
        for name, f in found.items()
    ]  # fmt: skip
    summary = {f"{name}, P99 ms": f["p99_during_ms"] for name, f in found.items()}
    return Conclusion(summary, claims, markdown_table("Faults of Redis under load", header, rows))
