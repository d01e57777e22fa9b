"""The shell around the batch policy: asks it what to run, runs it on an engine stream, answers the requests."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from kernels.engine import Engine, EngineError, FeatureBatch
from model_store.live import LiveModel
from server.batching import BatchPolicy, Expire, Idle, Run, Ticket, WaitUntil
from server.errors import DeadlineError, ScoringError
from server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Scored:
    """float32[N, H] logits of one request, and how long the engine worked on its run."""

    logits: np.ndarray
    run_s: float


@dataclass(slots=True, eq=False)
class _Waiting:
    ticket: Ticket
    model: LiveModel
    batch: FeatureBatch
    offered_s: float
    answer: asyncio.Future[Scored]


class Slowdown:
    """How much longer runs take here than the engine measured alone: other streams, the event loop, the way there.

    A running estimate that rises five times as fast as it falls, so that it settles above most runs; within [1, 4],
    so that no outlier can make a server refuse everything.
    """

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, predicted_s: float, actual_s: float) -> None:
        if predicted_s <= 0:
            return
        error = min(4.0, max(1.0, actual_s / predicted_s)) - self.factor
        self.factor += error * (0.1 if error > 0 else 0.02)


class Runner:
    """Runs batches on `streams` threads. Its methods belong to one event loop; only `engine.run` leaves it."""

    def __init__(
        self, policy: BatchPolicy, streams: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._policy = policy
        self._free = streams
        self._metrics = metrics
        self._clock = clock
        self._threads = ThreadPoolExecutor(streams, thread_name_prefix="engine")
        self._numbers = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        self._wake: asyncio.TimerHandle | None = None
        self._slowdown = Slowdown()

    async def score(self, model: LiveModel, batch: FeatureBatch, deadline_s: float) -> Scored:
        """Score one request's rows by `deadline_s` (this runner's clock). Cancelling the caller withdraws the ticket.

        Raises:
            DeadlineError: the scores were not there by the deadline, or predicted not to be.
            ScoringError: the engine failed the run.
        """
        loop = asyncio.get_running_loop()
        cost_s = model.engine.cost_s(1, batch.rows) * self._slowdown.factor
        ticket = Ticket(next(self._numbers), batch.rows, deadline_s, model.digest, cost_s)
        waiting = _Waiting(ticket, model, batch, self._clock(), loop.create_future())
        self._waiting[ticket.number] = waiting
        self._policy.offer(ticket)
        self._pump()
        try:
            async with asyncio.timeout(deadline_s - self._clock()):
                return await waiting.answer
        except TimeoutError as error:
            if self._withdraw(waiting):
                self._metrics.expired_rows.inc(ticket.rows)
            raise DeadlineError(_too_late(self._clock() - waiting.offered_s)) from error
        finally:
            if self._withdraw(waiting):  # still queued: the caller hung up
                self._metrics.cancelled_rows.inc(ticket.rows)

    def close(self) -> None:
        """Wait for runs in flight and end the threads."""
        self._threads.shutdown(wait=True)

    def _withdraw(self, waiting: _Waiting) -> bool:
        """Take back a ticket that still waits; tell whether it did."""
        if self._waiting.pop(waiting.ticket.number, None) is None:
            return False
        self._policy.cancel(waiting.ticket)
        return True

    def _pump(self) -> None:
        while self._free:
            match self._policy.next(self._clock()):
                case Run(tickets):
                    self._start([self._waiting.pop(ticket.number) for ticket in tickets])
                case Expire(tickets):
                    for ticket in tickets:
                        self._expire(self._waiting.pop(ticket.number))
                case WaitUntil(time_s):
                    self._wake_at(time_s)
                    return
                case Idle():
                    return

    def _start(self, members: list[_Waiting]) -> None:
        self._free -= 1
        rows = sum(member.batch.rows for member in members)
        self._metrics.run_rows.observe(rows)
        self._metrics.run_requests.observe(len(members))
        started_s = self._clock()
        loop = asyncio.get_running_loop()
        batches = [member.batch for member in members]
        run = loop.run_in_executor(self._threads, _timed_run, members[0].model.engine, batches)
        run.add_done_callback(lambda done: self._finish(members, rows, started_s, done))

    def _finish(self, members: list[_Waiting], rows: int, started_s: float, run: asyncio.Future[Scored]) -> None:
        self._free += 1
        self._slowdown.observe(members[0].model.engine.cost_s(len(members), rows), self._clock() - started_s)
        failure = run.exception()
        starts = np.cumsum([0] + [member.batch.rows for member in members])
        for member, start, stop in zip(members, starts[:-1], starts[1:], strict=True):
            if member.answer.done():  # the caller hung up during the run
                continue
            if failure is None:
                scored = run.result()
                member.answer.set_result(Scored(scored.logits[start:stop], scored.run_s))
            elif isinstance(failure, EngineError):
                member.answer.set_exception(ScoringError(f"the engine failed a run of {rows} rows: {failure}"))
            else:
                member.answer.set_exception(failure)
        self._pump()

    def _expire(self, waiting: _Waiting) -> None:
        self._metrics.expired_rows.inc(waiting.ticket.rows)
        if not waiting.answer.done():
            waiting.answer.set_exception(DeadlineError(_too_late(self._clock() - waiting.offered_s)))

    def _wake_at(self, time_s: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        delay_s = max(0.0, time_s - self._clock())
        self._wake = asyncio.get_running_loop().call_later(delay_s, self._pump)


def _too_late(waited_s: float) -> str:
    return f"no scores by the deadline: given up after {waited_s * 1e3:.1f} ms"


def _timed_run(engine: Engine, batches: list[FeatureBatch]) -> Scored:
    """Run on the engine's thread; hand-overs between it and the event loop are not the engine's time."""
    start = time.perf_counter()
    logits = engine.run(FeatureBatch.concat(batches))
    return Scored(logits, time.perf_counter() - start)
