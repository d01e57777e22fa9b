"""The shell around admission and the batch policy: asks them, runs what they say on engine streams, answers requests.

An engine stream is a thread. One that ends a run asks the policy for the next itself, under one lock with the event
loop, so that no stream waits for a busy loop; the loop only starts streams that stand idle. Whoever asks acts.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

import numpy as np

from kernels.engine import EngineError, FeatureBatch
from model_store.model.loaded import LoadedModel
from server.errors import DeadlineError, ScoringError
from server.runtime.supervisor import Supervisor
from server.scheduling.admission import Admission, Ask, Decision
from server.scheduling.contract import BatchPolicy, Expire, Idle, Piece, Run, Ticket, WaitUntil
from server.scheduling.cost import CostModel
from server.scheduling.pace import Pace
from server.telemetry.metrics import EngineMetrics


@dataclass(frozen=True, slots=True)
class RequestScores:
    """float32[N, H] logits of one request, and the seconds from the start of its first run to the end of its last."""

    logits: np.ndarray
    run_s: float


_NO_LOGITS = np.empty((0, 0), np.float32)


@dataclass(slots=True, eq=False)
class _QueuedRequest:
    """A ticket on its way through the engine; guarded by the runner's lock."""

    ticket: Ticket
    model: LoadedModel
    batch: FeatureBatch
    offered_s: float
    answer: asyncio.Future[RequestScores]
    rows_left: int
    logits: np.ndarray = field(default_factory=lambda: _NO_LOGITS)
    started_s: float = float("inf")
    #: When the caller hung up or its time ran out.
    gone_s: float = float("inf")

    def take(self, piece: Piece, logits: np.ndarray, started_s: float) -> None:
        """Put a piece's logits in their place."""
        if piece.rows == self.batch.rows:
            self.logits = logits
        else:
            if self.logits is _NO_LOGITS:
                self.logits = np.empty((self.batch.rows, logits.shape[1]), np.float32)
            self.logits[piece.start : piece.stop] = logits
        self.started_s = min(self.started_s, started_s)
        self.rows_left -= piece.rows


_Member = tuple[Piece, _QueuedRequest]
#: What became of a ticket, for the event loop to pass on.
_Outcome = tuple[_QueuedRequest, "RequestScores | Exception"]


class Runner:
    """Runs batches on `streams` threads. Public methods belong to one event loop."""

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
    ) -> None:
        self._policy = policy
        self._admission = admission
        self._costs = costs
        self._metrics = metrics
        self._pace = pace
        self._streams = streams
        self._clock = clock
        #: Guards the policies and everything waiting; held for microseconds, never while an engine runs.
        self._lock = threading.Lock()
        self._waiting: dict[int, _QueuedRequest] = {}
        #: Runs on streams: some may outlive the requests that they were for.
        self._runs: set[Run] = set()
        #: Streams that a bug ended, until their threads are started again.
        self._broken: list[SimpleQueue[Run | None]] = []
        self._wake: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: list[SimpleQueue[Run | None]] = [SimpleQueue() for _ in range(streams)]
        self._idle = list(self._inboxes)
        self._threads = [
            supervisor.thread(f"engine-{i}", partial(self._stream, inbox)) for i, inbox in enumerate(self._inboxes)
        ]

    @property
    def admission(self) -> Admission:
        """What is in flight: to read, not to call."""
        return self._admission

    @property
    def idle_streams(self) -> int:
        return len(self._idle)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Wait for runs in flight and end the threads."""
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def learn(self, model: LoadedModel) -> None:
        """Begin to know a model, before the first request asks for it."""
        with self._lock:
            self._costs[model.digest] = CostModel(model.engine.cost_s)

    def runs(self, model: LoadedModel) -> int:
        """Return how many runs of a model are on streams."""
        return sum(run.pieces[0].ticket.model == model.digest for run in tuple(self._runs))

    def forget(self, model: LoadedModel) -> None:
        """Stop knowing a model that no request and no run holds."""
        with self._lock:
            self._policy.forget(model.digest)
            del self._costs[model.digest]

    def admit(self, ask: Ask) -> Decision:
        """Decide on a request that just arrived; one that is admitted holds its place until `release`."""
        with self._lock:
            decision = self._admission.offer(ask, self._clock())
            self._tell_pace()
            return decision

    def release(self, ticket: Ticket, size: int) -> None:
        """Give back the place of an admitted request, whatever became of it."""
        with self._lock:
            self._policy.cancel(ticket)
            self._admission.release(ticket, size)
            self._tell_pace()

    def _tell_pace(self) -> None:
        """Tell whatever runs beside requests whether they take half of the streams or more; the lock is held.

        Half, as a core's two threads share what they compute with.
        """
        self._pace.busy = 2 * self._admission.requests >= self._streams

    async def score(self, ticket: Ticket, model: LoadedModel, batch: FeatureBatch, deadline_s: float) -> RequestScores:
        """Score an admitted request's rows by `deadline_s` (this runner's clock). Cancelling the caller withdraws it.

        Raises:
            DeadlineError: the scores were not there by the deadline, or predicted not to be.
            ScoringError: the engine failed a run that held some of its rows.
        """
        loop = self._loop = asyncio.get_running_loop()
        now_s = self._clock()
        waiting = _QueuedRequest(ticket, model, batch, now_s, loop.create_future(), batch.rows)
        with self._lock:
            self._waiting[ticket.number] = waiting
            self._policy.offer(ticket, now_s)
            outcomes = self._start_idle(now_s)
        self._pass_on(outcomes)
        timer = loop.call_later(max(0.0, deadline_s - now_s), self._time_out, waiting)
        try:
            return await waiting.answer
        finally:
            timer.cancel()
            if self._withdraw(waiting):  # the caller hung up
                self._metrics.cancelled_rows.inc(waiting.rows_left)

    def _time_out(self, waiting: _QueuedRequest) -> None:
        if self._withdraw(waiting):
            self._metrics.expired_rows.inc(waiting.rows_left)
        if not waiting.answer.done():
            waiting.answer.set_exception(self._too_late(waiting))

    def _withdraw(self, waiting: _QueuedRequest) -> bool:
        """Take back a ticket that is not fully scored; tell whether it was there to take back."""
        with self._lock:
            if self._waiting.pop(waiting.ticket.number, None) is None:
                return False
            waiting.gone_s = self._clock()
            self._policy.cancel(waiting.ticket)
            return True

    def _pass_on(self, outcomes: list[_Outcome]) -> None:
        """Answer, on the event loop."""
        for waiting, outcome in outcomes:
            if waiting.answer.done():  # the caller hung up meanwhile
                continue
            if isinstance(outcome, RequestScores):
                waiting.answer.set_result(outcome)
            else:
                waiting.answer.set_exception(outcome)

    def _start_idle(self, now_s: float) -> list[_Outcome]:
        """Start what can start on idle streams; the lock is held. Return what expired."""
        outcomes: list[_Outcome] = []
        while self._idle:
            run = self._next(now_s, outcomes)
            if run is None:
                break
            self._idle.pop().put(run)
        return outcomes

    def _next(self, now_s: float, outcomes: list[_Outcome]) -> Run | None:
        """Ask the policy until it names a run or has none; the lock is held."""
        while True:
            match self._policy.next(now_s):
                case Run() as run:
                    self._runs.add(run)
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
        self._pass_on(outcomes)

    def _stream(self, inbox: SimpleQueue[Run | None]) -> None:
        """One engine stream's thread: run, ask for the next, until there is none; then wait to be started again."""
        with self._lock:
            outcomes: list[_Outcome] = []
            if inbox in self._broken:  # others may have left it something to do
                self._broken.remove(inbox)
                self._idle.append(inbox)
                outcomes = self._start_idle(self._clock())
        self._tell(outcomes)
        while (first := inbox.get()) is not None:
            run: Run | None = first
            while run is not None:
                under_way = run
                try:
                    run = self._execute(under_way, inbox)
                except BaseException as error:
                    self._abandon(under_way, error, inbox)
                    raise

    def _abandon(self, run: Run, error: BaseException, inbox: SimpleQueue[Run | None]) -> None:
        """Clean up behind a bug that ends a stream: the run's requests hear of it, and its place is free again."""
        failure = ScoringError(f"an engine stream ended in the middle of a run: {type(error).__name__}")
        with self._lock:
            self._broken.append(inbox)
            waiting = [self._waiting.pop(piece.ticket.number, None) for piece in run.pieces]
            outcomes: list[_Outcome] = [(one, failure) for one in waiting if one is not None]
            self._tell(outcomes)
            if run in self._runs:
                self._runs.remove(run)
                for piece in run.pieces:
                    self._policy.cancel(piece.ticket)
                self._policy.finished(run, self._clock())

    def _execute(self, run: Run, inbox: SimpleQueue[Run | None]) -> Run | None:
        """Run, answer, and return this stream's next run."""
        started_s = self._clock()
        with self._lock:
            # Between the decision and now a caller may have hung up, or the time run out.
            members = [
                (piece, waiting)
                for piece in run.pieces
                if (waiting := self._waiting.get(piece.ticket.number)) and started_s < piece.ticket.deadline_s
            ]
        cpu_s = time.thread_time()
        result = _run(members)
        cpu_s = time.thread_time() - cpu_s
        ended_s = self._clock()
        if members:
            self._metrics.run_rows.observe(sum(piece.rows for piece, _ in members))
            self._metrics.run_requests.observe(len(members))
            self._metrics.run_seconds.observe(ended_s - started_s)
            self._metrics.run_cpu_seconds.inc(cpu_s)
        outcomes: list[_Outcome] = []
        try:
            with self._lock:
                self._policy.finished(run, ended_s)
                self._runs.remove(run)
                self._collect(members, result, started_s, ended_s, outcomes)
                following = self._next(ended_s, outcomes)
                if following is None:
                    self._idle.append(inbox)
                else:
                    outcomes += self._start_idle(ended_s)
        finally:  # what is decided stays so, whatever a bug does to this stream
            self._tell(outcomes)
        return following

    def _collect(
        self,
        members: list[_Member],
        result: np.ndarray | Exception,
        started_s: float,
        ended_s: float,
        outcomes: list[_Outcome],
    ) -> None:
        """Give each member its rows of a run, and learn what the run cost; the lock is held. Add who has all."""
        if members and not isinstance(result, Exception):
            self._costs[members[0][0].ticket.model].observe(len(members), len(result), ended_s - started_s)
        start = 0
        for piece, waiting in members:
            first, start = start, start + piece.rows
            if min(waiting.gone_s, piece.ticket.deadline_s) < started_s:
                self._metrics.late_run_rows.inc(piece.rows)
            if piece.ticket.number not in self._waiting:  # gone meanwhile
                continue
            if isinstance(result, Exception):
                self._policy.cancel(piece.ticket)
                waiting.rows_left = 0
                outcome: RequestScores | Exception = result
            else:
                waiting.take(piece, result[first:start], started_s)
                outcome = RequestScores(waiting.logits, ended_s - waiting.started_s)
            if waiting.rows_left == 0:
                del self._waiting[piece.ticket.number]
                outcomes.append((waiting, outcome))

    def _tell(self, outcomes: list[_Outcome]) -> None:
        """Let the event loop answer; from any thread."""
        if outcomes:
            self._on_loop(self._pass_on, outcomes)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _too_late(self, waiting: _QueuedRequest) -> DeadlineError:
        waited_s = self._clock() - waiting.offered_s
        return DeadlineError(f"no scores by the deadline: given up after {waited_s * 1e3:.1f} ms")


def _run(members: list[_Member]) -> np.ndarray | Exception:
    """Run what is left of a run on this thread; what fails comes back, for its requests to hear of."""
    if not members:
        return _NO_LOGITS
    try:
        batch = FeatureBatch.concat([waiting.batch.piece(piece.start, piece.stop) for piece, waiting in members])
        logits = members[0][1].model.engine.run(batch)
        if len(logits) != batch.rows:
            raise EngineError(f"{len(logits)} rows came back")
        return logits
    except EngineError as error:
        rows = sum(piece.rows for piece, _ in members)
        failed = ScoringError(f"the engine failed a run of {rows} rows; the server's log says where")
        failed.__cause__ = error  # its text may quote a row
        return failed
    except BaseException as error:  # noqa: BLE001 - a stream outlives whatever one run raises, SystemExit too
        return error if isinstance(error, Exception) else ScoringError(f"the engine raised {type(error).__name__}")
