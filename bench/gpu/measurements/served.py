"""Measure the demo's model, served through gRPC from this GPU, at fixed rates with several client processes."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench.awake import kept_awake
from bench.client import LONG_S, offer_at
from bench.features.synthetic import fill
from bench.gpu.measurements.engine import ENGINE, LABEL, MODEL, MODELS, needs_gpu
from bench.gpu.numbers import Numbers
from bench.gpu.plan import DRY_RATES_PER_S, RATES_PER_S
from bench.processes import ServerProcess, server_process
from feature_client.stores.open_store import open_store
from loadtest.arrivals import poisson
from loadtest.open_loop import OK, Samples
from loadtest.workload import Workload
from model_store.registry.store import open_model_store

CANDIDATES, _DRY_CANDIDATES = 512, 16
_TARGET_MS = 10.0
_CLIENTS, _DRY_CLIENTS = 4, 2
_USERS, _DRY_USERS = 500, 20
_REQUESTS = 256
_WARMUP_S, _MEASURED_S, _DRY_S = 1.0, 5.0, 0.5
#: Seconds for the start of the clients, and for recording which numbers are missing.
_AROUND_S = 4.0
#: Limit for the server's warm-up: each stream captures a graph per shape, and the rates need time, too.
_WARM_UP_S_MAX = 25


def served(_out: Path, numbers: Numbers) -> None:
    """Fill a feature store, start the server, and offer every rate. Only complete answers count as good."""
    needs_gpu(numbers)
    rates = DRY_RATES_PER_S if numbers.dry_run else RATES_PER_S
    with tempfile.TemporaryDirectory(prefix="pinrank-gpu-") as made, kept_awake() as awake:
        folder = Path(made)
        feature_store = f"lmdb://{folder / 'features'}"
        config = folder / "pinrank.toml"
        config.write_text(
            f'model_store = "{MODELS}"\nmodel = "{MODEL}"\nlabels = ["{LABEL}"]\nengine = "{ENGINE}"\n'
            f'feature_store = "memory://"\n[swap]\nwarm_up_s_max = {_WARM_UP_S_MAX}\n'
            # How much memory a process with CUDA maps is unknown so far, and must not end the phase.
            f"proof_memory_bytes_max = {64 << 30}\n"
        )
        ids = asyncio.run(_filled(feature_store, _DRY_USERS if numbers.dry_run else _USERS))
        candidates = _DRY_CANDIDATES if numbers.dry_run else CANDIDATES
        requests = tuple(Workload(*ids, ((candidates, 1.0),), seed=0).requests(_REQUESTS))
        began_s, start_s = time.perf_counter(), numbers.left_s() - _MEASURED_S - 2 * _AROUND_S  # enough for one rate
        try:
            with server_process(config, feature_store, folder / "server.log", start_s) as server:
                started = {"candidates": candidates, "seconds": time.perf_counter() - began_s, "awake": awake}
                numbers.add("start", started)
                for rate in rates:
                    offered = partial(_offered, server, requests, rate, numbers)
                    numbers.measure(f"{rate}/s", offered, _AROUND_S)
        except Exception as error:  # noqa: BLE001 - the exception is recorded as the reason
            numbers.missing("start", f"{type(error).__name__}: {error}")


async def _filled(feature_store: str, users: int) -> tuple[np.ndarray, np.ndarray]:
    models = open_model_store(str(MODELS))
    store = open_store(feature_store)
    await store.start()
    found = await fill(store, models.read(MODEL, models.resolve(MODEL, LABEL)), users, seed=0)
    await store.close()
    return found


def _offered(server: ServerProcess, requests: tuple[bytes, ...], rate_per_s: int, numbers: Numbers) -> dict[str, Any]:
    """Offer requests with Poisson arrivals, an equal share from each client process."""
    clients = _DRY_CLIENTS if numbers.dry_run else _CLIENTS
    warmup_s, measured_s = (0.0, _DRY_S) if numbers.dry_run else (_WARMUP_S, _MEASURED_S)
    measured_s = min(measured_s, max(_DRY_S, numbers.left_s() - warmup_s - _AROUND_S / 2))
    due_s = [poisson(rate_per_s / clients, warmup_s + measured_s, seed) for seed in range(clients)]
    # One new process per client: grpc.aio does not work with a second event loop.
    with ProcessPoolExecutor(clients, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        samples = list(pool.map(partial(offer_at, server.address, requests, deadline_s=LONG_S), due_s))
    return summary([one.since(warmup_s) for one in samples], measured_s)


def summary(samples: Sequence[Samples], measured_s: float) -> dict[str, Any]:
    """Combine the samples of concurrent clients.

    Args:
        samples: samples of each client from the measurement window on.
        measured_s: length of the window, in seconds.
    """
    ok = np.array([status == OK for one in samples for status in one.statuses], bool)
    degraded = np.concatenate([one.degraded for one in samples])
    latency_ms = np.concatenate([one.latency_s for one in samples]) * 1e3
    late_ms = np.concatenate([one.late_s for one in samples]) * 1e3
    good = ok & ~degraded & (latency_ms <= _TARGET_MS)
    at = (("ms_p50", 0.5), ("ms_p99", 0.99))
    return {
        "offered_s": len(ok) / measured_s,
        "goodput_s": float(good.sum()) / measured_s,
        "good_share": float(good.mean()) if len(good) else 0.0,
        "target_ms": _TARGET_MS,
        **({name: float(np.quantile(latency_ms[ok], q)) for name, q in at} if ok.any() else {}),
        **({"late_ms_p99": float(np.quantile(late_ms, 0.99))} if len(late_ms) else {}),
        "statuses": dict(Counter(status for one in samples for status in one.statuses)),
        "degraded": int((degraded & ok).sum()),
    }
