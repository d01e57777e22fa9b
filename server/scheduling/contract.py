"""What is asked of a batch policy, and what it may answer; the runner asks and acts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request that wants rows scored.

    Attributes:
        number: unique; ties between deadlines go to the lower one.
        rows: candidates to score.
        deadline_s: when the scores are worthless, on the clock of `next`.
        model: the model version it was admitted for; a run never mixes two.
        lane: whose share of the engine it uses.
    """

    number: int
    rows: int
    deadline_s: float
    model: Hashable
    lane: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start:stop of a ticket."""

    ticket: Ticket
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Score these together now; a stream is taken until `finished`."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Expire:
    """They can no longer be scored in time; answer them without scoring."""

    tickets: tuple[Ticket, ...]


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Ask again at `time_s`, or when something changed."""

    time_s: float


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing can start; ask again when something changed."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What would become of a ticket that is admitted now.

    Attributes:
        finish_s: when its scores are predicted to be there.
        harms: how many tickets admitted before would miss a deadline that they meet without it.
    """

    finish_s: float
    harms: int


class BatchPolicy(Protocol):
    """Each offered ticket's rows come back exactly once, in Runs, unless it comes back in an Expire or is cancelled."""

    def reserve(self, ticket: Ticket, now_s: float) -> None:
        """Count a ticket whose features are still being read in forecasts."""

    def offer(self, ticket: Ticket, now_s: float) -> None:
        """Let a ticket run, reserved before or not."""

    def cancel(self, ticket: Ticket) -> None:
        """Forget what of a ticket has not come back; one that is not known is ignored."""

    def next(self, now_s: float) -> Run | Expire | WaitUntil | Idle:
        """Decide; never more Runs are out than there are streams."""

    def finished(self, run: Run, now_s: float) -> None:
        """Note that a run's stream is free again."""

    def forecast(self, ticket: Ticket, now_s: float) -> Forecast:
        """Predict what would become of a ticket."""

    def forget(self, model: Hashable) -> None:
        """Drop what was learned of a model that gets no more tickets."""
