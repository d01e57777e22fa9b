"""Gates for a new version: what it must not lose against its parent, and what it must reach at least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ranker.baselines.scores import DOT_PRODUCT, TREES
from ranker.errors import SettingError
from ranker.evaluation.metrics import TOP
from ranker.evaluation.results import Evaluation, HeadScore


@dataclass(frozen=True, slots=True)
class RateGate:
    """The least that a version must add to a reward per request, by the low end of a 95% interval.

    Attributes:
        reward: a party of the version's utility table, or a head: its action. A name that is both is the party.
        at_least: the least difference to the parent.
    """

    reward: str
    at_least: float

    def __str__(self) -> str:
        return f"{self.reward} >= {self.at_least:g}"


def parse_rate_gate(text: str) -> RateGate:
    """Parse `HEAD >= NUMBER` or `PARTY >= NUMBER`. Raises SettingError."""
    reward, sign, number = text.partition(">=")
    try:
        at_least = float(number)
    except ValueError:
        at_least = math.nan
    if not (sign and reward.strip() and math.isfinite(at_least)):
        raise SettingError(f'--gate-ope {text!r}: write HEAD >= NUMBER or PARTY >= NUMBER, e.g. "save >= 0"')
    return RateGate(reward.strip(), at_least)


def check_rate_gates(gates: Sequence[RateGate], heads: Sequence[str], parties: Sequence[str]) -> None:
    """Raise SettingError if a gate names neither a head nor a party."""
    for gate in gates:
        if gate.reward not in {*heads, *parties}:
            raise SettingError(
                f"--gate-ope {str(gate)!r}: the model predicts {', '.join(heads)}, and its utility table has the "
                f"parties {', '.join(parties) or '(none)'}; name one of these"
            )


#: Logistic calibration leaves tenths that are off by up to 1.8 times on three of four datasets, and by 4 on the other.
DECILE_FACTOR = 3.0


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits for each head that both models have.

    Attributes:
        auc_loss_max: largest loss of AUC against the parent.
        hit_loss_percent_max: largest loss of HIT@3 by utility, in percent of the parent's, beyond the interval of the
            difference.
        ece_max: largest calibration error, whatever the parent's is.
        decile_factor_max: how many times more, or fewer, actions may come than predicted in a tenth of the rows,
            whatever the parent's do. Unlike the calibration error, a rare action can break it.
        rates: what logged answers must say about the version's own order (see `ranker.counterfactual.gate`).
    """

    auc_loss_max: float = 0.005
    hit_loss_percent_max: float = 2.0
    ece_max: float = 0.02
    decile_factor_max: float = DECILE_FACTOR
    rates: tuple[RateGate, ...] = ()


#: What a version must be at least as good as to be published. The others inform.
GATED = (DOT_PRODUCT, TREES)


def shortfalls(evaluation: Evaluation, own: str) -> list[str]:
    """Return where a version is not at least a baseline of `GATED`, as readable text.

    It is at least as good on a head unless the whole 95% interval of the paired difference of HIT@3, each ordering by
    the head alone, lies below 0. Where there is no interval, because too few users have the action, it is not refused.
    A version that is exactly as good as a baseline falls behind by chance in 1 of 40 comparisons.

    Args:
        evaluation: an evaluation with comparisons.
        own: name of the version in the evaluation.
    """
    return [
        f"{c.head}: HIT@{TOP} by head {c.by_head.own.value:.4f} against the {c.by_head.baseline.value:.4f} of "
        f"{c.baseline}, a difference of {c.by_head.difference.value:+.4f} [{c.by_head.difference.low:+.4f}, "
        f"{c.by_head.difference.high:+.4f}]"
        for c in evaluation.comparisons
        if c.scorer == own and c.baseline in GATED and c.by_head is not None and c.by_head.behind
    ]


def miscalibrated(evaluation: Evaluation, own: str, gates: Gates) -> list[str]:
    """Return the heads whose probabilities do not hold, as readable text.

    Args:
        evaluation: an evaluation of the version.
        own: name of the version in the evaluation.
        gates: the limits.
    """
    found = []
    for score in (score for score in evaluation.scores if score.scorer == own):
        if score.ece is not None and score.ece > gates.ece_max:
            found.append(f"{score.head}: calibration error {score.ece:.4f} is above the limit of {gates.ece_max:g}")
        judged = [decile for decile in score.deciles if decile.off is not None]
        worst = max(judged, key=lambda decile: decile.factor, default=None)
        if worst is not None and worst.factor > gates.decile_factor_max:
            found.append(
                f"{score.head}: of {worst.rows:,} rows {worst.expected:.0f} were predicted to get the action and "
                f"{worst.observed:,} did, which is beyond the limit of {gates.decile_factor_max:g} times more or fewer"
            )
    return found


def losses(evaluation: Evaluation, own: str, parent: str, gates: Gates) -> list[str]:
    """Return where a version has lost more against its parent than the gates allow, as readable text.

    Args:
        evaluation: evaluation of both models on the same requests, with `parent` as baseline.
        own: name of the new version in the evaluation.
        parent: name of the parent in the evaluation.
        gates: the limits.
    """
    scores = {(score.scorer, score.head): score for score in evaluation.scores}
    found: list[str] = []
    for (scorer, head), score in scores.items():
        if scorer == own and (parent, head) in scores:
            found += _of_head(head, score, scores[parent, head], gates)
    return found


def refusal(parent: str, lost: Sequence[str], wrong: Sequence[str]) -> str:
    """Return why no bundle was written; empty if there is no reason.

    Args:
        parent: the parent's name and version.
        lost: what was lost against the parent.
        wrong: what is wrong whatever the parent is.
    """
    reasons = []
    if lost:
        reasons.append(f"the new model is worse than {parent} on the newest requests: " + "; ".join(lost))
    if wrong:
        reasons.append(
            "its probabilities are wrong on the newest requests, whatever the parent's are: " + "; ".join(wrong)
        )
    return "no bundle was written, because " + ". Also, ".join(reasons) if reasons else ""


def _of_head(head: str, own: HeadScore, parent: HeadScore, gates: Gates) -> list[str]:
    found = []
    if own.auc is not None and parent.auc is not None and own.auc < parent.auc - gates.auc_loss_max:
        found.append(
            f"{head}: AUC {own.auc:.4f} is more than {gates.auc_loss_max:g} below the parent's {parent.auc:.4f}"
        )
    hit, usual = own.hit_at_3_by_utility, parent.hit_at_3_by_utility
    if hit is None or usual is None or hit.difference is None:
        return found
    before, highest = usual.mean.value, hit.difference.high if hit.difference.high is not None else hit.difference.value
    if before is not None and highest is not None and highest < -before * gates.hit_loss_percent_max / 100:
        found.append(
            f"{head}: HIT@3 {hit.mean.value:.4f} is more than {gates.hit_loss_percent_max:g}% below the parent's "
            f"{before:.4f}"
        )
    return found
