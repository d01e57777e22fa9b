"""How certain an estimate is: intervals from resampled users, an empirical Bernstein bound, and what the weights cover.

The requests of a user resemble each other, so users are the unit of everything here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ranker.counterfactual.estimators import LoggedActions, Terms
from ranker.errors import PropensityError
from ranker.evaluation.bootstrap import LEVEL, RESAMPLES, Estimate, Resampling, resample


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much of a log says something about the evaluated policy.

    Attributes:
        effective_users: (sum w)^2 / sum w^2 over the users' weights (Kish, 1965): so many equally weighted users would
            give estimates as certain.
        largest_share: the largest user's share of all weight.
        support: the mean weight with its interval. Its expectation is the share of the evaluated policy's answers that
            logging could have given.
    """

    effective_users: float
    largest_share: float
    support: Estimate


def overlap(actions: LoggedActions, resamples: int = RESAMPLES, seed: int = 7) -> Overlap:
    """Describe the weights, before any clipping."""
    weights = actions.mean_weights()
    by_user = _summed_by_user(actions.users, weights)
    total = by_user.sum()
    drawn = resample(actions.users, np.column_stack([weights, np.ones(len(weights))]), resamples, seed)
    support = (drawn[0] / drawn[1]).estimate()
    if not total:
        return Overlap(0.0, 0.0, support)
    return Overlap(float(total**2 / (by_user**2).sum()), float(by_user.max() / total), support)


@dataclass(frozen=True, slots=True)
class Resampled:
    """An estimate on resamples of the users.

    Attributes:
        resampling: the estimate and its resamples.
        influences: float64[U], what each user adds to the estimate's error.
    """

    resampling: Resampling
    influences: np.ndarray

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.resampling - other.resampling, self.influences - other.influences)

    def estimate(self) -> Estimate:
        """Return the value with an interval of Student's t times the bootstrap's standard error to each side.

        Few users with most of the weight make the variance itself uncertain: so the degrees of freedom of Student's t
        follow from the users' kurtosis, as the variance of a variance is about (kurtosis - 1) / n (R. Satterthwaite,
        1946). Percentiles of the resamples cover the truth less often (`bench simulator`).
        """
        squares = self.influences**2
        variance = squares.mean()
        if not variance > 0:
            return self.resampling.estimate()
        kurtosis = float((squares**2).mean() / variance**2)
        degrees = max(2 * len(squares) / max(kurtosis - 1, 1e-9), _DEGREES_MIN)
        return self.resampling.symmetric_estimate(_student_quantile(degrees))


#: Below, the expansion of Student's quantile is not exact, and no interval is worth much.
_DEGREES_MIN = 10.0


def _student_quantile(degrees: float) -> float:
    """Return the upper quantile of Student's t for an interval of `LEVEL` (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def bootstrap(
    users: np.ndarray, terms: Mapping[str, Terms], resamples: int = RESAMPLES, seed: int = 7
) -> dict[str, Resampled]:
    """Estimate from resamples of the users, the same ones for all `terms`, so that differences may be taken.

    Args:
        users: integers[R], the user of each request.
        terms: estimates of the same R requests, by name.
        resamples: number of resamples; 0 gives no intervals.
        seed: seed of the resamples.

    Returns:
        For each name the estimate and its resamples. `estimate()` gives the interval.

    Cost: O(resamples * users * names) in matrix products.
    """
    columns: list[np.ndarray] = [np.ones(len(users))]
    for part in terms.values():
        columns += [part.modelled, part.weighted, part.normalisers]
    sums = resample(users, np.column_stack(columns), resamples, seed)
    return {
        name: Resampled(
            sums[3 * place + 1] / sums[0] + sums[3 * place + 2] / sums[3 * place + 3], _influences(users, part)
        )
        for place, (name, part) in enumerate(terms.items())
    }


def _influences(users: np.ndarray, terms: Terms) -> np.ndarray:
    """Return float64[U], by linearising the estimate in the users' sums; zeros if there is no weight."""
    count, total = len(users), terms.normalisers.sum()
    if not total:
        return np.zeros(len(np.unique(users)))
    modelled = (terms.modelled - terms.modelled.mean()) / count
    weighted = (terms.weighted - terms.normalisers * (terms.weighted.sum() / total)) / total
    return _summed_by_user(users, modelled + weighted)


def empirical_bernstein(
    users: np.ndarray, values: np.ndarray, bounds: tuple[float, float], level: float = LEVEL
) -> Estimate:
    """Bound the expected value per request, for any number of users and any distribution within bounds.

    The expectation is a ratio m = E[S] / E[C], of a user's sum S and number C of requests. So each user's S - m C has
    expectation 0 and lies within `bounds` - m, times the largest C. Theorem 4 of A. Maurer and M. Pontil, "Empirical
    Bernstein bounds and sample variance penalization", 2009, holds once for each side: the mean of n users is less than
    sqrt(2 V ln(2/d) / n) + 7 span ln(2/d) / (3 (n - 1)) from 0 with probability 1 - d, with their variance V and the
    span of their bounds. The interval holds each m for which it is, as of E. C. Fieller, 1954.

    The bound supposes that no user has more requests than the log's most active one.

    Args:
        users: integers[R], the user of each request.
        values: float64[R], bounded values such as clipped weights times rewards.
        bounds: the least and the largest value that a request can have.
        level: probability that the interval contains the expectation.

    Raises:
        PropensityError: a value is out of bounds, or there is a single user.
    """
    low, high = bounds
    if values.min() < low or values.max() > high:
        raise PropensityError(f"values from {values.min():g} to {values.max():g} are out of bounds [{low:g}, {high:g}]")
    sums, counts = _summed_by_user(users, values), _summed_by_user(users, np.ones(len(values)))
    n = len(sums)
    if n < 2:
        raise PropensityError("a bound needs at least two users")
    log = np.log(2 / ((1 - level) / 2))
    fixed = 7 * (high - low) * counts.max() * log / (3 * (n - 1))
    # m is an end where (mean(S) -+ fixed - m mean(C))^2 = factor * var(S - m C), which is quadratic in m.
    factor = 2 * log / n
    (var_sum, both), (_, var_count) = np.cov(sums, counts)
    mean_sum, mean_count = sums.mean(), counts.mean()
    square = mean_count**2 - factor * var_count

    def end(side: int) -> float:
        moved = mean_sum + side * fixed
        half, constant = mean_count * moved - factor * both, moved**2 - factor * var_sum
        root = half**2 - square * constant
        bound = high if side > 0 else low
        if square <= 0 or root < 0:
            return bound
        return float(np.clip((half + side * np.sqrt(root)) / square, low, high))

    return Estimate(float(values.mean()), end(-1), end(+1))


def clipped_bounds(rewards: Sequence[float] | np.ndarray, clip: float) -> tuple[float, float]:
    """Return the least and largest clipped weighted reward, if no request earns less or more than those of the log."""
    return clip * min(0.0, float(np.min(rewards))), clip * max(0.0, float(np.max(rewards)))


def _summed_by_user(users: np.ndarray, values: np.ndarray) -> np.ndarray:
    distinct, user = np.unique(users, return_inverse=True)
    sums: np.ndarray = np.bincount(user, values, len(distinct))
    return sums
