"""Who may come in: decided on arrival, before any work is spent, by what is in flight and when the answer would be."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

from server.scheduling.contract import BatchPolicy, Forecast, Ticket


@dataclass(frozen=True, slots=True)
class Ask:
    """A request on arrival.

    Attributes:
        surface: whose lane and overload policy apply.
        rows: candidates.
        bytes: estimated memory that it will hold.
        deadline_s: when its scores must be there.
        model: what it asks for.
        cheaper: what may answer instead, if anything may.
    """

    surface: str
    rows: int
    bytes: int
    deadline_s: float
    model: Hashable
    cheaper: Hashable | None


@dataclass(frozen=True, slots=True)
class Overload:
    """What may be done to a surface's request that would be late, in this order, before it is refused."""

    actions: tuple[Literal["trim", "cheaper"], ...] = ()
    trim_rows_min: int = 32


@dataclass(frozen=True, slots=True)
class Admit:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Trim:
    """Only the first `ticket.rows` candidates fit."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class UseCheaper:
    """The cheaper model answers: `ticket.model`."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Refuse:
    """Refused before any work was spent on it."""

    reason: str
    retry_after_s: float


Decision = Admit | Trim | UseCheaper | Refuse


class Admission:
    """Bounds what is in flight and keeps promises. Pure: `offer` takes a place, `release` gives it back."""

    def __init__(
        self, policy: BatchPolicy, overload: Mapping[str, Overload], requests_max: int, rows_max: int, bytes_max: int
    ) -> None:
        self._policy = policy
        self._overload = overload
        self._requests_max = requests_max
        self._rows_max = rows_max
        self._bytes_max = bytes_max
        self._numbers = itertools.count()
        self.requests = 0
        self.rows = 0
        self.bytes = 0

    def offer(self, ask: Ask, now_s: float) -> Decision:
        """Take a place for a request, as it is or as its surface's overload policy allows, or refuse it."""
        ticket = Ticket(next(self._numbers), ask.rows, ask.deadline_s, ask.model, ask.surface)
        forecast = self._policy.forecast(ticket, now_s)
        full = self._full(ask)
        if full is not None:
            return Refuse(full, max(0.0, forecast.finish_s - now_s))
        if _fits(forecast, ask):
            return self._take(Admit(ticket), ask, now_s)
        for action in self._overload.get(ask.surface, Overload()).actions:
            match action:
                case "trim":
                    rows = self._rows_that_fit(ask, ticket.number, now_s)
                    if rows:
                        return self._take(Trim(_of(ask, ticket.number, rows, ask.model)), ask, now_s)
                case "cheaper" if ask.cheaper is not None:
                    other = _of(ask, ticket.number, ask.rows, ask.cheaper)
                    if _fits(self._policy.forecast(other, now_s), ask):
                        return self._take(UseCheaper(other), ask, now_s)
        # Alone, it is tried: a prediction that nothing contradicts would otherwise stay wrong for ever.
        if not self.requests:
            return self._take(Admit(ticket), ask, now_s)
        late_s = forecast.finish_s - ask.deadline_s
        reason = (
            f"the answer would come {late_s * 1e3:.1f} ms after the deadline"
            if late_s > 0
            else f"it would make {forecast.harms} requests late that were here before"
        )
        return Refuse(f"{reason}; {self.requests} requests are in flight", max(late_s, 0.001))

    def release(self, ticket: Ticket, size: int) -> None:
        """Give a place back, whatever became of the request.

        Args:
            ticket: of the decision.
            size: the ask's bytes.
        """
        self.requests -= 1
        self.rows -= ticket.rows
        self.bytes -= size

    def _full(self, ask: Ask) -> str | None:
        """Say which limit is reached. One request alone may exceed any: it would otherwise be refused for ever."""
        if not self.requests:
            return None
        if self.requests >= self._requests_max:
            return f"{self.requests} requests in flight, the limit is {self._requests_max}"
        if self.rows + ask.rows > self._rows_max:
            return f"{self.rows} rows in flight and {ask.rows} more asked, the limit is {self._rows_max}"
        if self.bytes + ask.bytes > self._bytes_max:
            return f"{self.bytes} bytes in flight and {ask.bytes} more needed, the limit is {self._bytes_max}"
        return None

    def _rows_that_fit(self, ask: Ask, number: int, now_s: float) -> int:
        """Return the most rows, fewer than asked, that meet the deadline and harm none; 0 where too few do."""
        low, high = 0, ask.rows - 1
        least = min(self._overload[ask.surface].trim_rows_min, ask.rows)
        # To within a sixteenth: a finer answer costs time and gains little.
        while high - low > ask.rows >> 4 if low else high >= least:
            middle = max(least, (low + high + 1) // 2)
            if _fits(self._policy.forecast(_of(ask, number, middle, ask.model), now_s), ask):
                low = middle
            else:
                high = middle - 1
        return low

    def _take(self, decision: Admit | Trim | UseCheaper, ask: Ask, now_s: float) -> Decision:
        self._policy.reserve(decision.ticket, now_s)
        self.requests += 1
        self.rows += decision.ticket.rows
        self.bytes += ask.bytes
        return decision


def _of(ask: Ask, number: int, rows: int, model: Hashable) -> Ticket:
    return Ticket(number, rows, ask.deadline_s, model, ask.surface)


def _fits(forecast: Forecast, ask: Ask) -> bool:
    return forecast.finish_s <= ask.deadline_s and not forecast.harms
