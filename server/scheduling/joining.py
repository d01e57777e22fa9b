"""What joins a run, and whether to wait for more of it. Pure: decided by comparing predicted seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable

from feature_client.estimates import DecayingMean
from server.scheduling.contract import Ticket
from server.scheduling.cost import CostModel
from server.scheduling.lanes import WaitingTicket

#: The weight of a model's latest ticket in how often they come and how large they are.
_ARRIVAL_WEIGHT = 0.1
#: How many typical gaps between tickets a ticket waits for the next one.
_GAPS_WAITED = 2
#: Tickets at the same moment are taken to be this far apart.
_GAP_S_MIN = 1e-6


class Arrivals:
    """How often tickets of one model come, and how large they are."""

    def __init__(self) -> None:
        self._gap = DecayingMean(_ARRIVAL_WEIGHT)
        self._rows = DecayingMean(_ARRIVAL_WEIGHT)
        self._last_s: float | None = None

    @property
    def gap_s(self) -> float:
        """Seconds from one ticket to the next; infinite before there were two."""
        return math.inf if math.isnan(self._gap.value) else self._gap.value

    @property
    def rows(self) -> int:
        """Rows of a typical ticket."""
        return round(self._rows.value)

    def observe(self, ticket: Ticket, now_s: float) -> None:
        if self._last_s is not None:
            self._gap.observe(max(_GAP_S_MIN, now_s - self._last_s))
        self._last_s = now_s
        self._rows.observe(ticket.rows)


def joiners(
    head: WaitingTicket, candidates: Iterable[WaitingTicket], behind: int, cost: CostModel, now_s: float
) -> list[WaitingTicket]:
    """Return which tickets join a run, as long as that saves more time than it costs those in it.

    Args:
        head: the ticket whose run it is.
        candidates: those of its model that may join, in order, beginning with the first that waits behind it.
        behind: how many tickets wait behind the head, candidates or not: all of them gain what joining saves.
        cost: of the model.
        now_s: when the run starts.
    """
    joined: list[WaitingTicket] = []
    rows, deadline_s = head.rows, head.ticket.deadline_s
    for requests, other in enumerate(candidates, start=1):
        added_s = cost.predict_s(requests + 1, rows + other.rows) - cost.predict_s(requests, rows)
        saved_s = cost.predict_s(1, other.rows) - added_s
        if requests * added_s > saved_s * (behind - len(joined)):
            break
        deadline_s = min(deadline_s, other.ticket.deadline_s)
        if now_s + cost.finish_s(requests + 1, rows + other.rows) > deadline_s:
            break
        joined.append(other)
        rows += other.rows
    return joined


def worth_waiting_until_s(head: WaitingTicket, arrivals: Arrivals, cost: CostModel, now_s: float) -> float:
    """Return until when a ticket should wait for a further one to join it: `now_s` or earlier where it should not."""
    other = arrivals.rows
    saved_s = cost.predict_s(1, head.rows) + cost.predict_s(1, other) - cost.predict_s(2, head.rows + other)
    if arrivals.gap_s >= saved_s:
        return now_s
    latest_s = head.ticket.deadline_s - cost.finish_s(2, head.rows + other)
    return min(now_s + _GAPS_WAITED * arrivals.gap_s, latest_s)
