"""The batch policy: runs the ticket with the earliest deadline first, within the shares of lanes and callers. Pure.

Every decision compares predicted seconds (`server.scheduling.cost.CostModel`); there are no thresholds in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import takewhile

from server.scheduling.contract import Expire, Forecast, Idle, Piece, Run, Ticket, WaitUntil
from server.scheduling.cost import CostModel
from server.scheduling.joining import Arrivals, joiners, worth_waiting_until_s
from server.scheduling.lanes import Lane, Lanes, WaitingTicket
from server.scheduling.splitting import (
    is_large,
    large_piece_rows,
    part_rows,
    rows_a_stream,
    splitting_pays,
)


@dataclass(slots=True)
class _RunningRun:
    started_s: float
    #: Its predicted seconds, and when they end.
    cost_s: float
    ends_s: float


class EarliestDeadlineFirst:
    """Runs the earliest deadline first, within the shares that lanes have of the engine, and callers of their lane.

    - Lanes within their share go first, by priority, and in them callers within their share; then deadlines decide.
      Those beyond their share get the time that is left (`lanes`).
    - If no other ticket waits, a ticket is split over idle streams so that all pieces end together, provided that this
      gains more than the additional runs cost under the recent load (`splitting`). In a backlog, tickets run whole,
      because splitting would only cost time.
    - A ticket much larger than those of other callers or lanes runs in small pieces, and leaves one stream to them if
      they come often.
    - A ticket joins a run if this saves more seconds, for it and all tickets behind it, than it delays those in the run
      (`joining`).
    - A ticket waits for another only if that one is expected sooner than the time that joining saves.
    - A ticket that cannot end in time expires unscored. If no other ticket waits, it is tried until its deadline,
      because the prediction may be wrong.
    """

    def __init__(
        self,
        streams: int,
        cost: Callable[[Hashable], CostModel],
        lanes: Mapping[str, Lane] | None = None,
        callers: Callable[[str], Lane] | None = None,
    ) -> None:
        self._streams = streams
        self._cost = cost
        self._lanes = Lanes(lanes or {}, streams, callers)
        self._waiting: dict[int, WaitingTicket] = {}
        self._running: dict[Run, _RunningRun] = {}
        self._arrivals: dict[Hashable, Arrivals] = {}

    def __len__(self) -> int:
        """Number of tickets with rows that are in no run yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of unfinished runs."""
        return len(self._running)

    def forget(self, model: Hashable) -> None:
        self._arrivals.pop(model, None)

    def reserve(self, ticket: Ticket, now_s: float) -> None:
        if ticket.number in self._waiting:
            raise ValueError(f"ticket {ticket.number} was already reserved or offered")
        waiting = self._waiting[ticket.number] = WaitingTicket(ticket)
        self._lanes.add(waiting, now_s)

    def offer(self, ticket: Ticket, now_s: float) -> None:
        if ticket.number not in self._waiting:
            self.reserve(ticket, now_s)
        waiting = self._waiting[ticket.number]
        if waiting.ready:
            raise ValueError(f"ticket {ticket.number} was already offered")
        waiting.ready = True
        arrivals = self._arrivals.get(ticket.model)
        if arrivals is None:
            arrivals = self._arrivals[ticket.model] = Arrivals()
        arrivals.observe(ticket, now_s)

    def cancel(self, ticket: Ticket) -> None:
        waiting = self._waiting.pop(ticket.number, None)
        if waiting is not None:
            self._lanes.remove(waiting)

    def finished(self, run: Run, now_s: float) -> None:
        out = self._running.pop(run)
        # The predicted time was charged at the start; correct it.
        took_s = now_s - out.started_s if now_s > out.started_s else 0.0
        self._charge(run, took_s - out.cost_s, now_s)

    def next(self, now_s: float) -> Run | Expire | WaitUntil | Idle:
        free = self._streams - len(self._running)
        if free <= 0 or not self._waiting:
            return Idle()
        expired, order = list[Ticket](), list[WaitingTicket]()
        for waiting in self._lanes.ordered(now_s):
            if waiting.ready and waiting.ticket.deadline_s <= now_s:
                expired.append(waiting.ticket)
            elif waiting.ready:
                order.append(waiting)
        while len(order) > 1 and self._hopeless(order[0], free - len(order) + 1, now_s):
            expired.append(order.pop(0).ticket)
        if expired:
            for ticket in expired:
                self.cancel(ticket)
            return Expire(tuple(expired))
        head = self._next_head(order, free, now_s)
        if head is None:
            return Idle()
        order.remove(head)
        return self._run_or_wait(head, order, free, self._lanes.typical_rows_of_others(head.ticket, now_s), now_s)

    def _next_head(self, order: list[WaitingTicket], free: int, now_s: float) -> WaitingTicket | None:
        """Return the ticket to run: the first one, but a large one leaves the last stream to those that are not.

        They wait behind it, or are expected: then no ticket runs.
        """
        if free > 1 or self._streams == 1:
            return order[0] if order else None
        smaller = next((waiting for waiting in order if not self._is_large(waiting.ticket, now_s)), None)
        if smaller is not None or not order:
            return smaller
        return None if self._worth_leaving(order, now_s) else order[0]

    def _worth_leaving(self, large: list[WaitingTicket], now_s: float) -> bool:
        """Return whether the last stream is better left to smaller tickets that are expected.

        A piece of a large ticket would make those late that come while it runs, by half of it on average; without it,
        all large ones are late by a whole one. What counts is by how much each is late, relative to its own time.
        """
        head = large[0]
        typical, cost = self._lanes.typical_rows_of_others(head.ticket, now_s), self._cost(head.ticket.model)
        piece_s = cost.predict_s(1, large_piece_rows(head.rows, typical, cost))
        per_s = self._lanes.smaller_per_s(head.ticket, now_s)
        theirs = per_s * piece_s / 2 / cost.predict_s(1, math.ceil(typical))
        own = sum([1 / self._cost(one.ticket.model).predict_s(1, one.ticket.rows) for one in large])
        return theirs > own

    def _run_or_wait(
        self, head: WaitingTicket, behind: list[WaitingTicket], free: int, typical: float, now_s: float
    ) -> Run | WaitUntil:
        rows = self._rows_of_next_piece(head, len(behind), free, typical, now_s)
        pieces = [Piece(head.ticket, head.start, head.start + rows)]
        if rows == head.ticket.rows:
            if not behind and (time_s := self._wait_until_s(head, now_s)) > now_s:
                return WaitUntil(time_s)
            if behind and free == 1:
                pieces += [Piece(other.ticket, 0, other.rows) for other in self._joiners(head, behind, now_s)]
        return self._start(tuple(pieces), now_s)

    def forecast(self, ticket: Ticket, now_s: float) -> Forecast:
        cost = self._cost(ticket.model)
        before, behind = self._lanes.around(ticket, now_s) if self._waiting else ([], [])
        #: Predicted seconds until each stream has run what was put on it, as a heap.
        streams = [0.0] * (self._streams - len(self._running))
        streams += [run.ends_s - now_s if run.ends_s > now_s else 0.0 for run in self._running.values()]
        heapify(streams)
        for waiting in before:
            heapreplace(streams, streams[0] + self._cost(waiting.ticket.model).predict_s(1, waiting.rows))
        own_s = cost.predict_s(1, ticket.rows)
        finish_s = now_s + self._own_finish_s(ticket, own_s, cost, streams, alone=not before, now_s=now_s)
        harms = 0
        if behind:
            delayed = streams.copy()
            heapreplace(delayed, delayed[0] + own_s)
            for waiting in behind:
                model = self._cost(waiting.ticket.model)
                run_s = model.predict_s(1, waiting.rows)
                left_s = waiting.ticket.deadline_s - now_s - run_s * model.careful
                harms += streams[0] <= left_s < delayed[0]
                heapreplace(streams, streams[0] + run_s)
                heapreplace(delayed, delayed[0] + run_s)
        return Forecast(finish_s, harms)

    def free_in_s(self, now_s: float) -> float:
        return 0.0 if len(self._running) < self._streams else self._next_free_s(now_s)

    def _next_free_s(self, now_s: float) -> float:
        """Predict the seconds until one of the runs ends; there is at least one."""
        return max(0.0, min([run.ends_s for run in self._running.values()]) - now_s)

    def _own_finish_s(
        self, ticket: Ticket, own_s: float, cost: CostModel, streams: list[float], *, alone: bool, now_s: float
    ) -> float:
        """Return the seconds until a new ticket's scores.

        Args:
            ticket: the ticket.
            own_s: predicted seconds of a run with all its rows.
            cost: cost model of its model.
            streams: seconds until each stream is free, as a heap.
            alone: whether no ticket goes before it.
            now_s: the time.
        """
        finish_s = streams[0] + own_s
        if alone and not self._is_large(ticket, now_s):
            # Split, all parts end together: the streams share what is before them and the ticket.
            split_s = sum(streams) / self._streams + cost.predict_s(1, rows_a_stream(ticket.rows, self._streams))
            finish_s = min(finish_s, split_s)
        # While a stream is idle, a refusal would only leave it idle, so a typical prediction is enough.
        idle = len(self._running) < self._streams
        return finish_s if alone and idle else finish_s * cost.careful

    def _is_large(self, ticket: Ticket, now_s: float) -> bool:
        return is_large(ticket.rows, self._lanes.typical_rows_of_others(ticket, now_s))

    def _hopeless(self, waiting: WaitingTicket, streams: int, now_s: float) -> bool:
        """Return whether its rows cannot be scored in time on the streams that others leave it."""
        seconds = self._cost(waiting.ticket.model).predict_s(1, rows_a_stream(waiting.rows, streams))
        return now_s + seconds > waiting.ticket.deadline_s

    def _rows_of_next_piece(self, head: WaitingTicket, behind: int, free: int, typical: float, now_s: float) -> int:
        cost = self._cost(head.ticket.model)
        if is_large(head.ticket.rows, typical):
            return large_piece_rows(head.rows, typical, cost)
        if behind and free - behind <= 1:
            return head.rows  # the others need all idle streams
        next_free_s = self._next_free_s(now_s) if self._running and not behind else None
        load = self._lanes.load(now_s)
        while free:  # if a split over all idle streams does not pay, one over half of them may
            part = part_rows(head.rows, free, behind, next_free_s, cost)
            if part < head.rows and splitting_pays(head.rows, part, load, cost):
                return part
            free = (free + 1) // 2 if free > 2 else free - 1
        return head.rows

    def _joiners(self, head: WaitingTicket, behind: list[WaitingTicket], now_s: float) -> list[WaitingTicket]:
        def may_join(other: WaitingTicket) -> bool:
            return (
                other.ticket.model == head.ticket.model and not other.start and not self._is_large(other.ticket, now_s)
            )

        cost = self._cost(head.ticket.model)
        return joiners(head, takewhile(may_join, behind), len(behind), cost, now_s)

    def _wait_until_s(self, head: WaitingTicket, now_s: float) -> float:
        """Return until when a ticket waits for another one to join; decided once for each ticket."""
        if head.wait_until_s is None:
            arrivals, cost = self._arrivals[head.ticket.model], self._cost(head.ticket.model)
            head.wait_until_s = worth_waiting_until_s(head, arrivals, cost, now_s)
        return head.wait_until_s

    def _start(self, pieces: tuple[Piece, ...], now_s: float) -> Run:
        first, rows, run = pieces[0].ticket, 0, Run(pieces)
        for ticket, start, stop in pieces:
            waiting = self._waiting[ticket.number]
            waiting.take(stop - start)
            rows += stop - start
            if waiting.rows == 0:
                self.cancel(ticket)
        cost_s = self._cost(first.model).predict_s(len(pieces), rows)
        self._charge(run, cost_s, now_s)
        self._running[run] = _RunningRun(now_s, cost_s, now_s + cost_s)
        return run

    def _charge(self, run: Run, seconds: float, now_s: float) -> None:
        """Charge each lane and caller of a run for its part of the rows."""
        rows = sum([piece.rows for piece in run.pieces])
        for piece in run.pieces:
            self._lanes.charge(piece.ticket, seconds * piece.rows / rows, now_s)
