"""Swap 200 versions one after the other under steady load. In `swaps_broken`, every fifth version is broken.

All versions are published in advance, and the load never pauses. A swap lasts from the label's move until the old
version is unloaded. A pause of the same length follows, so that equally many requests are due during and between swaps,
and a stall of the machine affects both equally.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import client
from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from bench.processes import Memory, memory
from bench.serving.broken_bundles import FAULTS, nothing
from bench.test_bed import CONFIG, SEED, TestBed, scene, without_surfaces
from loadtest import open_loop
from loadtest.arrivals import poisson
from model_store.bundle.files import Bundle, write_bundle
from model_store.registry.open_objects import open_objects
from model_store.registry.store import ModelStore, open_model_store
from pinrank.channels import open_channel
from pinrank.v1 import models_pb2, models_pb2_grpc
from server.config_sources import load_config

_TOKEN = "of-the-benchmark"  # noqa: S105 - valid only for this server, on loopback
_DEADLINE_S = 2.0
_LABEL = "stable"
_FIRST = 1_000
#: Seconds between polls of a swap's progress. A poll takes a millisecond or two of the server's time.
_LOOK_S = 0.5
_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class SwapsPlan:
    swaps: int = 200
    #: Load, as a share of the saturated rate.
    load: float = 0.7
    saturated_s: float = 6.0
    #: Callers of a closed loop before the measurement: a process keeps some memory of its busiest moment, and a stall
    #: of the machine would otherwise cause that moment during the measurement.
    flood_callers: int = 200
    flood_s: float = 3.0
    #: The load runs in parts, each with its own generator.
    part_s: float = 300.0
    warmup_s: float = 2.0
    callers: int = 8
    #: First swaps to exclude from the slope of memory, while pools still grow.
    settling: int = 50
    #: Swaps in a round. Each round compares swaps with the pauses between them, so that a stall of the machine affects
    #: only one of many rounds.
    round_swaps: int = 10
    #: Settings of the [swap] table.
    settings: str = "poll_s = 0.25\nretry_s = 600\n"


_AT_ONCE = "poll_s = 0.1\nretry_s = 600\ncpu_share = 0.5\n"
#: A low load, because half a second says little about the capacity of a busy machine.
QUICK = SwapsPlan(
    swaps=5,
    load=0.25,
    saturated_s=0.5,
    flood_callers=16,
    flood_s=0.5,
    part_s=6.0,
    warmup_s=0.5,
    settling=1,
    settings=_AT_ONCE,
)


@dataclass(frozen=True, slots=True)
class Swap:
    """One move of a label, with times on the monotonic clock. `fault` is empty for a valid version."""

    version: int
    fault: str
    began_s: float
    ended_s: float
    outcome: str
    memory: Memory


def measure(*, quick: bool = False, config: Path = CONFIG, broken_every: int = 0) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a version neither serves nor fails in time."""
    plan = QUICK if quick else SwapsPlan()
    with tempfile.TemporaryDirectory(prefix="pinrank-swaps-") as folder:
        own, store, bundle = prepared(Path(folder), config)
        with scene(own, extra=f"[swap]\n{plan.settings}") as stage, _calls(stage.server.address) as status:
            for callers, duration_s in ((plan.flood_callers, plan.flood_s), (plan.callers, plan.saturated_s)):
                held = stage.client.submit(
                    client.saturate, *stage.server[:2], stage.subject.requests, callers, 1.0, duration_s
                ).result()
            rate_per_s = plan.load * held.summary.achieved_per_s
            for told in _run(plan, stage, store, bundle, status, rate_per_s, broken_every, Path(folder)):
                yield {"plan": asdict(plan), "rate_per_s": rate_per_s, **told}


def prepared(folder: Path, config: Path) -> tuple[Path, ModelStore, Bundle]:
    """Create a model store with the configured version, and settings for it."""
    settings = load_config(config)
    source = open_model_store(settings.model_store)
    bundle = source.read(settings.model, source.resolve(settings.model, settings.labels[0]))
    store = open_model_store(folder / "models")
    publish(store, bundle, bundle.manifest.version, {}, {}, folder)
    store.set_label(settings.model, _LABEL, bundle.manifest.version)
    token = folder / "token"
    token.write_text(_TOKEN)
    own = folder / "pinrank.toml"
    kept = [line for line in without_surfaces(config).splitlines() if not line.startswith("labels")]
    added = (f'model_store = "{folder / "models"}"', f'labels = ["{_LABEL}"]', f'admin_token_file = "{token}"')
    own.write_text("\n".join([*kept, *added]) + "\n")
    return own, store, bundle


@contextmanager
def _calls(address: str) -> Iterator[Callable[[], models_pb2.StatusResponse]]:
    with open_channel(address) as channel:
        stub = models_pb2_grpc.ModelServiceStub(channel)
        metadata = (("authorization", f"Bearer {_TOKEN}"),)
        yield lambda: stub.Status(models_pb2.StatusRequest(), timeout=10, metadata=metadata)


def _run(
    plan: SwapsPlan,
    stage: TestBed,
    store: ModelStore,
    bundle: Bundle,
    status: Callable[[], models_pb2.StatusResponse],
    rate_per_s: float,
    broken_every: int,
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """Publish new versions, and move the label from one to the next under load. Yields the results after each part."""
    faults = [""] * plan.swaps
    afters: list[Callable[[], None]] = []
    for i in range(plan.swaps):
        if broken_every and i % broken_every == broken_every - 1:
            faults[i] = list(FAULTS)[i // broken_every % len(FAULTS)]
        fields, files, after = FAULTS[faults[i]](bundle, _FIRST + i) if faults[i] else ({}, {}, nothing)
        publish(store, bundle, _FIRST + i, fields, files, folder)
        afters.append(partial(after, open_objects(store.where), store, _FIRST + i))
    swaps: list[Swap] = []
    parts: list[tuple[float, open_loop.Samples]] = []
    while len(swaps) < plan.swaps:
        due_s = poisson(rate_per_s, plan.part_s, SEED + len(parts))
        load = stage.client.submit(_offer, stage.server.address, stage.subject.requests, due_s)
        until_s = time.monotonic() + plan.part_s
        time.sleep(plan.warmup_s)
        longest_s = 0.0
        while len(swaps) < plan.swaps and time.monotonic() + (1.2 + _PAUSE) * longest_s < until_s:
            i = len(swaps)
            swaps.append(_swap(stage, store, bundle.manifest.name, status, _FIRST + i, faults[i], afters[i]))
            length_s = swaps[-1].ended_s - swaps[-1].began_s
            longest_s = max(longest_s, length_s)
            time.sleep(length_s * _PAUSE)
        parts.append(load.result())
        yield _told(plan, swaps, parts, bundle)


def _offer(address: str, requests: tuple[bytes, ...], due_s: np.ndarray) -> tuple[float, open_loop.Samples]:
    """Offer requests at given times. Return the start, on the monotonic clock, and the results."""
    began_s = time.perf_counter()  # all processes share the monotonic clock
    return began_s, client.offer_at(address, requests, due_s, _DEADLINE_S)


def _swap(
    stage: TestBed,
    store: ModelStore,
    model: str,
    status: Callable[[], models_pb2.StatusResponse],
    version: int,
    fault: str,
    after: Callable[[], None],
) -> Swap:
    began_s = time.perf_counter()
    store.set_label(model, _LABEL, version, by="bench")
    after()
    for _ in range(240):
        time.sleep(_LOOK_S)
        found = {one.version: one for one in status().versions}
        own = found.get(version)
        if own is not None and (own.phase == "failed" or (own.phase == "serving" and len(found) == 1)):
            break
    else:
        raise BenchmarkError(f"version {version} ({fault or 'good'}) neither serves nor failed: {found}")
    outcome = f"{own.phase} {own.reason}".strip()
    return Swap(version, fault, began_s, time.perf_counter(), outcome, memory(stage.server.pid))


def publish(
    store: ModelStore, bundle: Bundle, version: int, fields: dict[str, Any], files: dict[str, bytes], folder: Path
) -> None:
    """Publish the bundle, with changes, as another version."""
    own = {name: getattr(bundle.manifest, name) for name in type(bundle.manifest).model_fields if name != "files"}
    target = folder / "bundles" / str(version)
    kept = {name: content for name, content in bundle.files.items() if name != "embeddings.npz"}
    write_bundle(target, {**own, "version": version, **fields}, {**kept, **files})
    store.publish(target, by="bench")


def _told(
    plan: SwapsPlan, swaps: list[Swap], parts: list[tuple[float, open_loop.Samples]], bundle: Bundle
) -> dict[str, Any]:
    """Summarise a run: what callers saw during and between swaps, and the server's memory."""
    good = {f"{bundle.manifest.name}@{swap.version}" for swap in swaps if not swap.fault}
    started = min(swap.version for swap in swaps)
    good |= {name for _, s in parts for name in s.models if int(name.partition("@")[2]) < started}
    during: list[np.ndarray] = []
    between: list[np.ndarray] = []
    rounds: list[tuple[list[np.ndarray], list[np.ndarray]]]
    rounds = [([], []) for _ in range(-(-len(swaps) // plan.round_swaps))]
    failed: dict[str, int] = {}
    degraded: dict[str, int] = {}
    requests = invalid = 0
    for began_s, samples in parts:
        kept = samples.due_s >= plan.warmup_s
        swapping = np.zeros(len(samples.due_s), bool)
        of_round = np.full(len(samples.due_s), -1)
        for i, swap in enumerate(swaps):
            paused_s = swap.ended_s + _PAUSE * (swap.ended_s - swap.began_s)
            start, end, paused = np.searchsorted(samples.due_s + began_s, [swap.began_s, swap.ended_s, paused_s])
            swapping[start:end] = True
            of_round[start:paused] = i // plan.round_swaps
        for i, (inside, outside) in enumerate(rounds):
            own = kept & (of_round == i)
            inside.append(samples.latency_s[own & swapping])
            outside.append(samples.latency_s[own & ~swapping])
        requests += len(samples.due_s)
        for status in samples.statuses:
            if status != open_loop.OK:
                failed[status] = failed.get(status, 0) + 1
        for kinds in samples.degradations:
            for kind in kinds:
                degraded[kind] = degraded.get(kind, 0) + 1
        invalid += len(set(samples.models) - good)
        during.append(samples.latency_s[kept & swapping])
        between.append(samples.latency_s[kept & ~swapping])
    ratios = [_p99(inside) / _p99(outside) for inside, outside in rounds]
    in_ms, out_ms = (np.concatenate(values) * 1e3 for values in (during, between))
    own, files = (
        np.array([getattr(swap.memory, name) for swap in swaps], np.float64) for name in ("own_bytes", "file_bytes")
    )
    slope, error = slope_with_error(own[plan.settling :])
    file_slope, file_error = slope_with_error(files[plan.settling :])
    return {
        "requests": requests,
        "failed": failed,
        "degraded": degraded,
        "versions_invalid": invalid,
        "swap_s": {"p50": float(np.median([s.ended_s - s.began_s for s in swaps if not s.fault]))},
        "during_ms": _quantiles(in_ms),
        "between_ms": _quantiles(out_ms),
        "p99_ratios": [round(ratio, 3) for ratio in ratios if np.isfinite(ratio)],
        "own_slope_bytes_a_swap": slope,
        "own_slope_error_bytes_a_swap": error if np.isfinite(error) else None,
        "file_slope_bytes_a_swap": file_slope,
        "file_slope_error_bytes_a_swap": file_error if np.isfinite(file_error) else None,
        "own_mb": [own[0] / 1e6, own[-1] / 1e6],
        "file_mb": [files[0] / 1e6, files[-1] / 1e6],
        "mistaken": {s.version: s.outcome for s in swaps if s.outcome.startswith("failed") != bool(s.fault)},
        "faults": {s.fault: s.outcome for s in swaps if s.fault},
        "swaps": [
            [s.version, s.fault, round(s.began_s, 3), round(s.ended_s, 3), s.memory.own_bytes, s.memory.file_bytes]
            for s in swaps
        ],
    }


def slope_with_error(values: np.ndarray) -> tuple[float, float]:
    """Return the slope of a regression line, and twice its standard error, for autocorrelated values.

    The memory after one swap depends on that after the swap before, so the autocorrelation of the residuals widens the
    error (effective number of values: Bartlett, 1935).
    """
    if len(values) < 3:
        return 0.0, float("inf")
    x = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(x @ values / (x @ x))
    residuals = values - values.mean() - slope * x
    together = float(residuals[:-1] @ residuals[1:] / max(residuals @ residuals, 1e-9))
    effective = max(3.0, len(values) * (1 - max(0.0, together)) / (1 + max(0.0, together)))
    variance = float(residuals @ residuals) / (effective - 2) / len(values) * effective
    return slope, 2 * float(np.sqrt(variance / (x @ x) * len(values) / effective))


def _p99(parts: list[np.ndarray]) -> float:
    values = np.concatenate(parts)
    return float(np.nanquantile(values, 0.99)) if len(values) else float("nan")


def _quantiles(values: np.ndarray) -> dict[str, float | None]:
    names = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    return {name: float(np.nanquantile(values, at)) if len(values) else None for name, at in names.items()} | {
        "requests": len(values)
    }


def conclude(run: Raw) -> Conclusion:
    plan, ratios = run["plan"], run["p99_ratios"]
    claims = (
        Claim("requests failed", sum(run["failed"].values()), 0, "requests", "at_most"),
        Claim("requests degraded", sum(run["degraded"].values()), 0, "requests", "at_most"),
        Claim("versions answered that should not be", run["versions_invalid"], 0, "versions", "at_most"),
        Claim("good versions refused, or broken ones served", len(run["mistaken"]), 0, "versions", "at_most"),
        Claim(
            f"P99 during swaps over between them, median of rounds of {plan['round_swaps']}",
            float(np.median(ratios)) if ratios else None, 1.2, "ratio", "at_most",
            "" if ratios else "no round has requests both during and between swaps",
        ),
        Claim.ratio(
            "slope of the server's own memory over its error (2 sigma)",
            abs(run["own_slope_bytes_a_swap"]), run["own_slope_error_bytes_a_swap"], 1.0, "at_most",
            without="the slope has no error: too few swaps, or memory that never changed",
        ),
    )  # fmt: skip
    during_ms, between_ms = run["during_ms"]["p99"], run["between_ms"]["p99"]
    summary: dict[str, float | None] = {
        "rate, requests/s": run["rate_per_s"],
        "load, part of saturated": plan["load"],
        "swaps": len(run["swaps"]),
        "requests": run["requests"],
        "a swap takes, s": run["swap_s"]["p50"],
        "P50 during, ms": run["during_ms"]["p50"],
        "P50 between, ms": run["between_ms"]["p50"],
        "P99 during, ms": run["during_ms"]["p99"],
        "P99 between, ms": run["between_ms"]["p99"],
        "P99 during over between, all together": during_ms / between_ms if during_ms and between_ms else None,
        "own memory's slope, bytes a swap": run["own_slope_bytes_a_swap"],
        "its error (2 sigma), bytes a swap": run["own_slope_error_bytes_a_swap"],
        "mapped files' slope, bytes a swap": run["file_slope_bytes_a_swap"],
        "own memory first, MB": run["own_mb"][0],
        "own memory last, MB": run["own_mb"][1],
        "mapped files first, MB": run["file_mb"][0],
        "mapped files last, MB": run["file_mb"][1],
    }
    return Conclusion(summary, claims)
