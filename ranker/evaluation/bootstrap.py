"""Confidence intervals of means over requests, and of their differences, from resampling users with replacement.

The requests of a user resemble each other, so the unit of resampling is a user with all requests; resampling requests
would make the intervals too narrow. Two models are compared on the same resamples, so that common effects cancel out.

Percentile intervals: B. Efron, "Bootstrap methods: another look at the jackknife", 1979; clusters as sampling units:
A. C. Davison and D. V. Hinkley, "Bootstrap Methods and their Application", 1997.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1_000
LEVEL = 0.95

#: Bounds the memory for weights, and so the number of resamples at a time.
WEIGHTS_MAX = 4_000_000
#: An interval requires a value in at least this share of the resamples; otherwise too few users contribute.
_DEFINED_SHARE_MIN = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval; None if it does not exist, as for a head without positives."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Resampling:
    """Sums over all users, and over each resample of them.

    Attributes:
        measured: float64[...].
        drawn: float64[B, ...].
    """

    measured: np.ndarray
    drawn: np.ndarray

    def __getitem__(self, index: tuple[int | slice, ...] | int) -> Resampling:
        index = index if isinstance(index, tuple) else (index,)
        return Resampling(self.measured[index], self.drawn[(slice(None), *index)])

    def __truediv__(self, other: Resampling) -> Resampling:
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample may contain no user who counts
            return Resampling(self.measured / other.measured, self.drawn / other.drawn)

    def __add__(self, other: Resampling) -> Resampling:
        with np.errstate(invalid="ignore"):
            return Resampling(self.measured + other.measured, self.drawn + other.drawn)

    def __sub__(self, other: Resampling) -> Resampling:
        with np.errstate(invalid="ignore"):
            return Resampling(self.measured - other.measured, self.drawn - other.drawn)

    def scaled(self, factor: float) -> Resampling:
        return Resampling(self.measured * factor, self.drawn * factor)

    def estimate(self) -> Estimate:
        """Return the value with its percentile interval."""
        value, defined = self._defined()
        if defined is None:
            return Estimate(value, None, None)
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(low), float(high))

    def symmetric_estimate(self, quantile: float) -> Estimate:
        """Return the value with the interval of so many standard errors to each side."""
        value, defined = self._defined()
        if value is None or defined is None:
            return Estimate(value, None, None)
        margin = quantile * float(defined.std())
        return Estimate(value, value - margin, value + margin)

    def _defined(self) -> tuple[float | None, np.ndarray | None]:
        """Return the value, and the resamples that have one; None where there are none or too few."""
        value = float(self.measured)
        if not np.isfinite(value):
            return None, None
        defined = self.drawn[np.isfinite(self.drawn)]
        return value, None if len(defined) < max(1, _DEFINED_SHARE_MIN * len(self.drawn)) else defined


def resample(
    users: np.ndarray, values: np.ndarray, resamples: int, seed: int, weights_max: int = WEIGHTS_MAX
) -> Resampling:
    """Sum the requests' values over resamples of the users.

    Args:
        users: int64[R], the user of each request.
        values: float64[R, K].
        resamples: B, the number of resamples; 0 gives no intervals.
        seed: seed of the resamples; equal users and seed give equal resamples, whatever the values.
        weights_max: maximum number of weights in memory at a time.

    Returns:
        float64[K] and float64[B, K]. Whole numbers stay exact, so that equal values have a difference of exactly 0.

    Cost: O(B * U * K) in a matrix product over U users; memory for B * K numbers and about 32 MB.
    """
    distinct, user = np.unique(users, return_inverse=True)
    sums = np.zeros((len(distinct), values.shape[1]))
    np.add.at(sums, user, values)
    rng = np.random.default_rng([seed, len(distinct)])
    drawn = np.empty((resamples, values.shape[1]))
    step = max(1, weights_max // max(1, len(distinct)))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        weights = np.stack([_draw(len(distinct), rng) for _ in range(start, stop)])
        drawn[start:stop] = weights @ sums
    return Resampling(sums.sum(axis=0), drawn)


def _draw(users: int, rng: np.random.Generator) -> np.ndarray:
    """Return float64[U], how often each user occurs in U draws with replacement."""
    return np.bincount(rng.integers(users, size=users), minlength=users).astype(np.float64)
