"""Estimators of what another policy would have earned on logged requests: ratios of sums over requests.

- `ips`: inverse propensity scoring (Horvitz and Thompson, 1952). Unbiased where logging could show whatever the
  evaluated policy shows.
- `snips`: the same, normalised by the weights (Swaminathan and Joachims, 2015). Hardly biased, and less noisy.
- `clipped`: `ips` with weights of at most `clip`. Less noisy, and too low for rewards that are not negative.
- `dm`: the direct method, which asks the reward model and uses no weight.
- `dr`: doubly robust (Dudík, Langford and Li, 2011): the reward model, corrected by the weighted errors that it makes.
- `sndr`, `clipped-dr`: `dr` with normalised and with clipped weights.

The same functions serve whole orders (one action per request) and single positions (one action per shown pin). The
latter suppose that what a pin earns depends on the pin and its position and not on the other pins: the item-position
model of Li, Abbasi-Yadkori, Kveton, Muthukrishnan, Vinay and Wen, "Offline evaluation of ranking policies with click
models", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranker.counterfactual.settings import ESTIMATOR_KINDS, EstimatorKind
from ranker.errors import PropensityError


@dataclass(frozen=True, slots=True)
class LoggedActions:
    """N logged actions of R requests: whole orders (N = R), or single pins at their positions.

    Attributes:
        rewards: float64[N], what each action earned.
        logged: float64[N], its probability under the policy that logged it, in (0, 1].
        evaluated: float64[N], its probability under the evaluated policy, in [0, 1].
        users: integers[R], the user of each request; requests of one user resemble each other.
        requests: int64[N], the request of each action, from 0; each request has at least one action.
        predicted: float64[N], the reward model's expectation of `rewards`; None without a reward model.
        expected: float64[R], the reward model's expectation of a request's sum of rewards under the evaluated policy;
            None without a reward model.

    Raises:
        PropensityError: lengths differ; a propensity is not in its range; a number is not finite.
    """

    rewards: np.ndarray
    logged: np.ndarray
    evaluated: np.ndarray
    users: np.ndarray
    requests: np.ndarray
    predicted: np.ndarray | None = None
    expected: np.ndarray | None = None

    def __post_init__(self) -> None:
        count, requests = len(self.rewards), len(self.users)
        lengths = {"logged": self.logged, "evaluated": self.evaluated, "requests": self.requests}
        for name, values in lengths.items():
            if len(values) != count:
                raise PropensityError(f"{name} has {len(values)} values for {count} logged actions")
        if not requests or len(np.unique(self.requests)) != requests or self.requests.max() != requests - 1:
            raise PropensityError(f"each of the {requests} requests needs a logged action, numbered from 0")
        if (self.predicted is None) != (self.expected is None):
            raise PropensityError("a reward model gives both predicted and expected rewards, or neither")
        _check_range("the logging propensity", self.logged, 0.0, above=True)
        _check_range("the evaluated probability", self.evaluated, 0.0, above=False)
        _check_finite("the reward", self.rewards)
        if self.predicted is not None and self.expected is not None:
            if len(self.predicted) != count or len(self.expected) != requests:
                raise PropensityError(
                    f"the reward model gave {len(self.predicted)} and {len(self.expected)} values for {count} logged "
                    f"actions of {requests} requests"
                )
            _check_finite("the predicted reward", self.predicted)
            _check_finite("the expected reward", self.expected)

    @property
    def weights(self) -> np.ndarray:
        """float64[N], importance weights."""
        weights: np.ndarray = self.evaluated / self.logged
        return weights

    def summed(self, values: np.ndarray) -> np.ndarray:
        """Sum float64[N] per request to float64[R]."""
        sums: np.ndarray = np.bincount(self.requests, values, len(self.users))
        return sums

    def mean_weights(self, clip: float = np.inf) -> np.ndarray:
        """Return float64[R], the mean of a request's weights; their expectation is 1 where logging has full support."""
        return self.summed(np.minimum(self.weights, clip)) / np.bincount(self.requests, minlength=len(self.users))


@dataclass(frozen=True, slots=True)
class Terms:
    """An estimate in its parts per request: mean(modelled) + sum(weighted) / sum(normalisers).

    Attributes:
        modelled, weighted, normalisers: float64[R].
    """

    modelled: np.ndarray
    weighted: np.ndarray
    normalisers: np.ndarray

    def value(self) -> float:
        """Return the estimated reward per request; NaN if a normalised estimator has no weight at all."""
        with np.errstate(invalid="ignore"):
            return float(self.modelled.mean() + self.weighted.sum() / self.normalisers.sum())


def on_policy(actions: LoggedActions) -> Terms:
    """Return the mean reward of the policy that logged."""
    nothing = np.zeros(len(actions.users))
    return Terms(nothing, actions.summed(actions.rewards), np.ones(len(actions.users)))


@dataclass(frozen=True, slots=True)
class Estimator:
    """Estimates as its kind says: from rewards or a reward model's errors, with weights that may be clipped."""

    kind: EstimatorKind

    def terms(self, actions: LoggedActions, clip: float) -> Terms:
        """Return the parts of the estimate; `clip` is the largest weight of those that clip."""
        if not clip >= 1:
            raise PropensityError(f"weights cannot be clipped at {clip}; the limit must be at least 1")
        largest = clip if self.kind.clips else np.inf
        nothing, ones = np.zeros(len(actions.users)), np.ones(len(actions.users))
        rewards, modelled = actions.rewards, nothing
        if self.kind.models:
            if actions.predicted is None or actions.expected is None:
                raise PropensityError("this estimator needs a reward model; use ips, snips or clipped")
            rewards, modelled = rewards - actions.predicted, actions.expected
        return Terms(
            modelled,
            actions.summed(np.minimum(actions.weights, largest) * rewards) if self.kind.weighs else nothing,
            actions.mean_weights(largest) if self.kind.normalises else ones,
        )


ESTIMATORS = {name: Estimator(kind) for name, kind in ESTIMATOR_KINDS.items()}


def _check_range(what: str, values: np.ndarray, low: float, *, above: bool) -> None:
    wrong = ~((values > low if above else values >= low) & (values <= 1))
    if wrong.any():
        place = int(np.argmax(wrong))
        bounds = "(0, 1]" if above else "[0, 1]"
        raise PropensityError(
            f"{what} of action {place} is {values[place]}, which is not in {bounds} ({wrong.sum():,} such values); "
            "propensities are logged when an answer is given and cannot be repaired later: leave these requests out"
        )


def _check_finite(what: str, values: np.ndarray) -> None:
    wrong = ~np.isfinite(values)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise PropensityError(f"{what} at position {place} is {values[place]} ({wrong.sum():,} such values)")
