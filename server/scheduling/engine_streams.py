"""Runs batches on engine streams, as admission and the batch policy decide, and delivers the scores to requests.

An engine stream is a thread. After a run it asks the policy for the next one itself, under a lock that it shares with
the event loop, so that no stream waits for a busy loop. The loop only starts idle streams.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, MutableMapping
from functools import partial
from queue import SimpleQueue

import numpy as np

from kernels.engine import FeatureBatch
from model_store.model.loaded import LoadedModel
from server.errors import DeadlineError, ScoringError
from server.runtime.resting import Rest
from server.runtime.supervisor import Supervisor
from server.scheduling.admission import Admission, Ask, Decision, Refuse
from server.scheduling.contract import BatchPolicy, Expire, Idle, Run, Ticket, WaitUntil
from server.scheduling.cost import CostModel
from server.scheduling.overlap import Overlap, RunStart
from server.scheduling.pace import Pace
from server.scheduling.queued_request import Deadlines, Member, QueuedRequest, RequestScores, run_members
from server.telemetry.metrics import EngineMetrics

#: The event loop may rest for this part of the time that requests wait for a stream.
_REST_SHARE = 0.25
#: A request with its scores or error, for the event loop to deliver.
_Outcome = tuple[QueuedRequest, "RequestScores | Exception"]


class Runner:
    """Runs batches on `streams` threads. Call its public methods on one event loop."""

    def __init__(
        self,
        policy: BatchPolicy,
        admission: Admission,
        streams: int,
        costs: MutableMapping[Hashable, CostModel],
        metrics: EngineMetrics,
        pace: Pace,
        supervisor: Supervisor,
        clock: Callable[[], float] = time.monotonic,
        settle: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Create the streams without starting them.

        Args:
            policy: decides what runs when.
            admission: decides on requests on arrival.
            streams: number of streams.
            costs: the cost model of each model, by digest; `learn` adds them.
            metrics: counts and times the runs.
            pace: tells background work how busy the streams are.
            supervisor: restarts the threads.
            clock: seconds, monotonic.
            settle: called first by each stream's thread, with the stream's number: chooses its cores and priority.
        """
        self._policy = policy
        self._admission = admission
        self._costs = costs
        self._metrics = metrics
        self._pace = pace
        self._rest = Rest(metrics.loop_rest_seconds.inc)
        self._streams = streams
        self._clock = clock
        #: Guards the policies and all waiting requests. It is held for microseconds, never while an engine runs.
        self._lock = threading.Lock()
        self._waiting: dict[int, QueuedRequest] = {}
        #: Unfinished runs, which may outlive their requests, and their starts.
        self._runs: dict[Run, RunStart] = {}
        self._overlap = Overlap(streams)
        #: Inboxes of streams that a bug ended, until their threads restart.
        self._broken: list[SimpleQueue[Run | None]] = []
        #: Outcomes for the event loop to deliver, and whether a call to deliver them is on its way.
        self._outbox = deque[_Outcome]()
        self._is_delivery_due = False
        self._wake: asyncio.TimerHandle | None = None
        self._deadlines = Deadlines()
        self._alarm: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: list[SimpleQueue[Run | None]] = [SimpleQueue() for _ in range(streams)]
        self._idle = list(self._inboxes)
        self._threads = [
            supervisor.thread(f"engine-{i}", partial(self._stream, inbox, partial(settle, i)))
            for i, inbox in enumerate(self._inboxes)
        ]

    @property
    def admission(self) -> Admission:
        """What is in flight; read its counts, but do not call its methods."""
        return self._admission

    @property
    def idle_streams(self) -> int:
        return len(self._idle)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Wait for unfinished runs, and end the threads."""
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def learn(self, model: LoadedModel) -> None:
        """Add a model; call this before its first request."""
        with self._lock:
            self._costs[model.digest] = CostModel(model.engine.cost_s, model.engine.slowdown)

    def runs(self, model: LoadedModel) -> int:
        """Return the number of unfinished runs of a model."""
        return sum(run.pieces[0].ticket.model == model.digest for run in tuple(self._runs))

    def forget(self, model: LoadedModel) -> None:
        """Remove a model that no request and no run uses."""
        with self._lock:
            self._policy.forget(model.digest)
            del self._costs[model.digest]

    def admit(self, ask: Ask) -> Decision:
        """Decide on a request that has just arrived; if admitted, it holds its place until `release`."""
        with self._lock:
            decision = self._admission.offer(ask, self._clock())
            self._update_pace()
        if isinstance(decision, Refuse):
            self._rest.not_now()
        return decision

    def refusal_of_any(self, deadline_s: float) -> Refuse | None:
        """Return the refusal that every request with this deadline would get now; None if it depends on the request."""
        with self._lock:
            refusal = self._admission.refusal_of_any(self._clock(), deadline_s)
        if refusal is not None:
            self._rest.not_now()
        return refusal

    def release(self, ticket: Ticket, size: int) -> None:
        """Free the place of an admitted request, however it ended."""
        with self._lock:
            self._policy.cancel(ticket)
            self._admission.release(ticket, size)
            self._update_pace()

    def _update_pace(self) -> None:
        """Tell background work whether requests use at least half of the streams. Call it with the lock held.

        The limit is half, because the two hardware threads of a core share its execution units.
        """
        self._pace.busy = 2 * self._admission.requests >= self._streams

    async def score(self, ticket: Ticket, model: LoadedModel, batch: FeatureBatch, deadline_s: float) -> RequestScores:
        """Score an admitted request's rows by `deadline_s` (the runner's clock). Cancelling the caller withdraws it.

        Raises:
            DeadlineError: the scores missed the deadline, or were predicted to miss it.
            ScoringError: the engine failed in a run with some of its rows.
        """
        loop = self._loop = asyncio.get_running_loop()
        now_s, number = self._clock(), ticket.number
        waiting = QueuedRequest(ticket, model, batch, now_s, loop.create_future(), batch.rows)
        with self._lock:
            self._waiting[number] = waiting
            self._policy.offer(ticket, now_s)
            outcomes = self._start_idle(now_s)
            if self._deadlines.add(number, deadline_s, self._waiting):
                self._set_alarm(now_s)
            rest_s = self._rest_s(ticket, now_s)
        self._rest.after_this_turn(rest_s)
        if outcomes:
            self._deliver(outcomes)
        try:
            return await waiting.answer
        finally:
            if number in self._waiting and self._withdraw(waiting):  # the caller cancelled
                self._metrics.cancelled_rows.inc(waiting.rows_left)

    def _rest_s(self, ticket: Ticket, now_s: float) -> float:
        """Return how long the event loop may rest. Call it with the lock held, for a ticket that was just offered.

        No stream may run out of work meanwhile. The next request probably waits as long as this one: rest a part of it.
        """
        queued = len(self._waiting) - sum([len(run.pieces) for run in self._runs])
        if queued < 2 * self._streams:
            return 0.0
        cost = self._costs[ticket.model]
        wait_s = self._admission.finish_s - now_s - cost.finish_s(1, ticket.rows)
        return min(wait_s * _REST_SHARE, queued // self._streams * cost.predict_s(1, ticket.rows))

    def _set_alarm(self, now_s: float) -> None:
        """Set the timer to the earliest deadline. Call it on the event loop, with the lock held."""
        if self._alarm is not None:
            self._alarm.cancel()
        next_s = self._deadlines.next_s
        delay_s = None if next_s is None else max(0.0, next_s - now_s)
        loop = asyncio.get_running_loop()
        self._alarm = None if delay_s is None else loop.call_later(delay_s, self._deadlines_passed)

    def _deadlines_passed(self) -> None:
        now_s = self._clock()
        with self._lock:
            late = [self._waiting[number] for number in self._deadlines.passed(now_s, self._waiting)]
            self._set_alarm(now_s)
        for waiting in late:
            self._time_out(waiting)

    def _time_out(self, waiting: QueuedRequest) -> None:
        if self._withdraw(waiting):
            self._metrics.expired_rows.inc(waiting.rows_left)
        if not waiting.answer.done():
            waiting.answer.set_exception(self._too_late(waiting))

    def _withdraw(self, waiting: QueuedRequest) -> bool:
        """Withdraw a request that is not fully scored; return whether it was still waiting."""
        with self._lock:
            if self._waiting.pop(waiting.ticket.number, None) is None:
                return False
            waiting.gone_s = self._clock()
            self._policy.cancel(waiting.ticket)
            return True

    def _deliver_all(self) -> None:
        """Deliver what the streams have put into the outbox. Call it on the event loop."""
        self._is_delivery_due = False  # before the outbox is read: what comes later needs another call
        while self._outbox:
            self._deliver((self._outbox.popleft(),))

    def _deliver(self, outcomes: Iterable[_Outcome]) -> None:
        """Deliver outcomes to the waiting requests. Call it on the event loop."""
        for waiting, outcome in outcomes:
            if waiting.answer.done():  # the caller cancelled in the meantime
                continue
            if isinstance(outcome, RequestScores):
                waiting.answer.set_result(outcome)
            else:
                waiting.answer.set_exception(outcome)

    def _start_idle(self, now_s: float) -> list[_Outcome]:
        """Start runs on idle streams; return the requests that expired. Call it with the lock held."""
        outcomes: list[_Outcome] = []
        while self._idle:
            run = self._next(now_s, outcomes)
            if run is None:
                break
            self._idle.pop().put(run)
        return outcomes

    def _next(self, now_s: float, outcomes: list[_Outcome]) -> Run | None:
        """Ask the policy until it returns a run or has none. Call it with the lock held."""
        while True:
            match self._policy.next(now_s):
                case Run() as run:
                    self._runs[run] = self._overlap.begin(now_s)
                    return run
                case Expire(tickets):
                    for ticket in tickets:
                        waiting = self._waiting.pop(ticket.number)
                        waiting.gone_s = now_s
                        self._metrics.expired_rows.inc(waiting.rows_left)
                        outcomes.append((waiting, self._too_late(waiting)))
                case WaitUntil(time_s):
                    self._on_loop(self._wake_at, time_s)
                    return None
                case Idle():
                    return None

    def _wake_at(self, time_s: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        delay_s = max(0.0, time_s - self._clock())
        self._wake = asyncio.get_running_loop().call_later(delay_s, self._wake_up)

    def _wake_up(self) -> None:
        with self._lock:
            outcomes = self._start_idle(self._clock())
        self._deliver(outcomes)

    def _stream(self, inbox: SimpleQueue[Run | None], settle: Callable[[], None]) -> None:
        """The thread of one engine stream: run batches until there are none, then wait for the next one in `inbox`."""
        settle()
        with self._lock:
            outcomes: list[_Outcome] = []
            if inbox in self._broken:  # after a restart, work may be waiting
                self._broken.remove(inbox)
                self._idle.append(inbox)
                outcomes = self._start_idle(self._clock())
        self._deliver_soon(outcomes)
        while (first := inbox.get()) is not None:
            run: Run | None = first
            while run is not None:
                current = run
                try:
                    run = self._execute(current, inbox)
                except BaseException as error:
                    self._abandon(current, error, inbox)
                    raise

    def _abandon(self, run: Run, error: BaseException, inbox: SimpleQueue[Run | None]) -> None:
        """Clean up after a bug that ends a stream: fail the run's requests, and free the run's place."""
        failure = ScoringError(f"an engine stream failed during a run: {type(error).__name__}")
        with self._lock:
            self._broken.append(inbox)
            waiting = [self._waiting.pop(piece.ticket.number, None) for piece in run.pieces]
            outcomes: list[_Outcome] = [(one, failure) for one in waiting if one is not None]
            self._deliver_soon(outcomes)
            if run in self._runs:
                self._overlap.end(self._runs.pop(run), self._clock())
                for piece in run.pieces:
                    self._policy.cancel(piece.ticket)
                self._policy.finished(run, self._clock())

    def _execute(self, run: Run, inbox: SimpleQueue[Run | None]) -> Run | None:
        """Execute a run, deliver its scores, and return this stream's next run."""
        started_s = self._clock()
        with self._lock:
            # Since the decision, callers may have cancelled and deadlines may have passed.
            members = [
                (piece, waiting)
                for piece in run.pieces
                if (waiting := self._waiting.get(piece.ticket.number)) and started_s < piece.ticket.deadline_s
            ]
        cpu_s = time.thread_time()
        result = run_members(members)
        cpu_s = time.thread_time() - cpu_s
        ended_s = self._clock()
        if members:
            self._metrics.run_rows.observe(sum([piece.rows for piece, _ in members]))
            self._metrics.run_requests.observe(len(members))
            self._metrics.run_seconds.observe(ended_s - started_s)
            self._metrics.run_cpu_seconds.inc(cpu_s)
        outcomes: list[_Outcome] = []
        try:
            with self._lock:
                self._policy.finished(run, ended_s)
                beside = self._overlap.end(self._runs.pop(run), ended_s)
                self._collect(members, result, started_s, ended_s, beside, outcomes)
                following = self._next(ended_s, outcomes)
                if following is None:
                    self._idle.append(inbox)
                else:
                    outcomes += self._start_idle(ended_s)
        finally:  # deliver what was decided, even if a bug ends this stream
            self._deliver_soon(outcomes)
        return following

    def _collect(
        self,
        members: list[Member],
        result: np.ndarray | Exception,
        started_s: float,
        ended_s: float,
        beside: float,
        outcomes: list[_Outcome],
    ) -> None:
        """Store each member's scores and learn the run's cost; append finished requests. Call it with the lock held."""
        if members and not isinstance(result, Exception):
            self._costs[members[0][0].ticket.model].observe(len(members), len(result), ended_s - started_s, beside)
        start = 0
        for piece, waiting in members:
            first, start = start, start + piece.rows
            if min(waiting.gone_s, piece.ticket.deadline_s) < started_s:
                self._metrics.late_run_rows.inc(piece.rows)
            if piece.ticket.number not in self._waiting:  # cancelled or expired
                continue
            if isinstance(result, Exception):
                self._policy.cancel(piece.ticket)
                waiting.rows_left = 0
                outcome: RequestScores | Exception = result
            else:
                waiting.take(piece, result[first:start], started_s)
                outcome = RequestScores(waiting.logits, ended_s - waiting.started_s, ended_s)
            if waiting.rows_left == 0:
                del self._waiting[piece.ticket.number]
                outcomes.append((waiting, outcome))

    def _deliver_soon(self, outcomes: list[_Outcome]) -> None:
        """Deliver outcomes through the event loop, in one call for all that wait for it. Any thread may call it."""
        self._outbox += outcomes
        if outcomes and not self._is_delivery_due:
            self._is_delivery_due = True
            self._on_loop(self._deliver_all)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _too_late(self, waiting: QueuedRequest) -> DeadlineError:
        waited_s = self._clock() - waiting.offered_s
        return DeadlineError(f"no scores by the deadline; the request waited {waited_s * 1e3:.1f} ms")
