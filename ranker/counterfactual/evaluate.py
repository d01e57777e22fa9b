"""Evaluates a policy on the joined log of another one, reward by reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from impressions.slates import Slates
from ranker.counterfactual.estimators import ESTIMATORS, LoggedActions
from ranker.counterfactual.forecast import Forecast, Refused, Settings, estimates, refusal
from ranker.counterfactual.intervals import Overlap, overlap
from ranker.counterfactual.policies import EvaluatedPolicy
from ranker.counterfactual.rescoring import Rescoring
from ranker.counterfactual.rewards import Reward, RewardModel, head_labels
from ranker.errors import PropensityError

#: An order as a whole, with the product of whatever the pins do to each other; or each pin at its position, which
#: supposes that the others do not matter, and needs much less traffic.
UNITS = ("orders", "positions")
_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What whole orders, or single positions, say.

    Attributes:
        unit: of `UNITS`.
        overlap: of the policy with the log.
        refused: why there are no forecasts; None if there are.
        forecasts: by reward.
    """

    unit: str
    overlap: Overlap
    refused: Refused | None
    forecasts: Mapping[str, tuple[Forecast, ...]]


@dataclass(frozen=True, slots=True)
class PolicyEvaluation:
    """All forecasts for one policy, and the log that they follow from.

    Attributes:
        data: name of the joined dataset.
        surface, model: of the logged answers.
        policy, baseline: the names of what is compared.
        start_ms, stop_ms: time of the first and the last request, Unix time.
        requests, users, pins: counts of the answers.
        left_out: how many more answers there were, which do not hold all candidates or hold none.
        explored_share: the share of the requests that an arm ordered.
        discounted: whether positions count by their discount.
        settings: limits, clipping and resamples.
        rewards: the names of the rewards, in order.
        units: the results, in the order of `UNITS`.
        rescoring: which answers these are, if a policy has another network than the one that logged; None for all.
    """

    data: str
    surface: str
    model: str
    policy: str
    baseline: str
    start_ms: int
    stop_ms: int
    requests: int
    users: int
    pins: int
    left_out: int
    explored_share: float
    discounted: bool
    settings: Settings
    rewards: tuple[str, ...]
    units: tuple[UnitResult, ...]
    rescoring: Rescoring | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def unit(self, name: str) -> UnitResult:
        return next(unit for unit in self.units if unit.unit == name)

    def forecast(self, unit: str, reward: str, estimator: str) -> Forecast:
        """Return one forecast. Raises PropensityError where the log says too little."""
        result = self.unit(unit)
        if result.refused is not None:
            raise PropensityError(f"refused: {result.refused.reason}. Instead, {result.refused.fix}")
        return next(f for f in result.forecasts[reward] if f.estimator == estimator)


def evaluate_policy(
    slates: Slates,
    policy: EvaluatedPolicy,
    baseline: EvaluatedPolicy,
    rewards: Mapping[str, Reward],
    settings: Settings,
    data: str = "",
    rescoring: Rescoring | None = None,
    left_out: int = 0,
) -> PolicyEvaluation:
    """Estimate what a policy would have earned on logged requests.

    Args:
        slates: joined answers of one surface and model.
        policy: the policy over them.
        baseline: the policy to compare with.
        rewards: what to count, by name.
        settings: limits, clipping and resamples.
        data: name of the joined dataset.
        rescoring: which answers these are, if another network scored them.
        left_out: how many other answers there were, for the record.

    Raises:
        PropensityError: the log has no request or an answer without a pin, or a propensity that is no probability.
    """
    if not slates.requests or (np.diff(slates.row_splits) == 0).any():
        raise PropensityError("the joined log has no request, or an answer without a pin; widen the time span")
    days = float(slates.time_ms.max() - slates.time_ms.min()) / _DAY_MS
    model = RewardModel.of(slates, settings.seed)
    share = 1.0 if rescoring is None else rescoring.share
    units = tuple(_unit(unit, slates, model, policy, baseline, rewards, settings, days, share) for unit in UNITS)
    return PolicyEvaluation(
        data=data,
        surface=slates.surface,
        model=slates.model,
        policy=policy.name,
        baseline=baseline.name,
        start_ms=int(slates.time_ms.min()),
        stop_ms=int(slates.time_ms.max()),
        requests=slates.requests,
        users=len(np.unique(slates.user_ids)),
        pins=len(slates.pin_ids),
        left_out=left_out,
        explored_share=float(np.mean(slates.arms != "")),
        discounted=any(reward.discounted for reward in rewards.values()),
        settings=settings,
        rewards=tuple(rewards),
        units=units,
        rescoring=rescoring,
    )


def logged_actions(
    unit: str, slates: Slates, policy: EvaluatedPolicy, reward: Reward, model: RewardModel
) -> LoggedActions:
    """Return a log with one policy's probabilities and one reward, as whole orders or as positions."""
    requests = np.repeat(np.arange(slates.requests), np.diff(slates.row_splits))

    def summed(values: np.ndarray) -> np.ndarray:
        sums: np.ndarray = np.bincount(requests, values, slates.requests)
        return sums

    rewards = reward.of(head_labels(slates), slates, slates.positions)
    predicted = model.predicted(reward, slates.positions)
    expected = summed(np.sum([p.chances * model.predicted(reward, p.positions) for p in policy.placements], axis=0))
    if unit == "positions":
        return LoggedActions(
            rewards, slates.propensities, policy.position_probabilities, slates.user_ids, requests, predicted, expected
        )
    return LoggedActions(
        summed(rewards),
        slates.order_propensities,
        policy.order_probabilities,
        slates.user_ids,
        np.arange(slates.requests),
        summed(predicted),
        expected,
    )


def _unit(
    unit: str,
    slates: Slates,
    model: RewardModel,
    policy: EvaluatedPolicy,
    baseline: EvaluatedPolicy,
    rewards: Mapping[str, Reward],
    settings: Settings,
    days: float,
    scored_share: float,
) -> UnitResult:
    found: dict[str, tuple[Forecast, ...]] = {}
    described: Overlap | None = None
    for name, reward in rewards.items():
        own = logged_actions(unit, slates, policy, reward, model)
        other = None if baseline.logs else logged_actions(unit, slates, baseline, reward, model)
        if described is None:  # weights do not depend on the reward
            described = overlap(own, settings.resamples, settings.seed)
            refused = refusal(described, settings, policy.name, days, scored_share)
            if refused is None and other is not None:
                theirs = overlap(other, settings.resamples, settings.seed)
                refused = refusal(theirs, settings, baseline.name, days, scored_share)
            if refused is not None:
                return UnitResult(unit, described, refused, {})
        found[name] = estimates(own, other, tuple(ESTIMATORS), settings)
    if described is None:
        raise PropensityError("there is no reward to evaluate; name at least one")
    return UnitResult(unit, described, None, found)
