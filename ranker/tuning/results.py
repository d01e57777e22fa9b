"""What tuning found, as values: for the console, the report, and the table that it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ranker.evaluation.bootstrap import Estimate
from ranker.tuning.thetas import Theta

#: Significant digits of tuned weights and thetas, as they are written into the table.
DIGITS = 6

Role = Literal["maximised", "constrained", "kept"]


def rounded(value: float, side: Callable[[float], float]) -> float:
    """Round to `DIGITS` significant digits, down by `np.floor` or up by `np.ceil`."""
    if abs(value) < 1e-300:
        return 0.0
    unit = 10.0 ** (np.floor(np.log10(abs(value))) - DIGITS + 1)
    close = round(value / unit)  # a value that has few digits already stays as it is
    return float(f"{(close if abs(value / unit - close) < 1e-6 else side(value / unit)) * unit:.{DIGITS}g}")


@dataclass(frozen=True, slots=True)
class PartyOutcome:
    """What tuning changes for one party, on the requests that the weights were tuned on.

    Attributes:
        party: its name.
        role: a kept party is neither maximised nor constrained.
        weight_before: its weight in force.
        weight_after: its tuned weight.
        before: mean value per request by the weights in force.
        after: mean value per request by the tuned weights.
        change_percent: of the value, in percent of its absolute value before.
        asked: the theta as it was asked for; None unless constrained.
        theta: the same as a value.
        multiplier: the exchange rate: how much of the objective one more unit for this party costs.
    """

    party: str
    role: Role
    weight_before: float
    weight_after: float
    before: Estimate
    after: Estimate
    change_percent: Estimate
    asked: Theta | None = None
    theta: float | None = None
    multiplier: float | None = None

    @property
    def binding(self) -> bool:
        """Whether the theta costs the objective anything."""
        return bool(self.multiplier)


@dataclass(frozen=True, slots=True)
class HeldOutCheck:
    """One constraint on the requests of users that tuning did not see.

    Attributes:
        party: its name.
        theta: its theta there: a relative one follows from what the weights in force give there.
        value: what it gets there.
        standard_error: of `value - theta`, over users.
    """

    party: str
    theta: float
    value: float
    standard_error: float

    @property
    def shortfall(self) -> float:
        return max(0.0, self.theta - self.value)

    @property
    def holds(self) -> bool:
        """Whether it is met within 1% and two standard errors: the users held out are a sample as well."""
        return self.shortfall <= 0.01 * abs(self.theta) + 2 * self.standard_error


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One point of a Pareto front: a theta, and the most that the objective can be with it."""

    theta: float
    objective: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """The result.

    Attributes:
        parties: in the order of the utility table.
        requests: how many requests the weights were tuned on.
        users: of these requests.
        held_out: checks on the requests of other users.
        held_out_requests: their number.
        held_out_users: their number.
        before: the objective per request by the weights in force.
        bound: no orders that meet the thetas are worth more.
        reached: what the best mixture of orders is worth that the solver found; `bound - reached` is its gap.
        deployed: what the tuned weights are worth, with one order per request as servers give it.
        met: whether the tuned weights meet every theta on the requests that they were tuned on.
        orders: how many orders of all requests were valued.
        fronts: by constrained party, thetas and objectives, from free to the most that is attainable.
    """

    parties: tuple[PartyOutcome, ...]
    requests: int
    users: int
    held_out: tuple[HeldOutCheck, ...]
    held_out_requests: int
    held_out_users: int
    before: float
    bound: float
    reached: float
    deployed: float
    met: bool
    orders: int
    fronts: dict[str, tuple[FrontPoint, ...]]

    @property
    def gap(self) -> float:
        """The solver's gap, as a share of the bound."""
        return max(0.0, self.bound - self.reached) / max(abs(self.bound), 1e-300)

    @property
    def lost_to_one_order(self) -> float:
        """What one weight vector loses against the bound, which mixtures of orders may reach; a share of the bound."""
        return max(0.0, self.bound - self.deployed) / max(abs(self.bound), 1e-300)

    @property
    def weights(self) -> np.ndarray:
        """float64[P]."""
        return np.array([party.weight_after for party in self.parties])

    @property
    def thetas(self) -> dict[str, float]:
        return {party.party: party.theta for party in self.parties if party.theta is not None}


@dataclass(frozen=True, slots=True)
class Attainable:
    """What one constrained party could get, where no orders meet all thetas.

    Attributes:
        theta: what was asked for it.
        present: what the weights in force give it.
        alone: the most that it could get if nothing else counted.
        together: what it gets where the largest shortfall of any party is smallest.
    """

    party: str
    theta: float
    present: float
    alone: float
    together: float


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No orders of these requests meet all thetas."""

    parties: tuple[Attainable, ...]

    def __str__(self) -> str:
        beyond = [p for p in self.parties if p.theta > p.alone]
        told = [f"{p.party} must get {p.theta:.9g}, but can get at most {_down(p.alone)} in any order" for p in beyond]
        if not beyond:
            told = ["each theta can be met alone, but not all of them together"]
        together = ", ".join(f"{p.party}={_down(p.together)}" for p in self.parties)
        alone = ", ".join(f"{p.party}={_down(p.alone)}" for p in self.parties)
        present = ", ".join(f"{p.party}={p.present:.6g}" for p in self.parties)
        return (
            f"no orders meet these thetas: {'; '.join(told)}. The weights in force give {present}. The most for each "
            f"party alone: {alone}. The set with the smallest shortfall: {together}. Lower the thetas to at most that"
        )


def _down(value: float) -> str:
    """Write what is attainable so that it still is when it is asked for."""
    return f"{rounded(value, np.floor):.{DIGITS}g}"
