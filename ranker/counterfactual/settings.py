"""The estimators by name, and the limits of estimates: what commands show. It imports no numerical library."""

from __future__ import annotations

from dataclasses import dataclass

#: Resamples of users for intervals.
RESAMPLES = 1_000


@dataclass(frozen=True, slots=True)
class EstimatorKind:
    """What an estimator does.

    Attributes:
        weighs: whether it weighs logged rewards by propensities.
        models: whether it needs a reward model.
        clips: whether weights are clipped.
        normalises: whether it divides by the weights instead of by the number of requests.
    """

    weighs: bool = True
    models: bool = False
    clips: bool = False
    normalises: bool = False


#: See `ranker.counterfactual.estimators` for what each is.
ESTIMATOR_KINDS = {
    "ips": EstimatorKind(),
    "snips": EstimatorKind(normalises=True),
    "clipped": EstimatorKind(clips=True),
    "dm": EstimatorKind(weighs=False, models=True),
    "dr": EstimatorKind(models=True),
    "sndr": EstimatorKind(models=True, normalises=True),
    "clipped-dr": EstimatorKind(models=True, clips=True),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How to estimate.

    Attributes:
        ess_min: the least effective number of users. With n of them, the standard error of a mean is 1/sqrt(n) of the
            spread of single values: 10% at 100. Below, resampled users also give too narrow intervals, because their
            mean is not yet normally distributed; and on public logs, the estimates are off by a multiple of the truth.
        support_min: in (0, 1], the least share of the policy's answers that logging could have given. What it could not
            give is unknown; no weight corrects it.
        clip: the largest weight of clipped estimators.
        resamples: of users; 0 gives no intervals.
        seed: of the resamples, and of the reward model's folds of users.
    """

    ess_min: float = 100.0
    support_min: float = 0.9
    clip: float = 10.0
    resamples: int = RESAMPLES
    seed: int = 7
