"""Which tickets run next: a pure policy behind `offer`, `cancel` and `next`; the runner asks and acts."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request waiting for an engine.

    Attributes:
        number: unique; ties between deadlines go to the lower one.
        rows: candidates to score.
        deadline_s: when the answer is worthless, on the clock of `next`.
        model: the model version it was admitted for; a run never mixes two.
        cost_s: predicted seconds of a run of its own, 0 when unknown.
    """

    number: int
    rows: int
    deadline_s: float
    model: Hashable
    cost_s: float = 0.0

    def late_at(self, now_s: float) -> bool:
        """Tell whether a run that starts now is predicted to end after the deadline."""
        return self.deadline_s - self.cost_s <= now_s


@dataclass(frozen=True, slots=True)
class Run:
    """Score these together now."""

    tickets: tuple[Ticket, ...]


@dataclass(frozen=True, slots=True)
class Expire:
    """They can no longer be scored in time; answer them without scoring."""

    tickets: tuple[Ticket, ...]


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Ask again at `time_s`, or when a ticket is offered."""

    time_s: float


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing waits; ask again when a ticket is offered."""


class BatchPolicy(Protocol):
    """Each offered ticket comes back exactly once, in a Run or an Expire, unless it is cancelled first."""

    def offer(self, ticket: Ticket) -> None: ...

    def cancel(self, ticket: Ticket) -> None:
        """Forget a waiting ticket; one that has already come back is ignored."""

    def next(self, now_s: float) -> Run | Expire | WaitUntil | Idle: ...


_FORGOTTEN_MAX = 64


class EarliestDeadlineFirst:
    """The earliest deadline runs first, joined by the next ones of its model while they fit `rows_target` rows.

    What would end after its deadline expires unscored, so that overload costs some requests and not all of them; but a
    prediction may be wrong, and a ticket that nothing else waits behind is tried as long as its deadline is ahead. It
    never waits: where an engine's row costs the same in any batch, waiting for a bigger one only adds delay.
    """

    def __init__(self, rows_target: int) -> None:
        self._rows_target = rows_target
        self._heap: list[tuple[float, int, Ticket]] = []
        self._waiting: set[int] = set()

    def offer(self, ticket: Ticket) -> None:
        if ticket.number in self._waiting:
            raise ValueError(f"ticket {ticket.number} is already waiting")
        heapq.heappush(self._heap, (ticket.deadline_s, ticket.number, ticket))
        self._waiting.add(ticket.number)

    def cancel(self, ticket: Ticket) -> None:
        # The heap forgets it when it comes to the top, or at the latest when most of it is of this kind.
        self._waiting.discard(ticket.number)
        if len(self._heap) > 2 * len(self._waiting) + _FORGOTTEN_MAX:
            self._heap = [entry for entry in self._heap if entry[1] in self._waiting]
            heapq.heapify(self._heap)

    def next(self, now_s: float) -> Run | Expire | WaitUntil | Idle:
        expired: list[Ticket] = []
        while (head := self._peek()) is not None and head.late_at(now_s):
            self._pop()
            if not expired and self._peek() is None and now_s < head.deadline_s:
                return Run((head,))
            expired.append(head)
        if expired:
            return Expire(tuple(expired))
        if head is None:
            return Idle()
        taken = [self._pop()]
        rows = head.rows
        while (head := self._peek()) is not None:
            if head.model != taken[0].model or rows + head.rows > self._rows_target or head.late_at(now_s):
                break
            rows += head.rows
            taken.append(self._pop())
        return Run(tuple(taken))

    def _peek(self) -> Ticket | None:
        while self._heap and self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def _pop(self) -> Ticket:
        ticket = heapq.heappop(self._heap)[2]
        self._waiting.remove(ticket.number)
        return ticket
