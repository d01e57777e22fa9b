"""Orders waiting tickets by lane and caller: by shares of the engine, priorities, and the tickets' deadlines. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

from feature_client.estimates import DecayingMean, DecayingSum
from server.scheduling.contract import Ticket

#: Period over which the lanes' use of the engine is compared, in seconds.
_MEMORY_S = 1.0
#: Weight of the latest ticket in the mean size of a caller's tickets in a lane.
_TICKET_WEIGHT = 0.1
#: So many flows are kept although nothing came of them recently.
_FLOWS_KEPT = 64


@dataclass(frozen=True, slots=True)
class Lane:
    """A claim on the engine: a surface's on all of it, or a caller's on what its surface gets.

    Attributes:
        priority: those with a higher priority go first while they are within their shares.
        share: weight of its share of the engine's time under overload, relative to the others with work.
        group: callers of one group have one share together; empty for none.
    """

    priority: int = 0
    share: float = 1.0
    group: str = ""


_UNCONFIGURED = Lane()


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
class _Flow:
    """What one caller has in one lane."""

    lane: str
    claim: Lane = _UNCONFIGURED
    #: Waiting tickets by deadline.
    waiting: list[WaitingTicket] = field(default_factory=list)
    #: Engine seconds used recently.
    used: DecayingSum = field(default_factory=lambda: DecayingSum(_MEMORY_S))
    rows: DecayingMean = field(default_factory=lambda: DecayingMean(_TICKET_WEIGHT))
    last_came_s: float = -math.inf

    def active(self, now_s: float) -> bool:
        return bool(self.waiting) or now_s - self.last_came_s < _MEMORY_S


#: Where a flow's tickets stand; the lowest goes first: whether its lane is beyond its share, minus the lane's priority,
#: whether its caller is beyond its share, minus the caller's priority. Plain tuples, as there are many.
_Rank = tuple[bool, int, bool, int]
#: A lane's name and a caller's.
_Key = tuple[str, str]
#: A mean ticket size in rows, and whose it is.
_Smallest = tuple[float, _Key | None]


class Lanes:
    """The waiting tickets by lane and caller. Those that are not configured have the default priority and share."""

    def __init__(self, lanes: Mapping[str, Lane], streams: int, callers: Callable[[str], Lane] | None = None) -> None:
        self._claims = dict(lanes)
        self._callers = callers or (lambda _: _UNCONFIGURED)
        #: Engine seconds that the lanes used recently.
        self._used = defaultdict[str, DecayingSum](lambda: DecayingSum(_MEMORY_S))
        #: Those that had a ticket recently.
        self._flows: dict[_Key, _Flow] = {}
        self._capacity_s = streams * _MEMORY_S
        #: Counts what `_smallest` does not know of: it is of one moment.
        self._changes = 0
        self._smallest_at: tuple[float, int] = (math.nan, 0)
        self._smallest: tuple[_Smallest, _Smallest] = (
            (math.inf, None),
            (math.inf, None),
        )

    def add(self, waiting: WaitingTicket, now_s: float) -> None:
        ticket = waiting.ticket
        flow = self._flows.get((ticket.lane, ticket.caller)) or self._new_flow(ticket, now_s)
        insort(flow.waiting, waiting, key=_PLACE)
        flow.claim = self._callers(ticket.caller)  # it may have changed
        flow.rows.observe(ticket.rows)
        flow.last_came_s = now_s
        self._changes += 1

    def _new_flow(self, ticket: Ticket, now_s: float) -> _Flow:
        if len(self._flows) >= _FLOWS_KEPT:
            self._flows = {key: flow for key, flow in self._flows.items() if flow.active(now_s)}
        flow = self._flows[ticket.lane, ticket.caller] = _Flow(ticket.lane)
        return flow

    def remove(self, waiting: WaitingTicket) -> None:
        self._flows[waiting.ticket.lane, waiting.ticket.caller].waiting.remove(waiting)
        self._changes += 1

    def charge(self, ticket: Ticket, seconds: float, now_s: float) -> None:
        """Add engine seconds to what a ticket's lane and caller used; a negative correction gives some back."""
        self._used[ticket.lane].add(seconds, now_s)
        if (flow := self._flows.get((ticket.lane, ticket.caller))) is not None:
            flow.used.add(seconds, now_s)

    def load(self, now_s: float) -> float:
        """Return the fraction of the streams' recent time that was used."""
        return sum([used.at(now_s) for used in self._used.values()]) / self._capacity_s

    def typical_rows_of_others(self, ticket: Ticket, now_s: float) -> float:
        """Return the smallest mean ticket size, in rows, of others at work than its caller; infinite without any."""
        known = now_s, self._changes
        if known != self._smallest_at:  # one decision asks for many tickets
            self._smallest_at, self._smallest = known, self._two_smallest(now_s)
        (rows, key), (next_rows, _) = self._smallest
        return next_rows if key == (ticket.lane, ticket.caller) else rows

    def _two_smallest(self, now_s: float) -> tuple[_Smallest, _Smallest]:
        """Return the two smallest mean ticket sizes of flows at work, and whose they are."""
        first: _Smallest = (math.inf, None)
        second = first
        for key, flow in self._flows.items():
            rows = flow.rows.value
            if rows < second[0] and flow.active(now_s):
                first, second = ((rows, key), first) if rows < first[0] else (first, (rows, key))
        return first, second

    def ordered(self, now_s: float) -> list[WaitingTicket]:
        """Return the waiting tickets in the order to run.

        Lanes within their share go first, by priority; in each lane, callers within their share, by priority; then
        tickets by deadline.
        """
        working = [flow for flow in self._flows.values() if flow.waiting]
        if len(working) == 1:
            return working[0].waiting.copy()
        queues = self._queues(self._ranks(now_s))
        return [waiting for rank in sorted(queues) for waiting in queues[rank]]

    def around(self, ticket: Ticket, now_s: float) -> tuple[list[WaitingTicket], list[WaitingTicket]]:
        """Return the tickets that would run before a new one, and those behind it that it must not make late."""
        ranks = self._ranks(now_s, ticket)
        own, place = ranks[ticket.lane, ticket.caller], (ticket.deadline_s, ticket.number)
        queues = self._queues(ranks)
        queue = queues.pop(own, [])
        cut = bisect_right(queue, place, key=_PLACE)
        before = [waiting for rank in sorted(queues) if rank < own for waiting in queues[rank]]
        # Who is beyond a share has no claim to be in time, unless the new ticket's lane and caller are so too.
        behind = [w for rank in sorted(queues) if rank > own and rank[::2] <= own[::2] for w in queues[rank]]
        return before + queue[:cut], queue[cut:] + behind

    def _ranks(self, now_s: float, newcomer: Ticket | None = None) -> dict[_Key, _Rank]:
        """Rank the flows with work, including that of a new ticket."""
        working = {key: flow for key, flow in self._flows.items() if flow.waiting}
        if newcomer is not None and (key := (newcomer.lane, newcomer.caller)) not in working:
            working[key] = self._flows.get(key) or _Flow(newcomer.lane)
            working[key].claim = self._callers(newcomer.caller)
        if len(working) <= 1:  # alone, nobody has a share to keep to
            return {
                key: (False, -self._lane(flow.lane).priority, False, -flow.claim.priority)
                for key, flow in working.items()
            }
        together = Counter((flow.lane, flow.claim.group) for flow in working.values() if flow.claim.group)
        shares, own = dict[str, float](), dict[_Key, float]()
        for key, flow in working.items():
            claim = flow.claim
            own[key] = claim.share / together[flow.lane, claim.group] if claim.group else claim.share
            shares[flow.lane] = shares.get(flow.lane, 0.0) + own[key]
        of_lanes = {name: self._lane(name) for name in shares}
        whole_s = self._capacity_s / sum([lane.share for lane in of_lanes.values()])
        #: For each lane: whether it is beyond its share, its rank, and what a caller gets of it for each unit of share.
        lanes = {
            name: (
                len(shares) > 1 and self._used[name].at(now_s) > lane.share * whole_s,
                -lane.priority,
                lane.share * whole_s / shares[name],
            )
            for name, lane in of_lanes.items()
        }
        found: dict[_Key, _Rank] = {}
        for key, flow in working.items():
            beyond, rank, unit_s = lanes[flow.lane]
            share = own[key]
            greedy = share < shares[flow.lane] and flow.used.at(now_s) > unit_s * share
            found[key] = beyond, rank, greedy, -flow.claim.priority
        return found

    def _lane(self, name: str) -> Lane:
        return self._claims.get(name, _UNCONFIGURED)

    def _queues(self, ranks: Mapping[_Key, _Rank]) -> dict[_Rank, list[WaitingTicket]]:
        """Return the waiting tickets of each rank's flows, by deadline."""
        lists: dict[_Rank, list[list[WaitingTicket]]] = {}
        for key, rank in ranks.items():
            if (flow := self._flows.get(key)) is not None:
                lists.setdefault(rank, []).append(flow.waiting)
        return {
            rank: some[0] if len(some) == 1 else sorted(chain.from_iterable(some), key=_PLACE)
            for rank, some in lists.items()
        }
