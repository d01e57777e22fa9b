"""The batch policy: runs the ticket with the earliest deadline first, within each lane's share of the engine. Pure.

Every decision compares predicted seconds (`server.scheduling.cost.CostModel`); there are no thresholds in milliseconds.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class _RunningRun:
    run: Run
    started_s: float
    #: Its predicted seconds.
    cost_s: float

    def left_s(self, now_s: float) -> float:
        return max(0.0, self.started_s + self.cost_s - now_s)


class EarliestDeadlineFirst:
    """Runs the earliest deadline first, within each lane's share of the engine.

    - Lanes within their share go first, by priority and then by deadline. Lanes beyond their share get the time that is
      left (`lanes`).
    - If no other ticket waits, a ticket is split over idle streams so that all pieces end together, provided that this
      gains more than the additional runs cost under the recent load (`splitting`). In a backlog, tickets run whole,
      because splitting would only cost time.
    - A ticket much larger than those of other lanes runs in small pieces, and leaves one stream to the other lanes.
    - A ticket joins a run if this saves more seconds, for it and all tickets behind it, than it delays those in the run
      (`joining`).
    - A ticket waits for another only if that one is expected sooner than the time that joining saves.
    - A ticket that cannot end in time expires unscored. If no other ticket waits, it is tried until its deadline,
      because the prediction may be wrong.
    """

    def __init__(
        self, streams: int, cost: Callable[[Hashable], CostModel], lanes: Mapping[str, Lane] | None = None
    ) -> None:
        self._streams = streams
        self._cost = cost
        self._lanes = Lanes(lanes or {}, streams)
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
        self._arrivals.setdefault(ticket.model, Arrivals()).observe(ticket, now_s)

    def cancel(self, ticket: Ticket) -> None:
        waiting = self._waiting.pop(ticket.number, None)
        if waiting is not None:
            self._lanes.remove(waiting)

    def finished(self, run: Run, now_s: float) -> None:
        out = self._running.pop(run)
        # The lane was charged for the predicted time at the start; correct it.
        self._lanes.charge(run.pieces[0].ticket.lane, max(0.0, now_s - out.started_s) - out.cost_s, now_s)

    def next(self, now_s: float) -> Run | Expire | WaitUntil | Idle:
        free = self._streams - len(self._running)
        if free <= 0 or not self._waiting:
            return Idle()
        expired = [w.ticket for w in self._waiting.values() if w.ready and w.ticket.deadline_s <= now_s]
        order = [w for w in self._lanes.ordered(now_s) if w.ready and w.ticket.deadline_s > now_s]
        while len(order) > 1 and self._hopeless(order[0], free - len(order) + 1, now_s):
            expired.append(order.pop(0).ticket)
        if expired:
            for ticket in expired:
                self.cancel(ticket)
            return Expire(tuple(expired))
        while order and free == 1 and self._streams > 1 and self._is_large(order[0], now_s):
            order.pop(0)  # leave the last stream to lanes with smaller tickets
        if not order:
            return Idle()
        head, behind = order[0], order[1:]
        rows = self._rows_of_next_piece(head, len(behind), free, now_s)
        whole, joined = rows == head.ticket.rows, list[WaitingTicket]()
        if whole and free == 1:
            joined = self._joiners(head, behind, now_s)
        if whole and not behind and (time_s := self._wait_until_s(head, now_s)) > now_s:
            return WaitUntil(time_s)
        pieces = [Piece(head.ticket, head.start, head.start + rows)]
        return self._start((*pieces, *(Piece(other.ticket, 0, other.rows) for other in joined)), now_s)

    def forecast(self, ticket: Ticket, now_s: float) -> Forecast:
        cost = self._cost(ticket.model)
        before, behind = self._lanes.around(ticket, now_s) if self._waiting else ([], [])
        #: Predicted seconds until each stream has run what was put on it, as a heap.
        streams = [run.left_s(now_s) for run in self._running.values()]
        streams += [0.0] * (self._streams - len(streams))
        heapify(streams)
        for waiting in before:
            self._put_on_first_free(streams, waiting)
        finish_s = now_s + self._own_finish_s(ticket, cost, streams, alone=not before, now_s=now_s)
        harms = 0
        if behind:
            delayed = streams.copy()
            heapreplace(delayed, delayed[0] + cost.predict_s(1, ticket.rows))
            for waiting in behind:
                last_s = self._cost(waiting.ticket.model).finish_s(1, waiting.rows)
                left_s = waiting.ticket.deadline_s - now_s - last_s
                harms += streams[0] <= left_s < delayed[0]
                self._put_on_first_free(streams, waiting)
                self._put_on_first_free(delayed, waiting)
        return Forecast(finish_s, harms)

    def free_in_s(self, now_s: float) -> float:
        if len(self._running) < self._streams:
            return 0.0
        return min(run.left_s(now_s) for run in self._running.values())

    def _put_on_first_free(self, streams: list[float], waiting: WaitingTicket) -> None:
        heapreplace(streams, streams[0] + self._cost(waiting.ticket.model).predict_s(1, waiting.rows))

    def _own_finish_s(
        self, ticket: Ticket, cost: CostModel, streams: list[float], *, alone: bool, now_s: float
    ) -> float:
        """Return the seconds until a new ticket's scores, given the seconds until each stream is free, as a heap."""
        finish_s = streams[0] + cost.predict_s(1, ticket.rows)
        if alone and not self._is_large(WaitingTicket(ticket), now_s):
            # Split, all parts end together: the streams share what is before them and the ticket.
            split_s = sum(streams) / self._streams + cost.predict_s(1, rows_a_stream(ticket.rows, self._streams))
            finish_s = min(finish_s, split_s)
        # While a stream is idle, a refusal would only leave it idle, so a typical prediction is enough.
        idle = len(self._running) < self._streams
        return finish_s if alone and idle else finish_s * cost.careful

    def _is_large(self, waiting: WaitingTicket, now_s: float) -> bool:
        ticket = waiting.ticket
        return is_large(ticket.rows, self._lanes.typical_rows_of_others(ticket.lane, now_s))

    def _hopeless(self, waiting: WaitingTicket, streams: int, now_s: float) -> bool:
        """Return whether its rows cannot be scored in time on the streams that others leave it."""
        seconds = self._cost(waiting.ticket.model).predict_s(1, rows_a_stream(waiting.rows, streams))
        return now_s + seconds > waiting.ticket.deadline_s

    def _rows_of_next_piece(self, head: WaitingTicket, behind: int, free: int, now_s: float) -> int:
        cost, typical_of_others = (
            self._cost(head.ticket.model),
            self._lanes.typical_rows_of_others(head.ticket.lane, now_s),
        )
        if is_large(head.ticket.rows, typical_of_others):
            return large_piece_rows(head.rows, typical_of_others, cost)
        alone = behind == 0 and bool(self._running)
        next_free_s = min(run.left_s(now_s) for run in self._running.values()) if alone else None
        load = self._lanes.load(now_s)
        while free:  # if a split over all idle streams does not pay, one over half of them may
            part = part_rows(head.rows, free, behind, next_free_s, cost)
            if part < head.rows and splitting_pays(head.rows, part, load, cost):
                return part
            free = (free + 1) // 2 if free > 2 else free - 1
        return head.rows

    def _joiners(self, head: WaitingTicket, behind: list[WaitingTicket], now_s: float) -> list[WaitingTicket]:
        def may_join(other: WaitingTicket) -> bool:
            return other.ticket.model == head.ticket.model and not other.start and not self._is_large(other, now_s)

        cost = self._cost(head.ticket.model)
        return joiners(head, takewhile(may_join, behind), len(behind), cost, now_s)

    def _wait_until_s(self, head: WaitingTicket, now_s: float) -> float:
        """Return until when a ticket waits for another one to join; decided once for each ticket."""
        if head.wait_until_s is None:
            arrivals, cost = self._arrivals[head.ticket.model], self._cost(head.ticket.model)
            head.wait_until_s = worth_waiting_until_s(head, arrivals, cost, now_s)
        return head.wait_until_s

    def _start(self, pieces: tuple[Piece, ...], now_s: float) -> Run:
        for piece in pieces:
            waiting = self._waiting[piece.ticket.number]
            waiting.start = piece.stop
            if waiting.rows == 0:
                self.cancel(piece.ticket)
        first, rows = pieces[0].ticket, sum(piece.rows for piece in pieces)
        run = Run(pieces)
        cost_s = self._cost(first.model).predict_s(len(pieces), rows)
        self._lanes.charge(first.lane, cost_s, now_s)
        self._running[run] = _RunningRun(run, now_s, cost_s)
        return run
