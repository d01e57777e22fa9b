"""The load generators of the serving benchmarks, which run in a separate process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.processes import cpu_seconds
from loadtest import open_loop
from loadtest.arrivals import poisson
from loadtest.report import Summary, summarise
from loadtest.search import HighestRate, RateSearch
from loadtest.steps import GOOD_SHARE
from pinrank.channels import open_aio_channel
from pinrank.tls import ClientTls

#: Long enough for every request: an expired one would be missing from the latency percentiles.
LONG_S = 2.0
_TARGET_MS = 10.0
_SETTLE_S = 0.5


@dataclass(frozen=True, slots=True)
class SaturationWindow:
    """The measurement window of a closed loop, and the server's CPU time in it."""

    summary: Summary
    server_cpu_s: float


@dataclass(frozen=True, slots=True)
class Offered:
    """Requests, when each is due (float64[K], seconds from the start), and the deadline of each in seconds."""

    address: str
    requests: tuple[bytes, ...]
    due_s: np.ndarray
    deadline_s: float


def saturate(
    address: str, server_pid: int, requests: tuple[bytes, ...], callers: int, warmup_s: float, duration_s: float
) -> SaturationWindow:
    used_s: list[float] = []

    async def main() -> SaturationWindow:
        async with open_aio_channel(address) as channel:
            samples = await open_loop.saturate(
                open_loop.sender(channel, LONG_S),
                requests,
                callers,
                warmup_s,
                duration_s,
                on_window=lambda: used_s.append(cpu_seconds(server_pid)),
            )
            used_s.append(cpu_seconds(server_pid))
        return SaturationWindow(summarise(samples, duration_s, _TARGET_MS), used_s[-1] - used_s[0])

    return open_loop.run(main())


def offer(
    address: str,
    requests: tuple[bytes, ...],
    rate_per_s: float,
    warmup_s: float,
    duration_s: float,
    seed: int,
    deadline_s: float = LONG_S,
    target_ms: float = _TARGET_MS,
    tls: ClientTls | None = None,
) -> Summary:
    """Offer requests with Poisson arrivals in an open loop."""
    samples = offer_at(address, requests, poisson(rate_per_s, warmup_s + duration_s, seed), deadline_s, tls)
    return summarise(samples.since(warmup_s), duration_s, target_ms)


def offer_at(
    address: str, requests: tuple[bytes, ...], due_s: np.ndarray, deadline_s: float, tls: ClientTls | None = None
) -> open_loop.Samples:
    """Offer requests in an open loop, at the times `due_s` (seconds from the start)."""

    async def main() -> Any:
        async with open_aio_channel(address, tls=tls) as channel:
            await channel.channel_ready()
            return await open_loop.open_loop(open_loop.sender(channel, deadline_s), requests, due_s)

    samples: open_loop.Samples = open_loop.run(main())
    return samples


def offer_two(first: Offered, second: Offered) -> tuple[open_loop.Samples, open_loop.Samples]:
    """Offer two kinds of requests concurrently."""
    import asyncio  # noqa: PLC0415

    async def offered(one: Offered) -> open_loop.Samples:
        async with open_aio_channel(one.address) as channel:
            await channel.channel_ready()
            return await open_loop.open_loop(open_loop.sender(channel, one.deadline_s), one.requests, one.due_s)

    async def main() -> Any:
        return await asyncio.gather(offered(first), offered(second))

    one, other = open_loop.run(main())
    return one, other


def highest_rate(
    address: str,
    requests: tuple[bytes, ...],
    first_per_s: float,
    target_ms: float,
    warmup_s: float,
    duration_s: float,
    seed: int,
    tries_max: int = 7,
) -> tuple[float, list[Summary]]:
    """Search the highest rate with 99% goodput within `target_ms`, which is also the deadline of every call.

    Returns:
        The rate in requests per second, and the summary of every attempt.
    """
    import asyncio  # noqa: PLC0415

    async def main() -> tuple[float, list[Summary]]:
        search = RateSearch(first_per_s, tolerance=0.06, tries_max=tries_max)
        tried: list[Summary] = []
        async with open_aio_channel(address) as channel:
            await channel.channel_ready()
            send = open_loop.sender(channel, target_ms / 1e3)
            while not isinstance(decision := search.next(), HighestRate):
                due_s = poisson(decision.rate_per_s, warmup_s + duration_s, seed + len(tried))
                samples = await open_loop.open_loop(send, requests, due_s)
                tried.append(summarise(samples.since(warmup_s), duration_s, target_ms))
                search.tell(decision.rate_per_s, held=tried[-1].good_share >= GOOD_SHARE)
                await asyncio.sleep(_SETTLE_S)
        return decision.rate_per_s, tried

    return open_loop.run(main())
