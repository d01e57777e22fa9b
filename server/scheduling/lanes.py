"""Orders waiting tickets by lane: each lane's share of the engine, its priority, and the tickets' deadlines. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

from feature_client.estimates import DecayingMean, DecayingSum
from server.scheduling.contract import Ticket

#: Period over which the lanes' use of the engine is compared, in seconds.
_MEMORY_S = 1.0
#: Weight of a lane's latest ticket in its mean ticket size.
_TICKET_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class Lane:
    """A surface's claim on the engine.

    Attributes:
        priority: lanes with a higher priority go first while they are within their shares.
        share: weight of its share of the engine's time under overload, relative to the other lanes with work.
    """

    priority: int = 0
    share: float = 1.0


class WaitingTicket:
    """A ticket with rows that are in no run yet.

    Attributes:
        ready: whether its features are read, so that it may run.
        start: how many of its rows are already in runs.
        rows: how many are not.
        place: by which the tickets of a lane are ordered.
        wait_until_s: until when it waits for another ticket to join; None before that is decided.
    """

    __slots__ = ("place", "ready", "rows", "start", "ticket", "wait_until_s")

    def __init__(self, ticket: Ticket, *, ready: bool = False, start: int = 0) -> None:
        self.ticket = ticket
        self.ready = ready
        self.start = start
        self.rows = ticket.rows - start
        self.place = ticket.deadline_s, ticket.number
        self.wait_until_s: float | None = None

    def take(self, rows: int) -> None:
        """Put the next rows into a run."""
        self.start += rows
        self.rows -= rows


_PLACE = attrgetter("place")


@dataclass(slots=True)
class _LaneState:
    lane: Lane = Lane()
    #: Waiting tickets by deadline.
    waiting: list[WaitingTicket] = field(default_factory=list)
    #: Engine seconds used recently.
    used: DecayingSum = field(default_factory=lambda: DecayingSum(_MEMORY_S))
    rows: DecayingMean = field(default_factory=lambda: DecayingMean(_TICKET_WEIGHT))
    last_came_s: float = -math.inf

    def active(self, now_s: float) -> bool:
        return bool(self.waiting) or now_s - self.last_came_s < _MEMORY_S


#: Whether a lane used more than its share, and its negative priority; the lowest rank goes first.
_Rank = tuple[bool, int]


class Lanes:
    """The waiting tickets by lane. Lanes that are not configured have the default priority and share."""

    def __init__(self, lanes: Mapping[str, Lane], streams: int) -> None:
        self._lanes = defaultdict(_LaneState, {name: _LaneState(lane) for name, lane in lanes.items()})
        #: The lanes that ever had a ticket.
        self._used_lanes: dict[str, _LaneState] = {}
        self._capacity_s = streams * _MEMORY_S

    def add(self, waiting: WaitingTicket, now_s: float) -> None:
        ticket = waiting.ticket
        state = self._used_lanes[ticket.lane] = self._lanes[ticket.lane]
        insort(state.waiting, waiting, key=_PLACE)
        state.rows.observe(ticket.rows)
        state.last_came_s = now_s

    def remove(self, waiting: WaitingTicket) -> None:
        self._lanes[waiting.ticket.lane].waiting.remove(waiting)

    def charge(self, name: str, seconds: float, now_s: float) -> None:
        """Add engine seconds to a lane's use; a negative correction gives some back."""
        self._lanes[name].used.add(seconds, now_s)

    def load(self, now_s: float) -> float:
        """Return the fraction of the streams' recent time that was used."""
        return sum([state.used.at(now_s) for state in self._lanes.values()]) / self._capacity_s

    def typical_rows_of_others(self, name: str, now_s: float) -> float:
        """Return the smallest mean ticket size, in rows, of the other active lanes; infinite if there are none."""
        typical = math.inf
        for other, state in self._used_lanes.items():
            if other != name and state.rows.value < typical and state.active(now_s):
                typical = state.rows.value
        return typical

    def ordered(self, now_s: float) -> list[WaitingTicket]:
        """Return the waiting tickets in the order to run: lanes within their share, then by priority and deadline."""
        working = [state for state in self._used_lanes.values() if state.waiting]
        if len(working) == 1:
            return working[0].waiting.copy()
        queues = self._queues(self._ranks(now_s))
        return [waiting for rank in sorted(queues) for waiting in queues[rank]]

    def around(self, ticket: Ticket, now_s: float) -> tuple[list[WaitingTicket], list[WaitingTicket]]:
        """Return the tickets that would run before a new one, and those behind it that it must not make late."""
        ranks = self._ranks(now_s, ticket.lane)
        own, place = ranks[ticket.lane], (ticket.deadline_s, ticket.number)
        if len(ranks) == 1:
            queue = self._lanes[ticket.lane].waiting
            cut = bisect_right(queue, place, key=_PLACE)
            return queue[:cut], queue[cut:]
        queues = self._queues(ranks)
        queue = queues.pop(own, [])
        cut = bisect_right(queue, place, key=_PLACE)
        before = [waiting for rank in sorted(queues) if rank < own for waiting in queues[rank]]
        # A lane beyond its share has no claim to be in time, unless the new ticket's lane is beyond its share too.
        behind = [w for rank in sorted(queues) if rank > own and rank[0] == own[0] for w in queues[rank]]
        return before + queue[:cut], queue[cut:] + behind

    def _ranks(self, now_s: float, newcomer: str | None = None) -> dict[str, _Rank]:
        """Rank the lanes with work, including the lane of a new ticket."""
        working = {name: state for name, state in self._used_lanes.items() if state.waiting}
        if newcomer is not None:
            working[newcomer] = self._lanes[newcomer]
        if len(working) <= 1:  # alone, a lane has no share to keep to
            return {name: (False, -state.lane.priority) for name, state in working.items()}
        whole_s = self._capacity_s / sum(state.lane.share for state in working.values())
        return {
            name: (state.used.at(now_s) > state.lane.share * whole_s, -state.lane.priority)
            for name, state in working.items()
        }

    def _queues(self, ranks: Mapping[str, _Rank]) -> dict[_Rank, list[WaitingTicket]]:
        """Return the waiting tickets of each rank's lanes, by deadline."""
        lists: dict[_Rank, list[list[WaitingTicket]]] = {}
        for name, rank in ranks.items():
            lists.setdefault(rank, []).append(self._lanes[name].waiting)
        return {
            rank: some[0] if len(some) == 1 else sorted(chain.from_iterable(some), key=_PLACE)
            for rank, some in lists.items()
        }
