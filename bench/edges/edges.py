"""Compare servers of the gRPC edge by the same echo: our native edge, grpc.aio, an older grpc.aio, and pygrpc-native.

The others are no dependencies of pinrank. Each has an environment of its own, and is left out where it is not there:

    python -m venv .venv-edges/grpcio-1.75
    .venv-edges/grpcio-1.75/bin/pip install grpcio==1.75.1 uvloop
    python -m venv .venv-edges/pygrpc-native
    .venv-edges/pygrpc-native/bin/pip install pygrpc-native==0.5.0 grpcio uvloop

What pygrpc-native 0.5 has, tried on loopback: deadlines and cancellation (the handler's task is cancelled), Unix
sockets, and a stop that waits for calls in flight. Unary and server-streaming methods, such as those of health, run in
its own threads. Bidirectional ones, such as reflection, reach a grpc.aio server behind it, which sees a socket as their
peer.

What it lacks, and refuses with an error: TLS, connections that end by age or idleness, compression, and a limit on
concurrent calls.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import client
from bench.awake import kept_awake
from bench.harness import ROOT, BenchmarkError, Conclusion, Raw, markdown_table
from bench.processes import cpu_seconds, single_process
from bench.test_bed import SEED, check_all_ok, median
from loadtest.workload import Workload
from pinrank.v1 import ranking_pb2

ENVIRONMENTS = ROOT / ".venv-edges"
CANDIDATES = 128


@dataclass(frozen=True, slots=True)
class Edge:
    """A server to compare: its environment (empty: the one of this process), and the module that serves."""

    name: str
    environment: str
    module: str


EDGES = (
    Edge("the native edge", "", "native"),
    Edge("grpc.aio of today", "", "grpc.aio"),
    Edge("grpc.aio 1.75", "grpcio-1.75", "grpc.aio"),
    Edge("pygrpc_native.aio", "pygrpc-native", "pygrpc_native.aio"),
    Edge("pygrpc_native without an event loop", "pygrpc-native", "pygrpc_native"),
)


@dataclass(frozen=True, slots=True)
class EdgesPlan:
    rounds: int = 5
    rate_per_s: float = 500.0
    offered_s: float = 4.0
    warmup_s: float = 0.5
    saturated_s: float = 3.0
    callers: int = 16


QUICK = EdgesPlan(rounds=1, rate_per_s=100.0, offered_s=0.5, warmup_s=0.1, saturated_s=0.3)


def measure(*, quick: bool = False, environments: Path = ENVIRONMENTS) -> Iterator[Raw]:
    """Measure every server that is installed, in alternating rounds. Raises BenchmarkError if one does not answer."""
    plan = QUICK if quick else EdgesPlan()
    users, pins = np.arange(1, 501, dtype=np.uint64), np.arange(1, 5_001, dtype=np.uint64)
    requests = tuple(Workload(users, pins, ((CANDIDATES, 1.0),), seed=SEED).requests(256))
    answer = ranking_pb2.RankResponse(pin_ids=range(1, CANDIDATES + 1), utilities=[0.5] * CANDIDATES)
    pythons = {edge: _python(edge, environments) for edge in EDGES}
    rounds: list[dict[str, Any]] = []
    with kept_awake() as awake, single_process(calls_max=1) as caller:
        for number in range(plan.rounds):
            rounds.append({})
            for edge, python in pythons.items():
                if not python.exists():
                    continue
                with _served(edge, python, answer.SerializeToString()) as (address, pid, versions):
                    used_s = cpu_seconds(pid)
                    offered = caller.submit(
                        client.offer, address, requests, plan.rate_per_s, 0.0, plan.offered_s, SEED + number
                    ).result()
                    used_s = cpu_seconds(pid) - used_s
                    full = caller.submit(
                        client.saturate, address, pid, requests, plan.callers, plan.warmup_s, plan.saturated_s
                    ).result()
                    check_all_ok(edge.name, offered)
                    check_all_ok(edge.name, full.summary)
                    assert offered.latency_ms is not None, "all were answered"  # noqa: S101
                    rounds[-1][edge.name] = {
                        "versions": versions,
                        "cpu_ms_per_call": used_s / sum(offered.statuses.values()) * 1e3,
                        "latency_ms": asdict(offered.latency_ms),
                        "saturated_per_s": full.summary.achieved_per_s,
                        "saturated_cpu_ms_per_call": full.server_cpu_s / sum(full.summary.statuses.values()) * 1e3,
                    }
            yield {
                "rate_per_s": plan.rate_per_s, "candidates": CANDIDATES, "cores_kept_awake": awake, "rounds": rounds,
                "missing": [edge.name for edge, python in pythons.items() if not python.exists()],
            }  # fmt: skip


def _python(edge: Edge, environments: Path) -> Path:
    return environments / edge.environment / "bin" / "python" if edge.environment else Path(sys.executable)


@contextmanager
def _served(edge: Edge, python: Path, answer: bytes) -> Iterator[tuple[str, int, dict[str, str | None]]]:
    """Run a server. Yields its address, process id and versions."""
    script = Path(__file__).with_name("edge_server.py")
    with subprocess.Popen(
        [python, script, edge.module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}
    ) as process:
        assert process.stdin is not None  # noqa: S101 - both pipes were requested
        assert process.stdout is not None  # noqa: S101
        try:
            process.stdin.write(len(answer).to_bytes(4, "little") + answer)
            process.stdin.flush()
            said = process.stdout.readline()
            if not said:
                raise BenchmarkError(f"{edge.name} did not start; it ended with {process.wait()}")
            found = json.loads(said)
            yield f"127.0.0.1:{found['port']}", found["pid"], found["versions"]
        finally:
            process.kill()


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]
    summary: dict[str, float | None] = {}
    rows = []
    for name in rounds[0]:
        of = [r[name] for r in rounds]
        values = {
            "core-ms a call": median([one["cpu_ms_per_call"] for one in of]),
            "P50 ms": median([one["latency_ms"]["p50"] for one in of]),
            "P99 ms": median([one["latency_ms"]["p99"] for one in of]),
            "saturated, calls/s": median([one["saturated_per_s"] for one in of]),
            "saturated, core-ms a call": median([one["saturated_cpu_ms_per_call"] for one in of]),
        }
        summary |= {f"{name}, {what}": value for what, value in values.items()}
        versions = ", ".join(f"{package} {found}" for package, found in of[0]["versions"].items() if found)
        rows.append((name, versions, *(f"{value:.3g}" for value in values.values())))
    table = markdown_table(
        f"An echo of {raw['candidates']} candidates at {raw['rate_per_s']:g} calls/s",
        ("server", "versions", *(what for what in values)), rows,
    )  # fmt: skip
    return Conclusion(summary, (), table)
