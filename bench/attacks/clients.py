"""The clients of these benchmarks: each in a process of its own, and all of them begin at the same time."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier, Event
from threading import BrokenBarrierError
from typing import Any, TypeVar

import grpc.aio
import numpy as np

from bench.harness import BenchmarkError
from bench.processes import cpu_seconds
from loadtest import open_loop
from loadtest.open_loop import OK, Samples, Send
from loadtest.report import REFUSED, Percentiles
from pinrank.tls import ClientTls

#: Time for processes to start and to connect.
_START_S = 120.0
#: Pause of a caller after a refusal.
_PAUSE_S = 0.1

#: What a client's process shares with the benchmark.
_shared: list[tuple[Barrier, Event]] = []


@contextmanager
def clients(*jobs: Callable[[], Any]) -> Iterator[list[Future[Any]]]:
    """Run each job in a process of its own. Yields when all of them begin; at the end, tells them to end.

    Yields:
        What each job will return.

    Raises:
        BenchmarkError: a job failed before it began; its own error is the cause.
    """
    context = get_context("spawn")
    barrier, ended = context.Barrier(len(jobs) + 1), context.Event()
    with ProcessPoolExecutor(
        len(jobs), mp_context=context, initializer=_share, initargs=(barrier, ended), max_tasks_per_child=1
    ) as pool:
        running = [pool.submit(job) for job in jobs]
        for one in running:
            one.add_done_callback(lambda done: barrier.abort() if done.exception() else None)
        try:
            barrier.wait(_START_S)
        except BrokenBarrierError as error:
            cause = next((one.exception() for one in running if one.done() and one.exception()), error)
            raise BenchmarkError(f"a client did not begin: {cause}") from cause
        try:
            yield running
        finally:
            ended.set()


def results_of(*jobs: Callable[[], Any]) -> list[Any]:
    """Run each job in a process of its own until it ends, and return what they return."""
    with clients(*jobs) as running:
        return [one.result() for one in running]


def _share(barrier: Barrier, ended: Event) -> None:
    _shared.append((barrier, ended))


def begin() -> None:
    """Wait, in a job, until all jobs are ready."""
    _shared[0][0].wait(_START_S)


def is_over() -> bool:
    """Return, in a job, whether it was told to end."""
    return _shared[0][1].is_set()


@dataclass(frozen=True, slots=True)
class Load:
    """Requests to a server over a connection of their own.

    Attributes:
        target: the server's address, or several in gRPC's syntax.
        requests: serialised; sent in turn.
        deadline_s: of each call.
        token: of the caller; empty for none.
        service_config: gRPC's, with a policy of retries; None for no retries.
        tls: how to connect; None in plain text.
        due_s: float64[K], when they are due, in seconds.
    """

    target: str
    requests: tuple[bytes, ...]
    deadline_s: float
    due_s: np.ndarray
    token: str = ""
    service_config: Mapping[str, Any] | None = None
    tls: ClientTls | None = None

    def open(self) -> grpc.aio.Channel:
        return own_channel(self.target, self.service_config, self.tls)

    def sender(self, channel: grpc.aio.Channel) -> Send:
        return open_loop.sender(channel, self.deadline_s, bearer(self.token))


def own_channel(
    target: str, service_config: Mapping[str, Any] | None = None, tls: ClientTls | None = None
) -> grpc.aio.Channel:
    """Open a channel that shares its connection with no other one, and connects again soon after a failure."""
    options: list[tuple[str, Any]] = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2_000),  # which is also how long an attempt to connect may take
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.enable_retries", int(service_config is not None)),
    ]
    if service_config is not None:
        options.append(("grpc.service_config", json.dumps(service_config)))
    if tls is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, tls.credentials(), options + tls.options())


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a caller with a token."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def offer(loads: tuple[Load, ...]) -> list[Samples]:
    """Offer loads in an open loop, each over its own connection."""

    async def offered(load: Load, channel: grpc.aio.Channel) -> Samples:
        return await open_loop.open_loop(load.sender(channel), load.requests, load.due_s)

    return _beside(loads, offered)


def offer_until_over(loads: tuple[Load, ...]) -> list[list[dict[str, int]]]:
    """Offer loads over and over until the benchmark says that it is over; return the statuses of each time."""

    async def offered(load: Load, channel: grpc.aio.Channel) -> list[dict[str, int]]:
        found = []
        while not is_over():
            samples = await open_loop.open_loop(load.sender(channel), load.requests, load.due_s)
            found.append(dict(Counter(samples.statuses)))
        return found

    return _beside(loads, offered)


@dataclass(frozen=True, slots=True)
class Saturation:
    """A server that callers saturate: each sends its next call as soon as its last was answered.

    Attributes:
        load: without times at which calls are due.
        pid: of the server.
        callers: so many calls are in flight.
        tokens: of the calls, in turn; none for the load's own.
    """

    load: Load
    pid: int
    callers: int
    tokens: tuple[str, ...] = ()

    def open(self) -> grpc.aio.Channel:
        return self.load.open()

    def sender(self, channel: grpc.aio.Channel) -> Send:
        senders = itertools.cycle(
            [
                open_loop.sender(channel, self.load.deadline_s, bearer(token))
                for token in self.tokens or (self.load.token,)
            ]
        )

        async def send(content: bytes) -> tuple[str, bytes]:
            status, answer = await next(senders)(content)
            if status == REFUSED:  # without a pause, this would be a flood of refusals instead
                await asyncio.sleep(_PAUSE_S)
            return status, answer

        return send


_Caller = TypeVar("_Caller", Load, Saturation)


def saturate(some: tuple[Saturation, ...], warmup_s: float, duration_s: float) -> list[tuple[Samples, float]]:
    """Saturate servers, all at the same time.

    Returns:
        For each, the samples of the time after the warm-up, and the CPU seconds that it used in it.
    """

    async def saturated(one: Saturation, channel: grpc.aio.Channel) -> tuple[Samples, float]:
        used_s: list[float] = []
        samples = await open_loop.saturate(
            one.sender(channel), one.load.requests, one.callers, warmup_s, duration_s,
            on_window=lambda: used_s.append(cpu_seconds(one.pid)),
        )  # fmt: skip
        return samples, cpu_seconds(one.pid) - used_s[0]

    return _beside(some, saturated)


def _beside(loads: tuple[_Caller, ...], do: Callable[[_Caller, grpc.aio.Channel], Awaitable[Any]]) -> list[Any]:
    async def main() -> list[Any]:
        channels = [load.open() for load in loads]
        try:
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
            begin()
            return await asyncio.gather(*map(do, loads, channels))
        finally:
            for channel in channels:
                await channel.close()

    return open_loop.run(main())


def outcome(samples: Samples, deadline_s: float) -> dict[str, Any]:
    """Return what became of requests: how many were offered and good (complete and in time), statuses, latency."""
    ok = np.array([status == OK for status in samples.statuses], bool)
    in_time = samples.latency_s <= deadline_s
    percentiles = Percentiles.of(samples.latency_s[ok] * 1e3)
    return {
        "offered": len(ok),
        "good": int(np.count_nonzero(ok & in_time & ~samples.degraded)),
        "degraded": int(np.count_nonzero(samples.degraded)),
        "statuses": dict(Counter(samples.statuses)),
        "p50_ms": percentiles and percentiles.p50,
        "p99_ms": percentiles and percentiles.p99,
    }


def steady(per_s: float, duration_s: float, phase: float = 0.0) -> np.ndarray:
    """Return due times at a constant rate, float64[K]; `phase` shifts them by a part of the interval."""
    due_s: np.ndarray = (np.arange(max(1, int(per_s * duration_s))) + phase) / per_s
    return due_s
