"""Crowd both ports with connections that say nothing, and call a server that has 256 descriptors.

An attacker holds up to 2,000 connections to each port, and opens new ones for those that the server closes. Meanwhile
Rank is called over an old connection and over new ones, and /livez is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import selectors
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc.aio

from bench.attacks.clients import begin, own_channel, results_of
from bench.attacks.place import Place, place
from bench.harness import Claim, Conclusion, Raw
from bench.processes import ServerProcess, descriptors_and_threads
from bench.test_bed import CONFIG
from loadtest.open_loop import OK, sender

_DESCRIPTORS_MAX, _CONNECTIONS, _OPENED_PER_S = 256, 2_000, 200
_CALLS_PER_S, _TIMEOUT_S = 10.0, 1.0
_CANDIDATES = 64
_KINDS = ("old connection", "new connection", "/livez")


@dataclass(frozen=True, slots=True)
class IdlePlan:
    rounds: int = 3
    step_s: float = 20.0


QUICK = IdlePlan(rounds=1, step_s=1.5)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the server does not start."""
    plan = QUICK if quick else IdlePlan()
    with place(config) as ground, ground.server("server", descriptors_max=_DESCRIPTORS_MAX) as server:
        rounds: list[dict[str, Any]] = []
        for _ in range(plan.rounds):
            rounds.append({name: _step(plan, ground, server, name == "crowded") for name in ("alone", "crowded")})
            yield {"rounds": rounds}


def _step(plan: IdlePlan, ground: Place, server: ServerProcess, crowded: bool) -> dict[str, Any]:
    web = urlsplit(server.metrics_url).netloc
    jobs: list[Any] = [partial(call, server.address, web, ground.requests(_CANDIDATES), plan.step_s)]
    if crowded:
        jobs += [partial(crowd, address, plan.step_s) for address in (server.address, web)]
    called, *crowds = results_of(*jobs)
    return {**called, "crowds": crowds, "descriptors": descriptors_and_threads(server.pid)[0]}


def crowd(address: str, duration_s: float) -> dict[str, int]:
    """Hold connections open that say nothing, in a job; return how many were opened, closed by the server and held."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    host, _, port = address.rpartition(":")
    held = selectors.DefaultSelector()
    begin()
    start_s = time.monotonic()
    opened = closed = 0
    while (passed_s := time.monotonic() - start_s) < duration_s:
        while opened < passed_s * _OPENED_PER_S and len(held.get_map()) < _CONNECTIONS:
            own = socket.socket()
            own.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                own.connect((host, int(port)))
            held.register(own, selectors.EVENT_READ)
            opened += 1
        for key, _ in held.select(0.01):
            try:
                ended = not key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            except OSError:
                ended = True
            if ended:
                held.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
                closed += 1
    found = {"opened": opened, "closed_by_server": closed, "held": len(held.get_map())}
    for key in list(held.get_map().values()):
        key.fileobj.close()  # type: ignore[union-attr]
    return found


def call(address: str, web: str, requests: tuple[bytes, ...], duration_s: float) -> dict[str, dict[str, int]]:
    """Call at a steady rate in every way, in a job; return the outcomes by kind."""

    async def ranked(channel: grpc.aio.Channel) -> str:
        return (await sender(channel, _TIMEOUT_S)(requests[0]))[0]

    async def ranked_anew() -> str:
        async with own_channel(address) as channel:
            return await ranked(channel)

    async def main() -> dict[str, dict[str, int]]:
        async with own_channel(address) as old:
            await old.channel_ready()
            begin()
            ways: tuple[Callable[[], Awaitable[str]], ...] = (partial(ranked, old), ranked_anew, partial(_lives, web))
            found = await asyncio.gather(*(_regularly(way, duration_s) for way in ways))
        return {kind: dict(counts) for kind, counts in zip(_KINDS, found, strict=True)}

    return asyncio.run(main())


async def _regularly(way: Callable[[], Awaitable[str]], duration_s: float) -> Counter[str]:
    tasks = []
    for _ in range(int(duration_s * _CALLS_PER_S)):
        tasks.append(asyncio.ensure_future(way()))
        await asyncio.sleep(1 / _CALLS_PER_S)
    return Counter(await asyncio.gather(*tasks))


async def _lives(web: str) -> str:
    """Return OK, or why the server does not say that it lives."""
    host, _, port = web.rpartition(":")
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /livez HTTP/1.1\r\nHost: {web}\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
    except (OSError, TimeoutError) as error:
        return type(error).__name__
    return OK if b" 200 " in answer.partition(b"\r\n")[0] else answer[:30].decode("latin-1") or "closed"


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]

    def counted(step: str, kind: str) -> tuple[int, int]:
        every = [r[step][kind] for r in rounds]
        calls = sum(sum(one.values()) for one in every)
        return calls, calls - sum(one.get(OK, 0) for one in every)

    claims = []
    summary: dict[str, float | None] = {}
    for kind in _KINDS:
        calls, failed = counted("crowded", kind)
        claims.append(Claim(f"failed among idle connections: {kind}", failed if calls else None, 0, "calls", "at_most"))
        summary |= {f"{kind}, calls": calls, f"{kind}, failed": failed}
        summary[f"{kind}, failed without a crowd"] = counted("alone", kind)[1]
    for i, port in enumerate(("gRPC", "HTTP")):
        for what in ("opened", "closed_by_server", "held"):
            summary[f"{port} port, {what.replace('_', ' ')}"] = max(r["crowded"]["crowds"][i][what] for r in rounds)
    return Conclusion(summary, tuple(claims))
