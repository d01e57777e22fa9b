"""The batch policy: the earliest deadline first, within each lane's share of the engine. Pure.

Every decision compares predicted seconds (`server.scheduling.cost.CostModel`); nothing here is tuned in milliseconds.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field

from server.scheduling.contract import Expire, Forecast, Idle, Piece, Run, Ticket, WaitUntil
from server.scheduling.cost import CostModel

#: Over what time lanes' use of the engine is compared.
_MEMORY_S = 1.0
#: What a second of a stream is worth while all are idle, against a second of an answer.
_COST_OF_IDLE = 0.1
#: A piece of a large ticket runs long enough that what every run costs is at most this part of it.
_OVERHEAD_MAX = 0.2


@dataclass(frozen=True, slots=True)
class Lane:
    """How a surface stands against the others.

    Attributes:
        priority: the higher goes first, as long as it uses no more than its share.
        share: of the engine's time where there is not enough for all, against the shares of the other lanes with work.
    """

    priority: int = 0
    share: float = 1.0


@dataclass(slots=True)
class _Entry:
    """A ticket that waits, or of which rows wait."""

    ticket: Ticket
    ready: bool
    start: int = 0
    wait_until_s: float | None = None

    @property
    def rows(self) -> int:
        return self.ticket.rows - self.start

    def __lt__(self, other: _Entry) -> bool:
        return (self.ticket.deadline_s, self.ticket.number) < (other.ticket.deadline_s, other.ticket.number)


@dataclass(slots=True)
class _LaneState:
    lane: Lane
    #: By deadline.
    entries: list[_Entry] = field(default_factory=list)
    #: Engine seconds used, forgotten exponentially.
    used_s: float = 0.0
    used_at_s: float = 0.0
    #: Rows of a typical ticket, and when the last one came.
    typical_rows: float = 0.0
    offered_at_s: float = -math.inf

    def use(self, seconds: float, now_s: float) -> None:
        self.used_s = self.recent_s(now_s) + seconds
        self.used_at_s = max(now_s, self.used_at_s)

    def recent_s(self, now_s: float) -> float:
        return self.used_s * math.exp(-max(0.0, now_s - self.used_at_s) / _MEMORY_S)

    def active(self, now_s: float) -> bool:
        return bool(self.entries) or now_s - self.offered_at_s < _MEMORY_S


@dataclass(slots=True)
class _RunningRun:
    run: Run
    lane: _LaneState
    started_s: float
    cost_s: float


@dataclass(slots=True)
class _Gap:
    """Seconds between arrivals of one model's tickets."""

    typical_s: float = math.inf
    last_s: float = -math.inf
    rows: float = 0.0


class EarliestDeadlineFirst:
    """The earliest deadline first, within each lane's share of the engine.

    - Lanes within their share go first: the higher priority, then the earlier deadline. Lanes beyond it take what is
      left.
    - A ticket that nothing else waits beside is split over idle streams, so that all end together, where that gains
      more than the additional run costs. In a backlog tickets run whole: splitting costs and gains nothing. One stream
      is left idle, for whatever else needs a processor, unless the ticket is much larger than its lane's others.
    - A ticket much larger than what other lanes bring runs in small pieces and leaves one stream to them.
    - A ticket joins a run where the seconds saved, for it and all behind it, outweigh the delay of those in the run.
    - It waits for a further ticket only where the next is expected sooner than the time that joining it saves.
    - What cannot end in time expires unscored; but a prediction may be wrong, so a ticket that nothing else waits
      beside is tried as long as its deadline is ahead.
    """

    def __init__(
        self, streams: int, cost: Callable[[Hashable], CostModel], lanes: Mapping[str, Lane] | None = None
    ) -> None:
        self._streams = streams
        self._cost = cost
        self._lanes = {name: _LaneState(lane) for name, lane in (lanes or {}).items()}
        self._known: dict[int, _Entry] = {}
        self._running: list[_RunningRun] = []
        self._gaps: dict[Hashable, _Gap] = {}

    def __len__(self) -> int:
        """Tickets that wait, or of which rows wait."""
        return len(self._known)

    def forget(self, model: Hashable) -> None:
        self._gaps.pop(model, None)

    def reserve(self, ticket: Ticket, now_s: float) -> None:
        if ticket.number in self._known:
            raise ValueError(f"ticket {ticket.number} is already known")
        entry = self._known[ticket.number] = _Entry(ticket, ready=False)
        lane = self._lane(ticket.lane)
        insort(lane.entries, entry)
        lane.typical_rows += 0.1 * (ticket.rows - lane.typical_rows) if lane.typical_rows else ticket.rows
        lane.offered_at_s = now_s

    def offer(self, ticket: Ticket, now_s: float) -> None:
        if ticket.number not in self._known:
            self.reserve(ticket, now_s)
        entry = self._known[ticket.number]
        if entry.ready:
            raise ValueError(f"ticket {ticket.number} is already waiting")
        entry.ready = True
        gap = self._gaps.setdefault(ticket.model, _Gap())
        since_s = max(1e-6, now_s - gap.last_s)
        gap.typical_s = since_s if math.isinf(gap.typical_s) else gap.typical_s * 0.9 + 0.1 * since_s
        gap.rows = ticket.rows if not gap.rows else gap.rows * 0.9 + 0.1 * ticket.rows
        gap.last_s = now_s

    def cancel(self, ticket: Ticket) -> None:
        entry = self._known.pop(ticket.number, None)
        if entry is not None:
            self._lane(ticket.lane).entries.remove(entry)

    def finished(self, run: Run, now_s: float) -> None:
        place = next(i for i, out in enumerate(self._running) if out.run is run)
        out = self._running.pop(place)
        # At the start the prediction was charged.
        out.lane.use(max(0.0, now_s - out.started_s) - out.cost_s, now_s)

    def next(self, now_s: float) -> Run | Expire | WaitUntil | Idle:
        free = self._streams - len(self._running)
        if free <= 0:
            return Idle()
        expired = [entry.ticket for entry in self._known.values() if entry.ready and entry.ticket.deadline_s <= now_s]
        order = [
            entry
            for entry in self._ordered(self._over_their_share(now_s))
            if entry.ready and entry.ticket.deadline_s > now_s
        ]
        while order and len(order) > 1 and self._hopeless(order[0], now_s):
            expired.append(order.pop(0).ticket)
        if expired:
            for ticket in expired:
                self.cancel(ticket)
            return Expire(tuple(expired))
        while order and self._must_leave_a_stream(order[0], free, now_s):
            order.pop(0)
        if not order:
            return Idle()
        head, behind = order[0], order[1:]
        rows = self._piece_rows(head, len(behind), free, now_s)
        pieces = [Piece(head.ticket, head.start, head.start + rows)]
        if rows == head.ticket.rows and free == 1:
            pieces += self._joined(head, behind, now_s)
        if len(pieces) == 1 and not behind and rows == head.ticket.rows:
            wait_until_s = self._worth_waiting(head, now_s)
            if wait_until_s is not None:
                return WaitUntil(wait_until_s)
        return self._start(tuple(pieces), now_s)

    def forecast(self, ticket: Ticket, now_s: float) -> Forecast:
        own = _Entry(ticket, ready=False)
        cost = self._cost(ticket.model)
        busy_s = sum(max(0.0, out.started_s + out.cost_s - now_s) for out in self._running)
        work_s, behind = busy_s, iter(list[_Entry]())
        lane = self._lane(ticket.lane)
        insort(lane.entries, own)
        try:
            over = self._over_their_share(now_s)
            ordered = iter(list(self._ordered(over)))
        finally:
            lane.entries.remove(own)
        alone = True
        for entry in ordered:
            if entry is own:
                behind = ordered
                break
            alone = False
            work_s += self._cost(entry.ticket.model).predict_s(1, entry.rows)
        if alone and len(self._running) < self._streams:
            # Refusing it would give its time to nobody: a typical run has to do, not a careful promise.
            rows = ticket.rows if self._is_large(own, now_s) else math.ceil(ticket.rows / self._parts_max(own))
            finish_s = now_s + work_s / self._streams + cost.predict_s(1, rows)
        else:
            finish_s = now_s + work_s / self._streams + cost.finish_s(1, ticket.rows)
        harms, own_s = 0, cost.predict_s(1, ticket.rows)
        for entry in behind:
            if entry.ticket.lane in over and ticket.lane not in over:
                break  # what a lane uses beyond its share it has no claim to
            model = self._cost(entry.ticket.model)
            then_s = now_s + work_s / self._streams + model.finish_s(1, entry.rows)
            if then_s <= entry.ticket.deadline_s < then_s + own_s / self._streams:
                harms += 1
            work_s += model.predict_s(1, entry.rows)
        return Forecast(finish_s, harms)

    def _lane(self, name: str) -> _LaneState:
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _LaneState(Lane())
        return lane

    def _over_their_share(self, now_s: float) -> set[str]:
        """Name the lanes that used more of the engine than their share among those with work; alone, none has."""
        working = {name: state for name, state in self._lanes.items() if state.entries}
        if len(working) < 2:
            return set()
        whole_s = self._streams * _MEMORY_S / sum(state.lane.share for state in working.values())
        return {name for name, state in working.items() if state.recent_s(now_s) > state.lane.share * whole_s}

    def _ordered(self, over: set[str]) -> Iterator[_Entry]:
        """Yield what waits in the order in which it should run."""
        working = [(name, state) for name, state in self._lanes.items() if state.entries]
        if len(working) == 1:
            yield from working[0][1].entries
            return
        ranked = [
            (name in over, -state.lane.priority, entry.ticket.deadline_s, entry.ticket.number, entry)
            for name, state in working
            for entry in state.entries
        ]
        yield from (rank[-1] for rank in sorted(ranked))

    def _hopeless(self, entry: _Entry, now_s: float) -> bool:
        """Tell whether its rows cannot be scored in time even on all streams that it may take."""
        rows = math.ceil(entry.rows / self._parts_max(entry))
        return now_s + self._cost(entry.ticket.model).predict_s(1, rows) > entry.ticket.deadline_s

    def _typical_of_others(self, entry: _Entry, now_s: float) -> float:
        """Rows of a typical ticket of the other lanes that are at work; infinite without any."""
        own = self._lane(entry.ticket.lane)
        found = [s.typical_rows for s in self._lanes.values() if s is not own and s.typical_rows and s.active(now_s)]
        return min(found, default=math.inf)

    def _is_large(self, entry: _Entry, now_s: float) -> bool:
        return entry.ticket.rows > 2 * self._typical_of_others(entry, now_s)

    def _left_idle(self, entry: _Entry) -> int:
        """Return how many streams splitting it must leave idle."""
        return int(entry.ticket.rows <= 2 * self._lane(entry.ticket.lane).typical_rows)

    def _parts_max(self, entry: _Entry) -> int:
        """Over how many streams it may be split."""
        return max(1, self._streams - self._left_idle(entry))

    def _must_leave_a_stream(self, entry: _Entry, free: int, now_s: float) -> bool:
        return free == 1 and self._streams > 1 and self._is_large(entry, now_s)

    def _piece_rows(self, head: _Entry, behind: int, free: int, now_s: float) -> int:
        """Decide how many of the head's rows the next run takes."""
        cost, rows = self._cost(head.ticket.model), head.rows
        if self._is_large(head, now_s):
            limit = max(self._typical_of_others(head, now_s) / 2, self._least_rows(cost))
            rows = min(rows, math.ceil(limit))
            # The last two pieces alike, rather than a small one that costs a whole run.
            return math.ceil(head.rows / 2) if rows < head.rows < 2 * rows else rows
        usable = free - self._left_idle(head)
        over = usable - min(behind, free - 1)
        if over > 1:
            part = math.ceil(rows / over)
        elif behind == 0 and usable > 0 and self._running:
            # The rest can start on the next stream that ends its run: both should end together.
            until_s = max(0.0, min(out.started_s + out.cost_s for out in self._running) - now_s)
            per_row_s = (cost.predict_s(1, rows) - cost.predict_s(1, (rows + 1) // 2)) / max(1, rows // 2)
            part = min(rows, math.ceil((rows + until_s / per_row_s) / 2)) if per_row_s > 0 else rows
        else:
            return rows
        if part >= rows:
            return rows
        whole_s, part_s, rest_s = cost.predict_s(1, rows), cost.predict_s(1, part), cost.predict_s(1, rows - part)
        # Additional seconds of a stream cost others the less, the more streams are idle anyway.
        weight = max(_COST_OF_IDLE, self._load(now_s))
        return part if whole_s - part_s > weight * (part_s + rest_s - whole_s) else rows

    def _load(self, now_s: float) -> float:
        """Return the part of the streams' recent time that was used."""
        return sum(lane.recent_s(now_s) for lane in self._lanes.values()) / (self._streams * _MEMORY_S)

    def _least_rows(self, cost: CostModel) -> int:
        """Rows of the smallest run of which the fixed cost is no more than `_OVERHEAD_MAX`."""
        empty_s, rows = cost.fixed_s + cost.per_request_s, 1
        while cost.predict_s(1, rows) * _OVERHEAD_MAX < empty_s and rows < 1 << 20:
            rows += rows // 2 + 1
        return rows

    def _joined(self, head: _Entry, behind: list[_Entry], now_s: float) -> list[Piece]:
        cost = self._cost(head.ticket.model)
        requests, rows, deadline_s = 1, head.rows, head.ticket.deadline_s
        pieces: list[Piece] = []
        for i, entry in enumerate(behind):
            if entry.ticket.model != head.ticket.model or entry.start or self._is_large(entry, now_s):
                break
            added_s = cost.predict_s(requests + 1, rows + entry.rows) - cost.predict_s(requests, rows)
            saved_s = cost.predict_s(1, entry.rows) - added_s
            deadline_s = min(deadline_s, entry.ticket.deadline_s)
            if requests * added_s > saved_s * (len(behind) - i):
                break
            if now_s + cost.finish_s(requests + 1, rows + entry.rows) > deadline_s:
                break
            pieces.append(Piece(entry.ticket, 0, entry.rows))
            requests, rows = requests + 1, rows + entry.rows
        return pieces

    def _worth_waiting(self, head: _Entry, now_s: float) -> float | None:
        """Say until when another ticket is worth waiting for, if it is; decided once for each head."""
        gap, cost = self._gaps[head.ticket.model], self._cost(head.ticket.model)
        if head.wait_until_s is None:
            other = max(1, round(gap.rows))
            together_s = cost.predict_s(2, head.rows + other)
            saved_s = cost.predict_s(1, head.rows) + cost.predict_s(1, other) - together_s
            latest_s = head.ticket.deadline_s - cost.finish_s(2, head.rows + other)
            head.wait_until_s = min(now_s + 2 * gap.typical_s, latest_s) if gap.typical_s < saved_s else now_s
        return head.wait_until_s if head.wait_until_s > now_s else None

    def _start(self, pieces: tuple[Piece, ...], now_s: float) -> Run:
        for piece in pieces:
            entry = self._known[piece.ticket.number]
            entry.start = piece.stop
            if entry.rows == 0:
                self.cancel(piece.ticket)
        run = Run(pieces)
        lane = self._lane(pieces[0].ticket.lane)
        cost_s = self._cost(pieces[0].ticket.model).predict_s(len(pieces), sum(piece.rows for piece in pieces))
        lane.use(cost_s, now_s)
        self._running.append(_RunningRun(run, lane, now_s, cost_s))
        return run
