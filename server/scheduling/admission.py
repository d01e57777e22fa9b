"""Admits, degrades or refuses each request on arrival, by what is in flight and its predicted finish. Pure."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from server.scheduling.contract import BatchPolicy, Forecast, Ticket


class Ask(NamedTuple):
    """A request on arrival.

    Attributes:
        surface: its surface, which selects the lane and the overload policy.
        rows: number of candidates.
        bytes: estimate of the memory that it will use.
        deadline_s: latest time for its scores.
        model: the model version that it asks for.
        cheaper: the model version that may answer instead; None if there is none.
        caller: who asks; empty for the server itself.
    """

    surface: str
    rows: int
    bytes: int
    deadline_s: float
    model: Hashable
    cheaper: Hashable | None
    caller: str = ""


#: A caller that others called beside less than this long ago holds no more of the limits than is free.
_BESIDE_S = 10.0


@dataclass(frozen=True, slots=True)
class Overload:
    """What a surface allows for requests that would be late: these actions are tried in order before a refusal."""

    actions: tuple[Literal["trim", "cheaper"], ...] = ()
    trim_rows_min: int = 32


_REFUSE = Overload()


@dataclass(frozen=True, slots=True)
class Admit:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Trim:
    """Admitted with only the first `ticket.rows` candidates."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class UseCheaper:
    """Admitted for the cheaper model, `ticket.model`."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Refuse:
    """Refused before any work was done."""

    reason: str
    retry_after_s: float


Decision = Admit | Trim | UseCheaper | Refuse


@dataclass(slots=True)
class _InFlight:
    """What is in flight: in total, or of one caller."""

    requests: int = 0
    rows: int = 0
    bytes: int = 0

    def add(self, requests: int, rows: int, size: int) -> None:
        self.requests += requests
        self.rows += rows
        self.bytes += size


class Admission:
    """Limits what is in flight. Pure: `offer` takes a place for an admitted request, `release` frees it."""

    def __init__(
        self, policy: BatchPolicy, overload: Mapping[str, Overload], requests_max: int, rows_max: int, bytes_max: int
    ) -> None:
        self._policy = policy
        self._overload = overload
        self._requests_max = requests_max
        self._rows_max = rows_max
        self._bytes_max = bytes_max
        self._numbers = itertools.count()
        self._all = _InFlight()
        self._of_callers = defaultdict[str, _InFlight](_InFlight)
        self._newest_caller, self._newest_s = "", -math.inf
        #: When another caller than the newest one came last.
        self._other_s = -math.inf
        #: Predicted time of the scores of the request that was judged last.
        self.finish_s = -math.inf

    @property
    def requests(self) -> int:
        """Number of requests in flight."""
        return self._all.requests

    @property
    def rows(self) -> int:
        """Number of their candidates."""
        return self._all.rows

    @property
    def bytes(self) -> int:
        """Estimate of their memory."""
        return self._all.bytes

    def refusal_of_any(self, now_s: float, deadline_s: float) -> Refuse | None:
        """Return the refusal that every request with this deadline would get; None if it depends on the request."""
        if not self.requests:
            return None
        free_in_s = self._policy.free_in_s(now_s)
        late_s = now_s + free_in_s - deadline_s
        if self.requests >= self._requests_max:
            return Refuse(self._too_many(), free_in_s)
        if late_s > 0:
            return Refuse(self._too_late(late_s), late_s)
        return None

    def offer(self, ask: Ask, now_s: float) -> Decision:
        """Admit a request, whole or degraded as its surface's overload policy allows, or refuse it."""
        ticket = _of(ask, next(self._numbers), ask.rows, ask.model)
        self._note(ask.caller, now_s)
        actions = self._overload.get(ask.surface, _REFUSE).actions
        # Try it if nothing else is in flight: otherwise a wrong prediction would never be corrected.
        if not self.requests and not actions:
            return self._take(Admit(ticket), ask, now_s)
        forecast = self._policy.forecast(ticket, now_s)
        self.finish_s = forecast.finish_s
        full = self._full(ask) or self._more_than_is_free(ask, now_s)
        if full is not None:
            return Refuse(full, max(0.0, forecast.finish_s - now_s))
        if _fits(forecast, ask):
            return self._take(Admit(ticket), ask, now_s)
        for action in actions:
            if degraded := self._degraded(action, ask, ticket, now_s):
                return self._take(degraded, ask, now_s)
        if not self.requests:
            return self._take(Admit(ticket), ask, now_s)
        late_s = forecast.finish_s - ask.deadline_s
        if late_s > 0:
            return Refuse(self._too_late(late_s), max(late_s, 0.001))
        return Refuse(
            f"it would make {forecast.harms} earlier requests late; {self.requests} requests are in flight", 0.001
        )

    def _degraded(
        self, action: Literal["trim", "cheaper"], ask: Ask, ticket: Ticket, now_s: float
    ) -> Trim | UseCheaper | None:
        """Return how an action would let a request be in time, or None if it would not."""
        if action == "trim":
            rows = self._rows_that_fit(ask, ticket.number, now_s)
            return Trim(_of(ask, ticket.number, rows, ask.model)) if rows else None
        if ask.cheaper is None:
            return None
        other = _of(ask, ticket.number, ask.rows, ask.cheaper)
        return UseCheaper(other) if _fits(self._policy.forecast(other, now_s), ask) else None

    def release(self, ticket: Ticket, size: int) -> None:
        """Free the place of a request, however it ended.

        Args:
            ticket: the decision's ticket.
            size: `bytes` of the ask.
        """
        self._all.add(-1, -ticket.rows, -size)
        held = self._of_callers[ticket.caller]
        held.add(-1, -ticket.rows, -size)
        if not held.requests:
            del self._of_callers[ticket.caller]

    def _full(self, ask: Ask) -> str | None:
        """Return which limit a request would exceed, or None. One alone may exceed any, or it could never run."""
        if not self.requests:
            return None
        if self.requests >= self._requests_max:
            return self._too_many()
        if self.rows + ask.rows > self._rows_max:
            return f"{self.rows} rows are in flight and the request has {ask.rows}, but the limit is {self._rows_max}"
        if self.bytes + ask.bytes > self._bytes_max:
            return (
                f"{self.bytes} bytes are in use and the request needs {ask.bytes}, but the limit is {self._bytes_max}"
            )
        return None

    def _note(self, caller: str, now_s: float) -> None:
        if not caller:
            return
        if caller != self._newest_caller:
            self._newest_caller, self._other_s = caller, self._newest_s
        self._newest_s = now_s

    def _more_than_is_free(self, ask: Ask, now_s: float) -> str | None:
        """Return what a caller would hold more of than is left to others, or None if nobody else called recently.

        So one caller fills at most half of a limit and two a third each, and a newcomer always finds room (Choudhury
        and Hahne, "Dynamic queue length thresholds", 1998). Without it, deadlines of half a minute would buy it all.
        """
        held = self._of_callers.get(ask.caller)
        if held is None or not ask.caller or now_s - self._other_s >= _BESIDE_S:
            return None
        for unit, own, used, most in (
            ("requests", held.requests + 1, self.requests, self._requests_max),
            ("rows", held.rows + ask.rows, self.rows, self._rows_max),
            ("bytes", held.bytes + ask.bytes, self.bytes, self._bytes_max),
        ):
            if own > most - used:
                return (
                    f"this caller would have {own} {unit} in flight, but others call too, and only {most - used} of "
                    f"{most} are free; no caller may hold more than is free"
                )
        return None

    def _too_many(self) -> str:
        return f"{self.requests} requests are in flight, and the limit is {self._requests_max}"

    def _too_late(self, late_s: float) -> str:
        return (
            f"the answer would arrive {late_s * 1e3:.1f} ms after the deadline; {self.requests} requests are in flight"
        )

    def _rows_that_fit(self, ask: Ask, number: int, now_s: float) -> int:
        """Return the most rows, fewer than asked, that meet the deadline and make no request late; 0 if too few do."""
        low, high = 0, ask.rows - 1
        least = min(self._overload[ask.surface].trim_rows_min, ask.rows)
        # Search to within a sixteenth of the rows; a finer search costs time and gains little.
        while high - low > ask.rows >> 4 if low else high >= least:
            middle = max(least, (low + high + 1) // 2)
            if _fits(self._policy.forecast(_of(ask, number, middle, ask.model), now_s), ask):
                low = middle
            else:
                high = middle - 1
        return low

    def _take(self, decision: Admit | Trim | UseCheaper, ask: Ask, now_s: float) -> Decision:
        self._policy.reserve(decision.ticket, now_s)
        for some in (self._all, self._of_callers[ask.caller]):
            some.add(1, decision.ticket.rows, ask.bytes)
        return decision


def _of(ask: Ask, number: int, rows: int, model: Hashable) -> Ticket:
    return Ticket(number, rows, ask.deadline_s, model, ask.surface, ask.caller)


def _fits(forecast: Forecast, ask: Ask) -> bool:
    return forecast.finish_s <= ask.deadline_s and not forecast.harms
