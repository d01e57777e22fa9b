"""The interface between the runner and a batch policy: the policy decides, the runner acts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Ticket(NamedTuple):
    """One request's rows to score.

    Attributes:
        number: unique; of equal deadlines, the lower number goes first.
        rows: number of candidates to score.
        deadline_s: latest useful time of the scores, on the clock of `next`.
        model: the model version that it was admitted for; a run never mixes two versions.
        lane: the lane whose share of the engine it uses.
        caller: who asked; callers have shares of their lane. Empty for the server itself.
    """

    number: int
    rows: int
    deadline_s: float
    model: Hashable
    lane: str
    caller: str = ""


class Piece(NamedTuple):
    """The rows start:stop of a ticket."""

    ticket: Ticket
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Score these pieces together now; the run occupies a stream until `finished` is called."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Expire:
    """These tickets can no longer be scored in time; answer them without scores."""

    tickets: tuple[Ticket, ...]


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Ask again at `time_s`, or when something changes."""

    time_s: float


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing can start; ask again when something changes."""


class Forecast(NamedTuple):
    """The predicted effects of admitting a ticket now.

    Attributes:
        finish_s: predicted time of its scores.
        harms: number of earlier tickets that would miss deadlines that they would meet without it.
    """

    finish_s: float
    harms: int


class BatchPolicy(Protocol):
    """Decides what runs when. Each row of an offered ticket gets one Run, unless the ticket expires or is cancelled."""

    def reserve(self, ticket: Ticket, now_s: float) -> None:
        """Include a ticket in forecasts while its features are still being read."""

    def offer(self, ticket: Ticket, now_s: float) -> None:
        """Allow a ticket to run, whether or not it was reserved before."""

    def cancel(self, ticket: Ticket) -> None:
        """Drop the rows of a ticket that are in no run yet; unknown tickets are ignored."""

    def next(self, now_s: float) -> Run | Expire | WaitUntil | Idle:
        """Return the next decision. There are never more unfinished Runs than streams."""

    def finished(self, run: Run, now_s: float) -> None:
        """Record that a run has ended and its stream is free."""

    def forecast(self, ticket: Ticket, now_s: float) -> Forecast:
        """Predict when a ticket would finish, and which others it would make late."""

    def free_in_s(self, now_s: float) -> float:
        """Predict the seconds until a stream is free; 0 if one is."""

    def forget(self, model: Hashable) -> None:
        """Drop what was learned about a model that gets no more tickets."""
