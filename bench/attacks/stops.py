"""Stop servers with SIGTERM under load, and count what their clients notice.

Two servers stand behind a client that balances by itself (round_robin). One at a time is stopped, and started again on
the same ports, before the other one is. One client has the documented retry policy, and one has none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.attacks.clients import Load, clients, offer_until_over, steady
from bench.attacks.place import Place, place
from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from bench.processes import ServerProcess
from bench.test_bed import CONFIG
from loadtest.open_loop import OK
from pinrank.channels import SERVICE_CONFIG
from tests.redis_servers import cluster_ports

_CANDIDATES, _DEADLINE_S, _LAME_DUCK_S = 64, 1.0, 1.0
_CHUNK_S = 2.0
_ROUND_ROBIN: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
_POLICIES = {"with": SERVICE_CONFIG | _ROUND_ROBIN, "without": _ROUND_ROBIN}
#: Time for clients to find a server again that was started anew.
_BACK_S, _LOOK_S = 30.0, 0.2


@dataclass(frozen=True, slots=True)
class StopsPlan:
    stops: int = 200
    #: Calls a second of each client: one server must hold both beside another one's start, which uses every core.
    per_s: float = 20.0
    #: Load between stops, with both servers.
    between_s: float = 1.0


QUICK = StopsPlan(stops=2, between_s=0.2)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start, or is not called again afterwards."""
    plan = QUICK if quick else StopsPlan()
    with place(config) as ground, ExitStack() as running:
        # None of those that Linux gives to connections, one of which could take a port while its server is stopped.
        ports = cluster_ports(4)
        pairs = ((ports[0], ports[1]), (ports[2], ports[3]))
        target = "ipv4:" + ",".join(f"127.0.0.1:{grpc_port}" for grpc_port, _ in pairs)
        stacks = [running.enter_context(ExitStack()) for _ in pairs]
        for number, stack in enumerate(stacks):
            _start(ground, stack, number, pairs[number])
        due_s = steady(plan.per_s, _CHUNK_S)
        requests = ground.requests(_CANDIDATES)
        loads = [Load(target, requests, _DEADLINE_S, due_s, service_config=one) for one in _POLICIES.values()]
        stops: list[dict[str, float]] = []
        with clients(*(partial(offer_until_over, (load,)) for load in loads)) as jobs:
            for stop in range(plan.stops):
                number = stop % len(stacks)
                time.sleep(plan.between_s)
                began_s = time.monotonic()
                stacks[number].close()
                stopped_s = time.monotonic()
                server = _start(ground, stacks[number], number, pairs[number])
                _await_calls(server)
                stops.append({"stop_s": stopped_s - began_s, "back_s": time.monotonic() - stopped_s})
        chunks = dict(zip(_POLICIES, (job.result()[0] for job in jobs), strict=True))
    yield {"stops": stops, "chunks": chunks}


def _start(ground: Place, stack: ExitStack, number: int, ports: tuple[int, int]) -> ServerProcess:
    settings = {"lame_duck_s": _LAME_DUCK_S}
    return stack.enter_context(ground.server(f"server-{number}", settings, ports=ports))


def _await_calls(server: ServerProcess) -> None:
    """Wait until clients call a server; stopping the other one before would leave them none."""
    until_s = time.monotonic() + _BACK_S
    while not server.metric("pinrank_requests_total"):
        if time.monotonic() > until_s:
            raise BenchmarkError(f"no client called the server within {_BACK_S:g} s after its new start")
        time.sleep(_LOOK_S)


def conclude(raw: Raw) -> Conclusion:
    statuses: dict[str, Counter[str]] = {}
    for name, chunks in raw["chunks"].items():
        statuses[name] = Counter()
        for chunk in chunks:
            statuses[name].update(chunk)
    failed = {name: found.total() - found[OK] for name, found in statuses.items()}
    cancelled = sum(found["CANCELLED"] for found in statuses.values())
    claims = (
        Claim("servers stopped", len(raw["stops"]), 200, "stops", "at_least"),
        Claim("calls that ended with CANCELLED", cancelled, 0, "calls", "at_most"),
        Claim("calls that failed with the documented retries", failed["with"], 0, "calls", "at_most"),
    )
    summary: dict[str, float | None] = {
        "calls with retries": statuses["with"].total(),
        "calls without retries": statuses["without"].total(),
        "failed without retries": failed["without"],
        "a stop takes, worst, s": max(one["stop_s"] for one in raw["stops"]),
        "until called again, worst, s": max(one["back_s"] for one in raw["stops"]),
    }
    for name, found in statuses.items():
        summary |= {f"{name} retries, {status}": count for status, count in found.items() if status != OK}
    return Conclusion(summary, claims)
