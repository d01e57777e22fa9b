"""Who is next: the lanes, what each used of its share of the engine, and the order of the tickets that wait. Pure."""

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

#: The time over which lanes' use of the engine is compared.
_MEMORY_S = 1.0
#: The weight of a lane's latest ticket in the size of its typical one.
_TICKET_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class Lane:
    """How a surface stands against the others.

    Attributes:
        priority: the higher goes first, as long as it uses no more than its share.
        share: of the engine's time where there is not enough for all, against the shares of the other lanes with work.
    """

    priority: int = 0
    share: float = 1.0


@dataclass(slots=True, eq=False)
class WaitingTicket:
    """A ticket that waits, or of which rows wait.

    Attributes:
        ready: whether its features are read, so that it may run.
        start: how many of its rows are already in runs.
        wait_until_s: until when it waits for a further ticket; None before that is decided.
    """

    ticket: Ticket
    ready: bool = False
    start: int = 0
    wait_until_s: float | None = None

    @property
    def rows(self) -> int:
        """Rows that are in no run yet."""
        return self.ticket.rows - self.start

    @property
    def place(self) -> tuple[float, int]:
        return self.ticket.deadline_s, self.ticket.number


_PLACE = attrgetter("place")


@dataclass(slots=True)
class _LaneState:
    lane: Lane = Lane()
    #: By deadline.
    waiting: list[WaitingTicket] = field(default_factory=list)
    #: Engine seconds.
    used: DecayingSum = field(default_factory=lambda: DecayingSum(_MEMORY_S))
    rows: DecayingMean = field(default_factory=lambda: DecayingMean(_TICKET_WEIGHT))
    last_came_s: float = -math.inf

    def active(self, now_s: float) -> bool:
        return bool(self.waiting) or now_s - self.last_came_s < _MEMORY_S


#: Whether a lane used more than its share, and its priority; the lowest rank goes first.
_Rank = tuple[bool, int]


class Lanes:
    """The tickets that wait, by lane. A lane that was not configured has the default priority and share."""

    def __init__(self, lanes: Mapping[str, Lane], streams: int) -> None:
        self._lanes = defaultdict(_LaneState, {name: _LaneState(lane) for name, lane in lanes.items()})
        self._capacity_s = streams * _MEMORY_S

    def add(self, waiting: WaitingTicket, now_s: float) -> None:
        state = self._lanes[waiting.ticket.lane]
        insort(state.waiting, waiting, key=_PLACE)
        state.rows.observe(waiting.ticket.rows)
        state.last_came_s = now_s

    def remove(self, waiting: WaitingTicket) -> None:
        self._lanes[waiting.ticket.lane].waiting.remove(waiting)

    def charge(self, name: str, seconds: float, now_s: float) -> None:
        """Note what a lane used of the engine; a negative correction gives back."""
        self._lanes[name].used.add(seconds, now_s)

    def load(self, now_s: float) -> float:
        """Return the part of the streams' recent time that was used."""
        return sum(state.used.at(now_s) for state in self._lanes.values()) / self._capacity_s

    def typical_rows(self, name: str) -> float:
        """Return the rows of a lane's typical ticket; NaN where it had none."""
        return self._lanes[name].rows.value

    def typical_rows_of_others(self, name: str, now_s: float) -> float:
        """Return the rows of the smallest typical ticket of the other lanes at work; infinite without any."""
        others = (state for other, state in self._lanes.items() if other != name)
        return min((state.rows.value for state in others if state.active(now_s)), default=math.inf)

    def ordered(self, now_s: float) -> list[WaitingTicket]:
        """Return what waits in the order in which it should run: lanes within their share, priority, deadline."""
        queues = self._queues(self._ranks(now_s))
        return [waiting for rank in sorted(queues) for waiting in queues[rank]]

    def around(self, ticket: Ticket, now_s: float) -> tuple[list[WaitingTicket], list[WaitingTicket]]:
        """Return what would run before a newcomer, and what would run behind it but has a claim to be in time."""
        ranks = self._ranks(now_s, ticket.lane)
        queues, own = self._queues(ranks), ranks[ticket.lane]
        queue = queues.pop(own, [])
        cut = bisect_right(queue, (ticket.deadline_s, ticket.number), key=_PLACE)
        before = [waiting for rank in sorted(queues) if rank < own for waiting in queues[rank]]
        # What a lane uses beyond its share it has no claim to, unless the newcomer's lane is beyond its share too.
        behind = [w for rank in sorted(queues) if rank > own and rank[0] == own[0] for w in queues[rank]]
        return before + queue[:cut], queue[cut:] + behind

    def _ranks(self, now_s: float, newcomer: str | None = None) -> dict[str, _Rank]:
        """Rank the lanes with work, the newcomer's too."""
        working = {name: state for name, state in self._lanes.items() if state.waiting}
        if newcomer is not None:
            working[newcomer] = self._lanes[newcomer]
        if not working:
            return {}
        whole_s = self._capacity_s / sum(state.lane.share for state in working.values())
        return {
            name: (state.used.at(now_s) > state.lane.share * whole_s, -state.lane.priority)
            for name, state in working.items()
        }

    def _queues(self, ranks: Mapping[str, _Rank]) -> dict[_Rank, list[WaitingTicket]]:
        """Return what waits in the lanes of each rank, by deadline."""
        lists: dict[_Rank, list[list[WaitingTicket]]] = {}
        for name, rank in ranks.items():
            lists.setdefault(rank, []).append(self._lanes[name].waiting)
        return {
            rank: some[0] if len(some) == 1 else sorted(chain.from_iterable(some), key=_PLACE)
            for rank, some in lists.items()
        }
