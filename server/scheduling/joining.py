"""Decides which tickets join a run, and whether to wait for another, by comparing predicted seconds. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from feature_client.estimates import DecayingMean
from server.scheduling.contract import Ticket
from server.scheduling.cost import CostModel
from server.scheduling.lanes import WaitingTicket

#: Weight of a model's latest ticket in its mean interval and mean size.
_ARRIVAL_WEIGHT = 0.1
#: A ticket waits for the next one for at most this many mean intervals.
_GAPS_WAITED = 2
#: Smallest interval that is recorded, for tickets that arrive at the same time.
_GAP_S_MIN = 1e-6


class Arrivals:
    """The mean interval and size of one model's tickets."""

    def __init__(self) -> None:
        self._gap = DecayingMean(_ARRIVAL_WEIGHT)
        self._rows = DecayingMean(_ARRIVAL_WEIGHT)
        self._last_s: float | None = None

    @property
    def gap_s(self) -> float:
        """Mean seconds between tickets; infinite before the second one."""
        return math.inf if math.isnan(self._gap.value) else self._gap.value

    @property
    def rows(self) -> int:
        """Mean rows of a ticket."""
        return round(self._rows.value)

    def observe(self, ticket: Ticket, now_s: float) -> None:
        if self._last_s is not None:
            self._gap.observe(max(_GAP_S_MIN, now_s - self._last_s))
        self._last_s = now_s
        self._rows.observe(ticket.rows)


def joiners(
    head: WaitingTicket, candidates: Iterable[WaitingTicket], behind: int, cost: CostModel, now_s: float
) -> list[WaitingTicket]:
    """Return the tickets that join a run; each must save more time than it costs the tickets in the run.

    Args:
        head: the first ticket of the run.
        candidates: tickets of the same model that may join, in the order in which they wait.
        behind: number of tickets behind the head, candidates or not; all of them gain the time that joining saves.
        cost: cost model of the model.
        now_s: start of the run.
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
    """Return until when a ticket should wait for another one to join it; `now_s` or earlier if it should not wait."""
    other = arrivals.rows
    saved_s = cost.predict_s(1, head.rows) + cost.predict_s(1, other) - cost.predict_s(2, head.rows + other)
    if arrivals.gap_s >= saved_s:
        return now_s
    latest_s = head.ticket.deadline_s - cost.finish_s(2, head.rows + other)
    return min(now_s + _GAPS_WAITED * arrivals.gap_s, latest_s)
