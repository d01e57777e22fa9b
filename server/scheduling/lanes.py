"""Orders waiting tickets by lane and caller: by shares of the engine, priorities, and the tickets' deadlines. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

from feature_client.estimates import DecayingMean, DecayingSum
from server.scheduling.contract import Ticket
from server.scheduling.splitting import is_large

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
    #: Of the claim that it works with.
    kind: _Kind | None = None
    #: Waiting tickets by deadline.
    waiting: list[WaitingTicket] = field(default_factory=list)
    #: Engine seconds used recently.
    used: DecayingSum = field(default_factory=lambda: DecayingSum(_MEMORY_S))
    #: Number of tickets that came recently, and their mean size.
    came: DecayingSum = field(default_factory=lambda: DecayingSum(_MEMORY_S))
    rows: DecayingMean = field(default_factory=lambda: DecayingMean(_TICKET_WEIGHT))
    last_came_s: float = -math.inf

    def active(self, now_s: float) -> bool:
        return bool(self.waiting) or now_s - self.last_came_s < _MEMORY_S


#: Flows of one kind have the same claim in one lane: the lane, and the claim's priority, share and group.
_Kind = tuple[str, int, float, str]
#: Where a flow's tickets stand; the lowest goes first: whether its lane is beyond its share, minus the lane's priority,
#: whether its caller is beyond its share, minus the caller's priority. Plain tuples, as there are many.
_Rank = tuple[bool, int, bool, int]
#: A lane's name and a caller's.
_Key = tuple[str, str]


class _Smallest:
    """The two smallest mean ticket sizes, in rows, of flows at work, and whose they are. Found anew only when needed.

    Attributes:
        until_s: until when they are true, unless a ticket comes or goes that `touches` them.
    """

    __slots__ = ("key", "next_key", "next_rows", "rows", "until_s")

    def __init__(self, flows: Mapping[_Key, _Flow], now_s: float) -> None:
        self.rows = self.next_rows = self.until_s = math.inf
        self.key: _Key | None = None
        self.next_key: _Key | None = None
        for key, flow in flows.items():
            rows = flow.rows.value
            if rows < self.next_rows and flow.active(now_s):
                if rows < self.rows:
                    self.next_rows, self.next_key = self.rows, self.key
                    self.rows, self.key = rows, key
                else:
                    self.next_rows, self.next_key = rows, key
        for found in (self.key, self.next_key):
            if found is not None:
                self.until_s = min(self.until_s, max(now_s, flows[found].last_came_s + _MEMORY_S))

    def touches(self, key: _Key, rows: float) -> bool:
        """Return whether a ticket of a flow may change them; `rows` is the flow's mean."""
        return rows < self.next_rows or key in (self.key, self.next_key)


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
        #: Those with a waiting ticket, how many there are of each kind, and a bound on what any of them used.
        self._working: dict[_Key, _Flow] = {}
        self._kinds: dict[_Kind, int] = {}
        self._most_used_s = 0.0
        #: All waiting tickets by deadline.
        self._waiting: list[WaitingTicket] = []
        #: None if it must be found anew.
        self._smallest: _Smallest | None = None

    def add(self, waiting: WaitingTicket, now_s: float) -> None:
        ticket = waiting.ticket
        key = ticket.lane, ticket.caller
        flow = self._flows.get(key) or self._new_flow(key, now_s)
        insort(self._waiting, waiting, key=_PLACE)
        insort(flow.waiting, waiting, key=_PLACE)
        self._working[key] = flow
        flow.claim = self._callers(ticket.caller)  # it may have changed
        self._set_kind(flow, _kind(flow))
        self._most_used_s = max(self._most_used_s, flow.used.at_most)
        flow.rows.observe(ticket.rows)
        flow.came.add(1.0, now_s)
        flow.last_came_s = now_s
        self._touch(key, flow)

    def _new_flow(self, key: _Key, now_s: float) -> _Flow:
        if len(self._flows) >= _FLOWS_KEPT:
            self._flows = {key: flow for key, flow in self._flows.items() if flow.active(now_s)}
        flow = self._flows[key] = _Flow(key[0])
        return flow

    def remove(self, waiting: WaitingTicket) -> None:
        key = waiting.ticket.lane, waiting.ticket.caller
        flow = self._working[key]
        self._waiting.remove(waiting)
        flow.waiting.remove(waiting)
        if not flow.waiting:
            del self._working[key]
            self._set_kind(flow, None)
        self._touch(key, flow)

    def _set_kind(self, flow: _Flow, kind: _Kind | None) -> None:
        if kind == flow.kind:
            return
        if flow.kind is not None:
            self._kinds[flow.kind] -= 1
            if not self._kinds[flow.kind]:
                del self._kinds[flow.kind]
        if kind is not None:
            self._kinds[kind] = self._kinds.get(kind, 0) + 1
        flow.kind = kind

    def _touch(self, key: _Key, flow: _Flow) -> None:
        if self._smallest is not None and self._smallest.touches(key, flow.rows.value):
            self._smallest = None

    def charge(self, ticket: Ticket, seconds: float, now_s: float) -> None:
        """Add engine seconds to what a ticket's lane and caller used; a negative correction gives some back."""
        self._used[ticket.lane].add(seconds, now_s)
        if (flow := self._flows.get((ticket.lane, ticket.caller))) is not None:
            flow.used.add(seconds, now_s)
            if flow.waiting:
                self._most_used_s = max(self._most_used_s, flow.used.at_most)

    def load(self, now_s: float) -> float:
        """Return the fraction of the streams' recent time that was used."""
        return sum([used.at(now_s) for used in self._used.values()]) / self._capacity_s

    def typical_rows_of_others(self, ticket: Ticket, now_s: float) -> float:
        """Return the smallest mean ticket size, in rows, of others at work than its caller; infinite without any."""
        smallest = self._smallest
        if smallest is None or now_s >= smallest.until_s:
            smallest = self._smallest = _Smallest(self._flows, now_s)
        return smallest.next_rows if smallest.key == (ticket.lane, ticket.caller) else smallest.rows

    def smaller_per_s(self, ticket: Ticket, now_s: float) -> float:
        """Return how many tickets a second came recently from others whose tickets are much smaller."""
        own = ticket.lane, ticket.caller
        came = [
            flow.came.at(now_s)
            for key, flow in self._flows.items()
            if key != own and is_large(ticket.rows, flow.rows.value)
        ]
        return sum(came) / _MEMORY_S

    def ordered(self, now_s: float) -> list[WaitingTicket]:
        """Return the waiting tickets in the order to run.

        Lanes within their share go first, by priority; in each lane, callers within their share, by priority; then
        tickets by deadline.
        """
        if self._are_even(len(self._working), now_s):
            return self._waiting.copy()
        queues = self._queues(self._ranks(now_s))
        return [waiting for rank in sorted(queues) for waiting in queues[rank]]

    def around(self, ticket: Ticket, now_s: float) -> tuple[list[WaitingTicket], list[WaitingTicket]]:
        """Return the tickets that would run before a new one, and those behind it that it must not make late."""
        if self._is_even_with(ticket, now_s):
            cut = bisect_right(self._waiting, (ticket.deadline_s, ticket.number), key=_PLACE)
            return self._waiting[:cut], self._waiting[cut:]
        ranks = self._ranks(now_s, ticket)
        own, place = ranks[ticket.lane, ticket.caller], (ticket.deadline_s, ticket.number)
        queues = self._queues(ranks)
        queue = queues.pop(own, [])
        cut = bisect_right(queue, place, key=_PLACE)
        before = [waiting for rank in sorted(queues) if rank < own for waiting in queues[rank]]
        # Who is beyond a share has no claim to be in time, unless the new ticket's lane and caller are so too.
        behind = [w for rank in sorted(queues) if rank > own and rank[::2] <= own[::2] for w in queues[rank]]
        return before + queue[:cut], queue[cut:] + behind

    def _are_even(self, flows: int, now_s: float) -> bool:
        """Return whether so many flows of the kind at work all have the same rank: they mostly have.

        Then deadlines alone decide, and nobody needs to be ranked. Flows of several kinds are not even.
        """
        if flows <= 1:  # alone, nobody has a share to keep to
            return True
        if len(self._kinds) > 1:
            return False
        limit_s = self._capacity_s / flows
        if self._most_used_s > limit_s:
            self._most_used_s = max([flow.used.at(now_s) for flow in self._working.values()], default=0.0)
        return self._most_used_s <= limit_s

    def _is_even_with(self, newcomer: Ticket, now_s: float) -> bool:
        """Return whether a new ticket has the same rank as all that wait."""
        key = newcomer.lane, newcomer.caller
        flows = len(self._working)
        if key in self._working:
            return self._are_even(flows, now_s)
        flow = self._flows.get(key) or _Flow(newcomer.lane)
        flow.claim = self._callers(newcomer.caller)
        if not flows:
            return True
        return (
            _kind(flow) in self._kinds
            and self._are_even(flows + 1, now_s)
            and not flow.used.exceeds(self._capacity_s / (flows + 1), now_s)
        )

    def _ranks(self, now_s: float, newcomer: Ticket | None = None) -> dict[_Key, _Rank]:
        """Rank the flows with work, including that of a new ticket."""
        working = self._working
        if newcomer is not None and (key := (newcomer.lane, newcomer.caller)) not in working:
            flow = self._flows.get(key) or _Flow(newcomer.lane)
            flow.claim = self._callers(newcomer.caller)
            working = {**working, key: flow}
        if len(working) <= 1:  # alone, nobody has a share to keep to
            return {
                key: (False, -self._lane(flow.lane).priority, False, -flow.claim.priority)
                for key, flow in working.items()
            }
        shares, whole = _shares(working)
        of_lanes = {name: self._lane(name) for name in whole}
        capacity_s = self._capacity_s / sum([lane.share for lane in of_lanes.values()])
        #: For each lane: whether it is beyond its share, its rank, and what a caller gets of it for each unit of share.
        lanes = {
            name: (
                len(whole) > 1 and self._used[name].exceeds(lane.share * capacity_s, now_s),
                -lane.priority,
                lane.share * capacity_s / whole[name],
            )
            for name, lane in of_lanes.items()
        }
        found: dict[_Key, _Rank] = {}
        for key, flow in working.items():
            beyond, rank, unit_s = lanes[flow.lane]
            share = shares[key]
            greedy = share < whole[flow.lane] and flow.used.exceeds(unit_s * share, now_s)
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


def _kind(flow: _Flow) -> _Kind:
    claim = flow.claim
    return flow.lane, claim.priority, claim.share, claim.group


def _shares(flows: Mapping[_Key, _Flow]) -> tuple[dict[_Key, float], dict[str, float]]:
    """Return the share of each flow, and the sum of each lane's flows; a group's callers in a lane divide theirs."""
    members: dict[tuple[str, str], int] = {}
    for flow in flows.values():
        if group := flow.claim.group:
            members[flow.lane, group] = members.get((flow.lane, group), 0) + 1
    shares: dict[_Key, float] = {}
    whole: dict[str, float] = {}
    for key, flow in flows.items():
        claim, lane = flow.claim, flow.lane
        share = shares[key] = claim.share / members[lane, claim.group] if claim.group else claim.share
        whole[lane] = whole.get(lane, 0.0) + share
    return shares, whole
