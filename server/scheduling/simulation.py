"""Simulates the runner with the real policies under a virtual clock, without threads.

Tests use it to try the policies on thousands of random workloads. Benchmarks use it to compute what an ideal queue
would have done with the measured arrivals and run times.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from server.scheduling.admission import Admission, Ask, Refuse
from server.scheduling.contract import BatchPolicy, Expire, Idle, Run, Ticket, WaitUntil


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to simulate.

    Attributes:
        at_s: time of its arrival.
        rows: number of candidates.
        deadline_s: latest useful time of its scores, on the same clock.
        lane: its surface.
        model: the model version that it asks for.
        cancel_at_s: when its caller cancels; None for never.
        ready_after_s: seconds from its arrival until its features are read.
    """

    at_s: float
    rows: int
    deadline_s: float
    lane: str = "home"
    model: Hashable = "m"
    cancel_at_s: float | None = None
    ready_after_s: float = 0.0


@dataclass(slots=True)
class SimulationOutcome:
    """The result of one arrival.

    Attributes:
        end: how it ended; `unanswered` means that the policy has a bug.
        at_s: when it ended.
        admitted_rows: 0 if it was refused, fewer than asked if it was trimmed.
        ran: (first row, last row + 1, start time, end time) of each run of its rows.
    """

    end: Literal["unanswered", "scored", "expired", "refused", "cancelled", "timed_out"] = "unanswered"
    at_s: float = 0.0
    admitted_rows: int = 0
    ran: list[tuple[int, int, float, float]] = field(default_factory=list)


def simulate(
    arrivals: Sequence[Arrival],
    policy: BatchPolicy,
    streams: int,
    run_s: Callable[[Run, float], float],
    observe: Callable[[Run, float], None] = lambda _run, _seconds: None,
    admission: Admission | None = None,
) -> list[SimulationOutcome]:
    """Simulate how the policies treat a sequence of arrivals.

    Args:
        arrivals: the requests, in any order.
        policy: a new batch policy.
        streams: number of engine streams.
        run_s: returns the true seconds of a run that starts at a given time.
        observe: called with each ended run and its seconds, as the runner calls the cost model.
        admission: decides on each arrival; None admits all of them.

    Returns:
        One outcome per arrival, in the same order.
    """
    return _Simulation(arrivals, policy, streams, run_s, observe, admission).run()


class _Simulation:
    def __init__(
        self,
        arrivals: Sequence[Arrival],
        policy: BatchPolicy,
        streams: int,
        run_s: Callable[[Run, float], float],
        observe: Callable[[Run, float], None],
        admission: Admission | None,
    ) -> None:
        self._arrivals = arrivals
        self._policy = policy
        self._free = streams
        self._run_s = run_s
        self._observe = observe
        self._admission = admission
        self._outcomes = [SimulationOutcome() for _ in arrivals]
        self._tickets: dict[int, tuple[int, Ticket, int]] = {}
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []

    def run(self) -> list[SimulationOutcome]:
        for number, arrival in enumerate(self._arrivals):
            self._at(arrival.at_s, lambda now_s, number=number: self._arrive(number, now_s))  # type: ignore[misc]
        while self._events:
            now_s, _, happens = heapq.heappop(self._events)
            happens(now_s)
        return self._outcomes

    def _at(self, time_s: float, happens: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), happens))

    def _arrive(self, number: int, now_s: float) -> None:
        arrival, outcome = self._arrivals[number], self._outcomes[number]
        if self._admission is None:
            ticket = Ticket(number, arrival.rows, arrival.deadline_s, arrival.model, arrival.lane)
            self._policy.reserve(ticket, now_s)
        else:
            ask = Ask(arrival.lane, arrival.rows, arrival.rows, arrival.deadline_s, arrival.model, None)
            decision = self._admission.offer(ask, now_s)
            if isinstance(decision, Refuse):
                outcome.end, outcome.at_s = "refused", now_s
                return
            ticket = decision.ticket
        outcome.admitted_rows = ticket.rows
        self._tickets[ticket.number] = (number, ticket, ticket.rows)
        self._at(now_s + arrival.ready_after_s, lambda then_s: self._ready(ticket, then_s))
        self._at(arrival.deadline_s, lambda then_s: self._end(ticket, "timed_out", then_s))
        if arrival.cancel_at_s is not None:
            self._at(max(now_s, arrival.cancel_at_s), lambda then_s: self._end(ticket, "cancelled", then_s))

    def _ready(self, ticket: Ticket, now_s: float) -> None:
        if ticket.number in self._tickets:
            self._policy.offer(ticket, now_s)
            self._pump(now_s)

    def _end(self, ticket: Ticket, end: Literal["scored", "expired", "cancelled", "timed_out"], now_s: float) -> None:
        """Answer a ticket, unless it was answered before."""
        if (known := self._tickets.pop(ticket.number, None)) is None:
            return
        outcome = self._outcomes[known[0]]
        assert outcome.end == "unanswered", "a request was answered twice"  # noqa: S101 - an invariant of the simulation
        outcome.end, outcome.at_s = end, now_s
        self._policy.cancel(ticket)
        if self._admission is not None:
            self._admission.release(ticket, self._arrivals[known[0]].rows)

    def _pump(self, now_s: float) -> None:
        while True:
            match self._policy.next(now_s):
                case Run() as run:
                    self._start(run, now_s)
                case Expire(tickets):
                    for ticket in tickets:
                        self._end(ticket, "expired", now_s)
                case WaitUntil(time_s):
                    assert time_s > now_s, "a wait until now would never end"  # noqa: S101
                    self._at(time_s, self._pump)
                    return
                case Idle():
                    return

    def _start(self, run: Run, now_s: float) -> None:
        assert self._free > 0, "more runs than streams"  # noqa: S101
        self._free -= 1
        seconds = self._run_s(run, now_s)
        for piece in run.pieces:
            number, _, _ = self._tickets[piece.ticket.number]  # a KeyError means that it ran after its answer
            self._outcomes[number].ran.append((piece.start, piece.stop, now_s, now_s + seconds))
        self._at(now_s + seconds, lambda then_s: self._finish(run, seconds, then_s))

    def _finish(self, run: Run, seconds: float, now_s: float) -> None:
        self._free += 1
        self._observe(run, seconds)
        self._policy.finished(run, now_s)
        for piece in run.pieces:
            if (known := self._tickets.get(piece.ticket.number)) is None:
                continue
            left = known[2] - piece.rows
            self._tickets[piece.ticket.number] = (known[0], known[1], left)
            if left == 0:
                self._end(piece.ticket, "scored", now_s)
        self._pump(now_s)
