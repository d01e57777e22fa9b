"""The load generator's side of the serving benchmark; runs in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc.aio

from bench.processes import cpu_seconds
from loadtest import open_loop
from loadtest.arrivals import poisson
from loadtest.report import Summary, summarise

#: Long enough that nothing is cut off: an expired request would leave its latency out of the percentiles.
_DEADLINE_S = 2.0
_TARGET_MS = 10.0


@dataclass(frozen=True, slots=True)
class Saturated:
    """A closed loop's window, and the CPU time that the server used in it."""

    summary: Summary
    server_cpu_s: float


def saturate(
    address: str, server_pid: int, requests: tuple[bytes, ...], callers: int, warmup_s: float, duration_s: float
) -> Saturated:
    used_s: list[float] = []

    async def main() -> Saturated:
        async with grpc.aio.insecure_channel(address) as channel:
            samples = await open_loop.saturate(
                open_loop.sender(channel, _DEADLINE_S),
                requests,
                callers,
                warmup_s,
                duration_s,
                on_window=lambda: used_s.append(cpu_seconds(server_pid)),
            )
            used_s.append(cpu_seconds(server_pid))
        return Saturated(summarise(samples, duration_s, _TARGET_MS), used_s[-1] - used_s[0])

    return open_loop.run(main())


def offer(
    address: str, requests: tuple[bytes, ...], rate_per_s: float, warmup_s: float, duration_s: float, seed: int
) -> Summary:
    """Offer Poisson arrivals in an open loop."""
    due_s = poisson(rate_per_s, warmup_s + duration_s, seed)

    async def main() -> Any:
        async with grpc.aio.insecure_channel(address) as channel:
            await channel.channel_ready()
            return await open_loop.open_loop(open_loop.sender(channel, _DEADLINE_S), requests, due_s)

    return summarise(open_loop.run(main()).since(warmup_s), duration_s, _TARGET_MS)
