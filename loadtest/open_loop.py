"""Sends requests in an open or closed loop, and records each one's status, latency and stage timings.

The open loop sends each request when it is due, whatever the server does, and measures latency from that time. So a
stall shows in every request that was due during it, even those that a closed loop would not have sent (coordinated
omission; Tene, "How NOT to Measure Latency"). The closed loop measures the highest throughput, not latency under load.
"""

from __future__ import annotations

import asyncio
import itertools
import selectors
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np

from pinrank import answers
from pinrank.v1 import ranking_pb2

RANK = "/pinrank.v1.RankingService/Rank"
OK = "OK"
#: Status of a request that was not sent, because `in_flight_max` others were in flight when it was due.
DROPPED = "DROPPED_BY_CLIENT"
STAGES = (*answers.STAGES, "total")

IN_FLIGHT_MAX = 1024

#: Sends one serialised request; returns its gRPC status name and the serialised answer (empty unless OK).
Send = Callable[[bytes], Awaitable[tuple[str, bytes]]]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Samples:
    """The results of all requests, in the order in which they were due.

    Attributes:
        due_s: float64[K], due time in seconds since the start of the run. In a closed loop it is the send time, and
            negative for requests sent before the start.
        late_s: float64[K], how long after the due time the generator sent the request; large values mean that the
            generator, not the server, could not keep up.
        latency_s: float64[K], from the due time to the answer, with any status; NaN for requests that were not sent.
        statuses: K names of gRPC statuses, or `DROPPED`.
        stage_us: uint32[K, S], the server's stage timings in the order of `STAGES`; 0 unless OK.
        degradations: K tuples of the degradations that the answer reports.
        models: the models that answered, "name@version".
        generator_cores: CPU seconds that this process used per second of the run.
    """

    due_s: np.ndarray
    late_s: np.ndarray
    latency_s: np.ndarray
    statuses: tuple[str, ...]
    stage_us: np.ndarray
    degradations: tuple[tuple[str, ...], ...]
    models: tuple[str, ...]
    generator_cores: float

    @property
    def degraded(self) -> np.ndarray:
        """bool[K], whether the answer reports any degradation."""
        return np.array([bool(kinds) for kinds in self.degradations], bool)

    def since(self, start_s: float) -> Samples:
        """Return the requests that were due from `start_s` on, with times relative to it."""
        first = int(np.searchsorted(self.due_s, start_s))
        return Samples(
            self.due_s[first:] - start_s,
            self.late_s[first:],
            self.latency_s[first:],
            self.statuses[first:],
            self.stage_us[first:],
            self.degradations[first:],
            self.models,
            self.generator_cores,
        )


@dataclass(slots=True)
class _Recorder:
    """Collects results. It parses each answer at once (2 us), which costs much less than keeping a million answers."""

    clock: Callable[[], float]
    start_s: float = 0.0
    cpu_start_s: float = 0.0
    due_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    sent: int = 0
    number: list[int] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    stage_us: list[tuple[int, ...]] = field(default_factory=list)
    degradations: list[tuple[str, ...]] = field(default_factory=list)
    models: set[str] = field(default_factory=set)

    def restart(self) -> None:
        """Discard all results, and measure time from now."""
        for column in (
            self.number,
            self.due_s,
            self.late_s,
            self.latency_s,
            self.statuses,
            self.stage_us,
            self.degradations,
        ):
            column.clear()
        self.start_s, self.cpu_start_s = self.clock(), time.process_time()

    def drop(self, due_s: float) -> None:
        self._append(self._take_number(), due_s, self.clock() - due_s, float("nan"), DROPPED, b"")

    async def call(self, send: Send, content: bytes, due_s: float) -> None:
        """Send one request that was due at `due_s` on `clock`, and record the result."""
        number, late_s = self._take_number(), self.clock() - due_s
        status, answer = await send(content)
        self._append(number, due_s, late_s, self.clock() - due_s, status, answer)

    def _take_number(self) -> int:
        self.sent += 1
        return self.sent

    def _append(self, number: int, due_s: float, late_s: float, latency_s: float, status: str, answer: bytes) -> None:
        parsed = ranking_pb2.RankResponse.FromString(answer)
        self.number.append(number)
        self.due_s.append(due_s)
        self.late_s.append(late_s)
        self.latency_s.append(latency_s)
        self.statuses.append(status)
        self.stage_us.append(tuple(getattr(parsed.timings, f"{stage}_us") for stage in STAGES))
        self.degradations.append(tuple(found.name for found, _ in parsed.degradation.ListFields()))
        if status == OK:
            self.models.add(f"{parsed.versions.model}@{parsed.versions.model_version}")

    def samples(self) -> Samples:
        wall_s, cpu_s = self.clock() - self.start_s, time.process_time() - self.cpu_start_s
        order = np.lexsort((self.number, self.due_s))  # requests due at the same time stay in the order they were sent
        return Samples(
            np.array(self.due_s, np.float64)[order] - self.start_s,
            np.array(self.late_s, np.float64)[order],
            np.array(self.latency_s, np.float64)[order],
            tuple(self.statuses[i] for i in order),
            np.array(self.stage_us, np.uint32).reshape(-1, len(STAGES))[order],
            tuple(self.degradations[i] for i in order),
            tuple(sorted(self.models)),
            cpu_s / wall_s if wall_s > 0 else 0.0,
        )


def sender(channel: grpc.aio.Channel, deadline_s: float, metadata: Sequence[tuple[str, str]] = ()) -> Send:
    """Return a function that sends raw bytes over a channel, with a gRPC deadline and metadata for each call."""
    rank: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(RANK)

    async def send(content: bytes) -> tuple[str, bytes]:
        try:
            return OK, await rank(content, timeout=deadline_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code().name, b""

    return send


async def open_loop(
    send: Send,
    requests: Sequence[bytes],
    due_s: np.ndarray,
    in_flight_max: int = IN_FLIGHT_MAX,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Send one request at each due time, whether or not earlier ones were answered, and wait for all answers.

    Args:
        send: sends one request.
        requests: at least one; they are sent in turn and repeated from the first.
        due_s: float64[K], due times in ascending order, in seconds from the start.
        in_flight_max: a request that is due while this many are in flight is not sent, but recorded as `DROPPED`.
        clock: seconds, monotonic.
    """
    recorder = _Recorder(clock)
    in_flight: set[asyncio.Task[None]] = set()
    recorder.restart()
    async with asyncio.TaskGroup() as calls:
        for due, content in zip((recorder.start_s + due_s).tolist(), itertools.cycle(requests), strict=False):
            # Sleep even when late, so that answers are received while the generator catches up.
            await asyncio.sleep(max(0.0, due - clock()))
            if len(in_flight) >= in_flight_max:
                recorder.drop(due)
                continue
            call = calls.create_task(recorder.call(send, content, due))
            in_flight.add(call)
            call.add_done_callback(in_flight.discard)
    return recorder.samples()


async def saturate(
    send: Send,
    requests: Sequence[bytes],
    callers: int,
    warmup_s: float,
    duration_s: float,
    clock: Callable[[], float] = time.perf_counter,
    on_window: Callable[[], object] = lambda: None,
) -> Samples:
    """Measure the highest throughput: each of `callers` sends its next request as soon as its last was answered.

    The samples are the requests answered in the `duration_s` seconds after a warm-up of `warmup_s`. Some of them were
    sent during the warm-up; about as many are in flight at the end and not counted. `on_window` is called after the
    warm-up.
    """
    recorder = _Recorder(clock)
    contents = itertools.cycle(requests)

    async def caller() -> None:
        while True:
            await recorder.call(send, next(contents), clock())

    try:
        async with asyncio.timeout(warmup_s + duration_s), asyncio.TaskGroup() as calls:
            recorder.restart()
            for _ in range(callers):
                calls.create_task(caller())
            await asyncio.sleep(warmup_s)
            on_window()
            recorder.restart()
    except TimeoutError:
        pass
    return recorder.samples()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in an event loop whose timers are exact to tens of microseconds.

    epoll and libuv round waits up to whole milliseconds, so requests would be half a millisecond late on average.
    select(2) waits for microseconds, and is fast enough for the few descriptors of this process.
    """
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(main)
