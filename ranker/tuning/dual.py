"""The dual of constrained ranking, solved by cutting planes.

Maximise the mean over requests of V0(order) subject to V_p(order) >= theta_p on average, for each constrained party p.
With multipliers w >= 0, the dual function is

    g(w) = mean over requests of max over orders of (V0 + w.V)(order) - w.theta

which is convex and piecewise linear, and bounds the constrained maximum from above for every w. Its inner maximum is
the order by u0 + w.u, because discounts fall with the position (rearrangement inequality). Each such order adds a cut,
a plane below g. The lowest point of all cuts is the next w, and by linear programming duality its height is what the
best mixture of the orders found so far is worth. So both bounds are known at every step, and their difference is the
gap.

J. E. Kelley, "The cutting-plane method for solving convex programs", 1960. The in-out choice of the next point, which
damps its jumps: W. Ben-Ameur and J. Neto, "Acceleration of cutting-plane and column generation algorithms", 2007.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linprog

from ranker.errors import RankerError

#: The gap, as a share of the values' scale, at which the search ends, and the most orders that it tries.
GAP_MAX = 1e-9
_CUTS_MAX = 600
#: How far the next point lies from the best one towards the lowest point of the cuts.
_STEP = 0.6
#: So many ranges beyond what a party can get at most, a theta is as far as any.
_BEYOND_MAX = 1e6
_LP_OPTIONS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


class SolverError(RankerError):
    """The linear program of the cuts could not be solved."""


@dataclass(frozen=True, slots=True)
class Optimum:
    """The solution for one set of thetas.

    Attributes:
        multipliers: float64[C], of the constrained parties.
        bound: no orders that meet the thetas are worth more: the dual's value.
        reached: what the best mixture of orders that meets the thetas is worth.
        values: float64[C], what the constrained parties get from that mixture.
    """

    multipliers: np.ndarray
    bound: float
    reached: float
    values: np.ndarray

    @property
    def gap(self) -> float:
        return max(0.0, self.bound - self.reached)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """No orders meet the thetas.

    Attributes:
        alone: float64[C], the most that each party could get if nothing else counted.
        together: float64[C], what the parties get where the largest shortfall is smallest. Shortfalls are compared as
            shares of each party's range, from its worst order to its best.
    """

    alone: np.ndarray
    together: np.ndarray


@dataclass(slots=True)
class Dual:
    """Solves for any thetas, and reuses what it has learned: cuts hold the values of orders, which no theta changes.

    Attributes:
        best: returns float64[1 + C], the mean value of the best orders by given weights, float64[1 + C], to the
            objective (first) and to the C constrained parties.
        constrained: C.
    """

    best: Callable[[np.ndarray], np.ndarray]
    constrained: int
    _values: list[np.ndarray] = field(init=False)
    _scale: np.ndarray = field(init=False)
    #: float64[C], the most and the least that each party can get.
    most: np.ndarray = field(init=False)
    least: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        unit = np.eye(1 + self.constrained)
        self._values = [self.best(direction) for direction in unit]
        least = np.array([self.best(-direction)[i] for i, direction in enumerate(unit)])
        top = np.array([values[i] for i, values in enumerate(self._values)])
        self.most, self.least = top[1:], least[1:]
        # Values are divided by their ranges, so that the programs' tolerances mean the same for every party.
        self._scale = np.where(top - least > 1e-12 * np.maximum(abs(top), 1e-300), top - least, np.maximum(abs(top), 1))

    @property
    def tried(self) -> int:
        """How many orders have been valued."""
        return len(self._values)

    def solve(self, thetas: np.ndarray, gap_max: float = GAP_MAX) -> Optimum | Shortfall:
        """Find the multipliers for these thetas, float64[C], to a gap of `gap_max` of the objective's range."""
        # Thetas far from what orders can give say no more than nearer ones, and the programs cannot hold 1e300.
        scale = self._scale[1:]
        thetas = np.clip(thetas, self.least - scale, self.most + _BEYOND_MAX * scale)
        slack, together = self._smallest_slack(thetas)
        if slack < -GAP_MAX:
            return Shortfall(self.most, together)
        # At the edge of what is possible, the programs' own rounding must not make it impossible.
        thetas = thetas - max(0.0, GAP_MAX - slack) * self._scale[1:]
        kept, upper, lower = np.zeros(self.constrained), float(self._values[0][0] / self._scale[0]), -np.inf
        for _ in range(_CUTS_MAX):
            lowest, lower, values = self._lowest_of_cuts(thetas)
            if upper - lower <= gap_max:
                break
            for point in (kept + _STEP * (lowest - kept), lowest):
                plane = self._cut(point, thetas)
                height = float(plane[0] + point @ plane[1:])
                if height < upper:
                    kept, upper = point, height
                if plane[0] + lowest @ plane[1:] > lower + gap_max:  # it cuts off the lowest point: go on from the next
                    break
        unit = self._scale[0]
        return Optimum(kept * unit / self._scale[1:], float(upper * unit), float(lower * unit), values)

    def most_beside(self, place: int, thetas: np.ndarray) -> float:
        """Return the most that one party can get while the others get their thetas, which must be possible."""
        others = [i for i in range(self.constrained) if i != place]
        columns = [1 + place, *(1 + i for i in others)]

        def best(weights: np.ndarray) -> np.ndarray:
            whole = np.zeros(1 + self.constrained)
            whole[columns] = weights
            return self.best(whole)[columns]

        found = Dual(best, len(others)).solve(thetas[others])
        return float(self.most[place]) if isinstance(found, Shortfall) else found.reached

    def _cut(self, point: np.ndarray, thetas: np.ndarray) -> np.ndarray:
        """Value the best orders at a point, keep them, and return their plane, float64[1 + C]: height at 0, slopes."""
        values = self.best(np.concatenate([[1.0], point]) / self._scale)
        self._values.append(values)
        return self._plane(values, thetas)

    def _plane(self, values: np.ndarray, thetas: np.ndarray) -> np.ndarray:
        """Return the planes of cuts, float64[..., 1 + C], in units of the ranges."""
        shifted = np.concatenate([[0.0], thetas])
        planes: np.ndarray = (values - shifted) / self._scale
        return planes

    def _lowest_of_cuts(self, thetas: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        """Return the lowest point of all cuts, its height, and what the mixture that reaches it gives the parties."""
        cuts = self._plane(np.array(self._values), thetas)
        planes = np.column_stack([cuts[:, 1:], -np.ones(len(cuts))])
        cost = np.concatenate([np.zeros(self.constrained), [1.0]])
        bounds = [(0, None)] * self.constrained + [(None, None)]
        found = _solved(cost, planes, -cuts[:, 0], bounds)
        return found.x[:-1], float(found.fun), -found.ineqlin.marginals @ np.array(self._values)[:, 1:]

    def _smallest_slack(self, thetas: np.ndarray) -> tuple[float, np.ndarray]:
        """Maximise the smallest slack over mixtures of orders, as a share of each party's range.

        The dual of that is the same kind of problem, over weights that sum to 1. The search ends as soon as the sign of
        the slack is known, unless it is negative: then the best compromise is worth knowing.

        Returns:
            The slack, and float64[C], what each party gets there.
        """
        if not self.constrained:
            return np.inf, np.empty(0)
        cost = np.concatenate([np.zeros(self.constrained), [1.0]])
        sums_to_one = np.concatenate([np.ones(self.constrained), [0.0]])[None]
        bounds = [(0, None)] * self.constrained + [(None, None)]
        slack, mixed, upper = -np.inf, np.empty(0), np.inf
        for _ in range(_CUTS_MAX):
            values = np.array(self._values)[:, 1:]
            slacks = (values - thetas) / self._scale[1:]
            planes = np.column_stack([slacks, -np.ones(len(slacks))])
            found = _solved(cost, planes, np.zeros(len(slacks)), bounds, sums_to_one)
            slack, mixed = float(found.fun), -found.ineqlin.marginals @ values
            if slack >= 0 or upper - slack <= GAP_MAX:
                break
            weights = found.x[:-1]
            best = self.best(np.concatenate([[0.0], weights / self._scale[1:]]))
            self._values.append(best)
            upper = min(upper, float(weights @ ((best[1:] - thetas) / self._scale[1:])))
        return slack, mixed


def _solved(
    cost: np.ndarray,
    planes: np.ndarray,
    limits: np.ndarray,
    bounds: Sequence[tuple[float | None, float | None]],
    equal: np.ndarray | None = None,
) -> Any:
    right = None if equal is None else np.ones(1)
    found = linprog(cost, planes, limits, equal, right, bounds, method="highs", options=_LP_OPTIONS)
    if not found.success:
        raise SolverError(f"the linear program of {len(planes)} cuts could not be solved: {found.message}")
    return found
