"""Finds the weights of a surface that give one party the most, while others get at least their thetas.

The objective is what the weights in force make of the maximised party and of the parties that have no theta:
u0 = sum of their weighted utilities. Their weights stay, and only the constrained parties' weights are tuned, so a
tuned weight is a multiplier. Divided by the maximised party's weight, it is an exchange rate in that party's own units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ranker.errors import DatasetError, SettingError
from ranker.evaluation.bootstrap import RESAMPLES, Resampling, resample
from ranker.tuning.dual import Dual, Shortfall
from ranker.tuning.orders import ScoredRequests
from ranker.tuning.results import Attainable, FrontPoint, HeldOutCheck, Infeasible, PartyOutcome, Role, Tuned, rounded
from ranker.tuning.thetas import Theta

#: How often thetas are tightened until one order per request meets them.
_TIGHTENED_MAX = 20
#: Points of a Pareto front, and the gap that is good enough for drawing it.
_FRONT_POINTS = 13
_FRONT_GAP = 1e-4

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Goal:
    """Whom to maximise, and what the others must get at least.

    Attributes:
        maximised: a party.
        thetas: of other parties; at least one.
        weights: float64[P], the weights in force, in the order of the requests' parties.
    """

    maximised: str
    thetas: tuple[Theta, ...]
    weights: np.ndarray

    def checked(self, parties: Sequence[str]) -> Goal:
        """Return self. Raises SettingError if a party is unknown, or if nothing is left to tune."""
        known = f"the parties are {', '.join(parties)}"
        for party in (self.maximised, *(theta.party for theta in self.thetas)):
            if party not in parties:
                raise SettingError(f"there is no party {party!r}; {known}")
        if not self.thetas:
            raise SettingError("no party must get anything; say what, e.g. --at-least creator=+10%")
        if self.maximised in (theta.party for theta in self.thetas):
            raise SettingError(f"{self.maximised} is maximised, so it cannot have a theta as well")
        weight = self.weights[parties.index(self.maximised)]
        if weight <= 0:
            raise SettingError(
                f"{self.maximised} has the weight {weight:g} in force, so it cannot be maximised; give it one above 0"
            )
        return self


def tune(
    requests: ScoredRequests,
    goal: Goal,
    seed: int,
    held_out_share: float = 0.3,
    resamples: int = RESAMPLES,
    progress: Progress = lambda _done, _total, _what: None,
    *,
    fronts: bool = True,
    ordering: ScoredRequests | None = None,
) -> Tuned | Infeasible:
    """Tune the weights on most users' requests, and check the constraints on the others'.

    Args:
        requests: the scored requests.
        goal: the parties' roles.
        seed: draws the users that are held out, and the resamples of users.
        held_out_share: share of the users; 0 tunes on all and checks nothing.
        resamples: resamples of users for the intervals.
        progress: receives finished and all steps, and the current step.
        fronts: whether to trace the Pareto fronts as well.
        ordering: the same requests by expressions that shall replace those in force; the objective is then theirs. The
            constrained parties' must be the same. None keeps the expressions.

    Raises:
        SettingError: the goal does not fit the requests; a theta is relative to 0; or a part of the split would have no
            request.
        DatasetError: no candidate has finite utilities.

    Cost: about 40 orders of all requests for three thetas, and 100 per front.
    """
    parties = requests.parties
    goal.checked(parties)
    if not np.isfinite(requests.utilities).all(axis=1).any():
        raise DatasetError("no candidate has a finite utility for every party, so no order is better than another")
    inside, outside = split_users(requests.users, held_out_share, seed)
    chosen, others = requests.take(inside), requests.take(outside)
    order_by = requests if ordering is None else ordering
    ordered, others_ordered = order_by.take(inside), order_by.take(outside)
    before = chosen.served(goal.weights)
    present = before.mean(axis=0)
    columns = [parties.index(theta.party) for theta in goal.thetas]
    for theta, column in zip(goal.thetas, columns, strict=True):
        if theta.relative and not present[column]:
            raise SettingError(
                f"--at-least {theta}: {theta.party} gets 0 by the weights in force, and no percentage of that is more; "
                f"write a value, e.g. {theta.party}=0.1"
            )
    asked = [theta.of(float(present[column])) for theta, column in zip(goal.thetas, columns, strict=True)]
    thetas = np.array([rounded(theta, np.floor) for theta in asked])  # never up, beyond what is possible
    base = goal.weights.copy()
    base[columns] = 0
    dual = Dual(lambda weights: _best(ordered, base, columns, weights), len(columns))
    steps = 2 + len(columns) * fronts
    progress(0, steps, "weights")
    found = dual.solve(thetas)
    if isinstance(found, Shortfall):
        return Infeasible(
            tuple(
                Attainable(theta.party, float(t), float(present[column]), float(alone), float(together))
                for theta, t, column, alone, together in zip(
                    goal.thetas, thetas, columns, found.alone, found.together, strict=True
                )
            )
        )
    weights = _one_order(ordered, dual, thetas, base, columns)
    after = ordered.served(weights, chosen)
    progress(1, steps, "intervals")
    outcomes = _outcomes(chosen, goal, weights, before, after, thetas, found.multipliers, resamples, seed)
    checks = _held_out(others, others_ordered, goal, weights, resamples, seed)
    drawn: dict[str, tuple[FrontPoint, ...]] = {}
    for place, theta in enumerate(goal.thetas if fronts else ()):
        progress(2 + place, steps, f"front of {theta.party}")
        drawn[theta.party] = _front(dual, thetas, place)
    progress(steps, steps, "")
    return Tuned(
        parties=outcomes,
        requests=chosen.requests,
        users=len(np.unique(chosen.users)),
        held_out=checks,
        held_out_requests=others.requests,
        held_out_users=len(np.unique(others.users)),
        before=float(chosen.served(goal.weights, ordered).mean(axis=0) @ base),
        bound=found.bound,
        reached=found.reached,
        deployed=float(ordered.served(weights).mean(axis=0) @ base),
        met=bool((after.mean(axis=0)[columns] >= thetas).all()),
        orders=dual.tried,
        fronts=drawn,
    )


def split_users(users: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the requests to tune on and of those held out; all of a user's requests go together."""
    distinct, user = np.unique(users, return_inverse=True)
    count = round(share * len(distinct))
    if not len(users) or count >= len(distinct) or (share and not count):
        raise SettingError(
            f"cannot hold out {share:.0%} of {len(distinct)} users with {len(users)} requests; use more requests, or "
            "--hold-out 0"
        )
    out = np.zeros(len(distinct), bool)
    out[np.random.default_rng([seed, len(distinct)]).permutation(len(distinct))[:count]] = True
    return np.flatnonzero(~out[user]), np.flatnonzero(out[user])


def _best(requests: ScoredRequests, base: np.ndarray, columns: list[int], weights: np.ndarray) -> np.ndarray:
    """Return float64[1 + C], the values of the best orders to the objective and to each constrained party."""
    whole = weights[0] * base
    whole[columns] = weights[1:]
    values = requests.best(whole)
    return np.concatenate([[values @ base], values[columns]])


def _one_order(
    requests: ScoredRequests, dual: Dual, thetas: np.ndarray, base: np.ndarray, columns: list[int]
) -> np.ndarray:
    """Return weights, float64[P], that meet the thetas with one order per request.

    The optimum may mix two orders of a few requests, one per constraint at most; a single order then falls short by at
    most a request's worth. So the thetas are tightened by what is lacking until the served orders meet the real ones.
    The best weights that do win; if none does, those that lack least.
    """
    tightened, tried = thetas, []
    for _ in range(_TIGHTENED_MAX):
        found = dual.solve(tightened)
        if isinstance(found, Shortfall):
            break
        weights = base.copy()
        # Of two weights this near, the larger favours the constraint.
        weights[columns] = [rounded(value, np.ceil) for value in found.multipliers]
        values = requests.served(weights).mean(axis=0)
        lacking = np.maximum(0, thetas - values[columns])
        tried.append((float(lacking.sum()), -float(values @ base), weights))
        if not lacking.any():
            break
        tightened = tightened + 1.1 * lacking
    return min(tried, key=lambda one: one[:2])[2]


def _outcomes(
    requests: ScoredRequests,
    goal: Goal,
    weights: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    thetas: np.ndarray,
    multipliers: np.ndarray,
    resamples: int,
    seed: int,
) -> tuple[PartyOutcome, ...]:
    count, parties = np.ones((len(before), 1)), len(goal.weights)
    sums = resample(requests.users, np.column_stack([before, after, count]), resamples, seed)
    own = goal.weights[requests.parties.index(goal.maximised)]
    places = {theta.party: place for place, theta in enumerate(goal.thetas)}
    outcomes = []
    for column, party in enumerate(requests.parties):
        old, new = sums[column] / sums[2 * parties], sums[parties + column] / sums[2 * parties]
        place = places.get(party)
        role: Role = "maximised" if party == goal.maximised else "kept" if place is None else "constrained"
        outcomes.append(
            PartyOutcome(
                party,
                role,
                float(goal.weights[column]),
                float(weights[column]),
                old.estimate(),
                new.estimate(),
                ((new - old) / Resampling(abs(old.measured), abs(old.drawn))).scaled(100).estimate(),
                None if place is None else goal.thetas[place],
                None if place is None else float(thetas[place]),
                None if place is None else float(multipliers[place] / own),
            )
        )
    return tuple(outcomes)


def _held_out(
    requests: ScoredRequests, ordered: ScoredRequests, goal: Goal, weights: np.ndarray, resamples: int, seed: int
) -> tuple[HeldOutCheck, ...]:
    if not requests.requests:
        return ()
    before, after = requests.served(goal.weights), ordered.served(weights, requests)
    checks = []
    for theta in goal.thetas:
        column = requests.parties.index(theta.party)
        old, new = before[:, column], after[:, column]
        limit = theta.of(float(old.mean()))
        # Per request, what the party gets beyond its theta; a relative theta varies with the same resamples.
        needed = old * (1 + theta.value * np.sign(old.mean())) if theta.relative else np.full(len(new), limit)
        beyond = resample(requests.users, np.column_stack([new - needed, np.ones(len(new))]), resamples, seed)
        error = float(np.std((beyond[0] / beyond[1]).drawn, ddof=1)) if resamples > 1 else 0.0
        checks.append(HeldOutCheck(theta.party, limit, float(new.mean()), error))
    return tuple(checks)


def _front(dual: Dual, thetas: np.ndarray, place: int) -> tuple[FrontPoint, ...]:
    """Trace the objective over one party's theta, the others held: from where it costs nothing to the most possible."""
    asked = thetas.copy()
    asked[place] = dual.least[place]
    free = dual.solve(asked, _FRONT_GAP)
    if isinstance(free, Shortfall):  # the solver met these thetas with a higher one for this party
        return ()
    points = []
    for theta in np.linspace(free.values[place], dual.most_beside(place, thetas), _FRONT_POINTS):
        asked[place] = theta
        found = dual.solve(asked, _FRONT_GAP)
        if isinstance(found, Shortfall):  # the last point lies on the edge of what is possible
            break
        points.append(FrontPoint(float(theta), found.bound))
    return tuple(points)
