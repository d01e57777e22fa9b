"""What a policy would have earned by one log, or why the log cannot say."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ranker.counterfactual.estimators import ESTIMATORS, LoggedActions, Terms, on_policy
from ranker.counterfactual.intervals import Overlap, bootstrap, clipped_bounds, empirical_bernstein, overlap
from ranker.evaluation.bootstrap import RESAMPLES, Estimate

#: The least effective number of users. With n of them, the standard error of a mean is 1/sqrt(n) of the spread of
#: single values: 10% at 100. Below, resampled users also give too narrow intervals, because their mean is not yet
#: normally distributed; and on public logs, the estimates are off by a multiple of the truth.
ESS_MIN = 100.0
#: The least share of the policy's answers that logging could have given. What it could not give is unknown; no weight
#: corrects it. The mean weight may exceed 1 by as much: it does where logging chose which pins an answer holds.
SUPPORT_MIN = 0.9
#: The largest weight of the clipped estimators.
CLIP = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How to estimate: `clip` is the largest weight of clipped estimators; 0 `resamples` give no intervals."""

    ess_min: float = ESS_MIN
    support_min: float = SUPPORT_MIN
    clip: float = CLIP
    resamples: int = RESAMPLES
    seed: int = 7


@dataclass(frozen=True, slots=True)
class Refused:
    """The log says too little about the policy; `fix` says what to do. There is no number."""

    reason: str
    fix: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a policy would have earned per request.

    Attributes:
        estimator: a name of `ESTIMATORS`.
        value: with its interval from resampled users.
        baseline: the same of the policy that it is compared with.
        difference: `value` minus `baseline`, on the same resamples.
        bound: the empirical Bernstein bound of the clipped value; None for other estimators.
    """

    estimator: str
    value: Estimate
    baseline: Estimate
    difference: Estimate
    bound: Estimate | None = None


def refusal(
    found: Overlap, settings: Settings, name: str, days: float | None = None, scored_share: float = 1.0
) -> Refused | None:
    """Say whether a log says too little about a policy.

    Args:
        found: the policy's overlap with the log.
        settings: the limits.
        name: the policy's name.
        days: the time that the log spans, to tell how many more are needed.
        scored_share: the part of the logged answers that keeps the stored rows, if the policy needs them.
    """
    support = found.support.value if found.support.high is None else found.support.high
    if support is not None and support < settings.support_min:
        return Refused(
            f"by this log, logging could have given only {found.support.value:.0%} of the answers of {name}, and at "
            f"least {settings.support_min:.0%} are required",
            "explore with arms near this policy (explore.toml), then log, join and evaluate again; a policy that only "
            "the reward model knows cannot be checked",
        )
    least = found.support.value if found.support.low is None else found.support.low
    if least is not None and least > 1 / settings.support_min:
        return Refused(
            f"the mean weight of {name} is {found.support.value:.3g}, but no policy can have more than 1; so the "
            "propensities in the log are not those of the policy that logged",
            "run `pinrank impressions check` on the log, and leave out the answers of the time or server at fault",
        )
    if found.effective_users < settings.ess_min:
        return Refused(
            f"the effective number of users for {name} is {found.effective_users:.1f}, and at least "
            f"{settings.ess_min:g} are required; the largest user has {found.largest_share:.0%} of the weight",
            _more_traffic(found, settings, days, scored_share),
        )
    return None


def _more_traffic(found: Overlap, settings: Settings, days: float | None, scored_share: float) -> str:
    factor = settings.ess_min / found.effective_users
    needed = "" if not days else f", or log for about {math.ceil(days * factor):,} days instead of {days:.1f}"
    rows = (
        f", or raise impressions.features_share, because only {scored_share:.0%} of the answers keep their stored rows"
        if scored_share < 1
        else ""
    )
    return (
        f"explore about {math.ceil(factor):,} times the present share (explore.toml){needed}{rows}; or evaluate a "
        "policy that is nearer to the logged ones"
    )


def forecast(
    evaluated: LoggedActions,
    baseline: LoggedActions | None,
    estimators: tuple[str, ...],
    settings: Settings,
    *,
    days: float | None = None,
    name: str = "the policy",
) -> tuple[Forecast, ...] | Refused:
    """Estimate what a policy would have earned, and the difference to another one.

    Args:
        evaluated: the log with the policy's probabilities.
        baseline: the same log with the other policy's; None compares with the policy that logged.
        estimators: names of `ESTIMATORS`.
        settings: limits, clipping and resamples.
        days: the time that the log spans.
        name: the policy's name in refusals.

    Returns:
        One forecast per estimator, or `Refused` if the log says too little about either policy.
    """
    for what, actions in ((name, evaluated), ("the baseline", baseline)):
        if actions is None:
            continue
        refused = refusal(overlap(actions, settings.resamples, settings.seed), settings, what, days)
        if refused is not None:
            return refused
    return estimates(evaluated, baseline, estimators, settings)


def estimates(
    evaluated: LoggedActions, baseline: LoggedActions | None, estimators: tuple[str, ...], settings: Settings
) -> tuple[Forecast, ...]:
    """Do the same without asking whether the log says enough."""
    terms: dict[str, Terms] = {}
    for estimator in estimators:
        terms[estimator] = ESTIMATORS[estimator].terms(evaluated, settings.clip)
        if baseline is not None:
            terms[f"{estimator} baseline"] = ESTIMATORS[estimator].terms(baseline, settings.clip)
    if baseline is None:
        terms["logged"] = on_policy(evaluated)
    drawn = bootstrap(evaluated.users, terms, settings.resamples, settings.seed)
    found = []
    for estimator in estimators:
        value = drawn[estimator]
        other = drawn["logged" if baseline is None else f"{estimator} baseline"]
        bound = None
        if estimator == "clipped" and len(evaluated.rewards) == len(evaluated.users):
            bounds = clipped_bounds(evaluated.rewards, settings.clip)
            bound = empirical_bernstein(evaluated.users, terms[estimator].weighted, bounds)
        found.append(Forecast(estimator, value.estimate(), other.estimate(), (value - other).estimate(), bound))
    return tuple(found)
