"""Sending requests and recording what came back.

The open loop sends each request when it is due, whatever the server does, and measures from that time: a stall shows in
every request that was due during it, also in those that a closed loop would not have sent (Tene, "How NOT to Measure
Latency": coordinated omission). The closed loop finds the highest throughput and says nothing about latency under load.
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
#: The status of a request that was due while `in_flight_max` others were out: it was never sent.
DROPPED = "DROPPED_BY_CLIENT"
STAGES = (*answers.STAGES, "total")

IN_FLIGHT_MAX = 1024

#: Sends one serialised request and gives the name of its gRPC status and the serialised answer, empty unless OK.
Send = Callable[[bytes], Awaitable[tuple[str, bytes]]]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Samples:
    """What came of each request, in the order they were due.

    Attributes:
        due_s: float64[K], since the start of the run; in a closed loop, when it was sent, which may be before.
        late_s: float64[K], how long after that the generator sent it; a large value means that the generator, not the
            server, could not keep up.
        latency_s: float64[K], from due to answered, with any status; NaN for those never sent.
        statuses: K names of gRPC statuses, or `DROPPED`.
        stage_us: uint32[K, S], the server's own timings in the order of `STAGES`; 0 unless OK.
        degradations: K tuples, the ways in which the answer says that it is less than the full ranking.
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
        """bool[K]: the answer is less than the full ranking."""
        return np.array([bool(kinds) for kinds in self.degradations], bool)

    def since(self, start_s: float) -> Samples:
        """Leave out what was due before `start_s`, and count time from there."""
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
    """Collects samples as they come; a parse takes 2 us, much less than keeping a million answers would cost."""

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
        """Forget what was recorded, and count time from now."""
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
        """Send one request that was due at `due_s` on this clock, and record what came of it."""
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
        order = np.lexsort((self.number, self.due_s))  # those due at once in the order they were sent
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


def sender(channel: grpc.aio.Channel, deadline_s: float) -> Send:
    """Send over a channel as raw bytes, each call with its own gRPC deadline."""
    rank: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(RANK)

    async def send(content: bytes) -> tuple[str, bytes]:
        try:
            return OK, await rank(content, timeout=deadline_s)
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
    """Send one request at each due time, whatever came back before, and wait for all answers.

    Args:
        send: how to send.
        requests: at least one; they are taken in turn, again from the first when they run out.
        due_s: float64[K], ascending seconds from the start.
        in_flight_max: a request that is due while so many are out is not sent, and recorded as `DROPPED`.
        clock: seconds.
    """
    recorder = _Recorder(clock)
    in_flight: set[asyncio.Task[None]] = set()
    recorder.restart()
    async with asyncio.TaskGroup() as calls:
        for due, content in zip((recorder.start_s + due_s).tolist(), itertools.cycle(requests), strict=False):
            # Also without a wait: a generator that is behind must still let the answers in.
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
    """Let `callers` send one request after the other, each as soon as its last was answered: the highest throughput.

    The samples are those answered in the `duration_s` after `warmup_s`; the first of them were sent before, so that as
    many in flight are counted at the start as are left out at the end. `on_window` is called when the warm-up is over.
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
    """Run in an event loop whose timers are exact to tens of microseconds.

    epoll and libuv round a wait up to whole milliseconds, which would send every request half a millisecond late on
    average; select(2) takes microseconds, and this process has few descriptors.
    """
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(main)
