"""What the measurements of `lift` say: tables and a chart by dataset, and the claims about the default variant."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from pydantic import TypeAdapter

from bench.engines.fusion_latency import BASE, DEFAULT
from bench.harness import Claim, Conclusion, Raw, markdown_table
from ranker.baselines.scores import DOT_PRODUCT, TREES
from ranker.evaluation.charts import COLOURS, MARKERS, STYLE
from ranker.evaluation.results import Evaluation, HeadScore, Paired

CANDIDATES = 128
#: Published for early-fused real-time activity: its lift of saves over a ranker without it.
LIFT_PERCENT = 9.0
#: What a network must add to boosted trees on the mean of the heads.
OVER_TREES_PERCENT = 3.0
TRAINING_MINUTES = 6.0
#: How far the number of actions in a tenth of the rows may be from the predicted one.
DECILE_PERCENT = 100 / 3


def conclude(raw: Raw) -> Conclusion:
    summary: dict[str, float | None] = {"training of 10,000 requests, minutes": raw["training_minutes"]}
    claims = [
        Claim(
            f"training of 10,000 requests of `{DEFAULT}`", raw["training_minutes"], TRAINING_MINUTES, "min", "at_most"
        )
    ]
    tables = ["# How well each variant ranks, against boosted trees and without a sequence, and what it costs\n"]
    found = [_Found.of(name, measured) for name, measured in raw.items() if name != "training_minutes"]
    for one in found:
        summary |= one.summary()
        claims += one.claims()
        tables += one.tables()
    return Conclusion(summary, tuple(claims), "\n".join(tables), _chart(found) if found else None)


@dataclass(frozen=True, slots=True)
class Mean:
    """A lift in percent: the mean over seeds, of the value and of the ends of its 95% interval over users."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(found: Sequence[Paired]) -> Mean | None:
        """Return the mean of relative differences; None without any that has an interval."""
        ends = [
            (lift.value, lift.low, lift.high)
            for lift in (paired.lift_percent for paired in found)
            if lift.value is not None and lift.low is not None and lift.high is not None
        ]
        return Mean(*(float(np.mean(column)) for column in zip(*ends, strict=True))) if ends else None

    def __str__(self) -> str:
        return f"{self.value:+.1f}% [{self.low:+.1f}, {self.high:+.1f}]"


@dataclass(frozen=True, slots=True)
class _Found:
    """What was measured on one dataset."""

    name: str
    save: str
    evaluations: tuple[Evaluation, ...]
    latency_ms: Mapping[str, list[float]]

    @staticmethod
    def of(name: str, measured: Mapping[str, Any]) -> _Found:
        read = TypeAdapter(Evaluation).validate_python
        evaluations = tuple(read(evaluation) for evaluation in measured["evaluations"])
        return _Found(name, measured["save"], evaluations, measured["latency_ms"])

    @property
    def heads(self) -> list[str]:
        return [head.head for head in self.evaluations[0].heads]

    def p50_ms(self, subject: str) -> float:
        return float(np.median(self.latency_ms[subject]))

    def over_base(self, subject: str) -> float:
        return 100 * (self.p50_ms(subject) / self.p50_ms(BASE) - 1)

    def against(self, subject: str, baseline: str, head: str, order: str = "head") -> Mean | None:
        """Return the lift of a subject over a baseline."""
        found = [
            getattr(c, f"by_{order}")
            for evaluation in self.evaluations
            for c in evaluation.comparisons
            if (c.scorer, c.baseline, c.head) == (subject, baseline, head)
        ]
        return Mean.of([paired for paired in found if paired is not None])

    def scores(self, subject: str, head: str) -> list[HeadScore]:
        """Return the score of each seed."""
        return [
            score for one in self.evaluations for score in one.scores if (score.scorer, score.head) == (subject, head)
        ]

    def hit(self, subject: str, head: str, order: str) -> tuple[float, float, float] | None:
        """Return HIT@3 and the ends of its interval, as means over seeds."""
        hits = [getattr(score, f"hit_at_3_by_{order}") for score in self.scores(subject, head)]
        means = [hit.mean for hit in hits if hit is not None and hit.mean.value is not None]
        if not means:
            return None
        return tuple(  # type: ignore[return-value]
            float(np.mean([mean.value if getattr(mean, end) is None else getattr(mean, end) for mean in means]))
            for end in ("value", "low", "high")
        )

    def by_utility(self, subject: str) -> Mean | None:
        """Return the lift over the base on the strongest action, in the order of the utility."""
        ends = [
            (lift.value, lift.low, lift.high)
            for score in self.scores(subject, self.save)
            if score.hit_at_3_by_utility is not None and (lift := score.hit_at_3_by_utility.lift_percent) is not None
            if lift.value is not None and lift.low is not None and lift.high is not None
        ]
        return Mean(*(float(np.mean(column)) for column in zip(*ends, strict=True))) if ends else None

    def worst_decile(self, subject: str) -> float | None:
        """Return the largest error of a tenth of the rows, in percent, over heads and seeds."""
        worst = [score.worst_decile for head in self.heads for score in self.scores(subject, head)]
        return max((100 * abs(decile.off or 0) for decile in worst if decile is not None), default=None)

    def summary(self) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for subject in self.latency_ms:
            found[f"{self.name}, {subject}, P50 ms"] = self.p50_ms(subject)
            for head in self.heads:
                lift = self.against(subject, TREES, head)
                found[f"{self.name}, {subject}, HIT@3 {head} by head over LightGBM %"] = (
                    None if lift is None else lift.value
                )
            found[f"{self.name}, {subject}, worst decile %"] = self.worst_decile(subject)
        return found

    def claims(self) -> list[Claim]:
        over_trees = [lift for head in self.heads if (lift := self.against(DEFAULT, TREES, head)) is not None]
        over_dot = [lift for head in self.heads if (lift := self.against(DEFAULT, DOT_PRODUCT, head)) is not None]
        lift = self.by_utility(DEFAULT)
        subject = f"{self.name}, `{DEFAULT}`"
        return [
            Claim(
                f"{subject}: HIT@3 by head over LightGBM, high end of the interval, lowest of {len(over_trees)} heads",
                min((one.high for one in over_trees), default=None), 0.0, "%", "at_least",
            ),
            Claim(
                f"{subject}: HIT@3 by head over LightGBM, mean of heads",
                float(np.mean([one.value for one in over_trees])) if over_trees else None,
                OVER_TREES_PERCENT, "%", "at_least",
            ),
            Claim(
                f"{subject}: HIT@3 by head over the dot product, the lowest of {len(over_dot)} heads",
                min((one.value for one in over_dot), default=None), 0.0, "%", "at_least",
            ),
            Claim(
                f"{subject}: HIT@3 {self.save} by utility over the base",
                None if lift is None else lift.value, LIFT_PERCENT, "%", "at_least",
            ),
            Claim(
                f"{subject}: worst decile of all heads", self.worst_decile(DEFAULT), DECILE_PERCENT, "%", "at_most"
            ),
        ]  # fmt: skip

    def tables(self) -> list[str]:
        """Return the tables of the dataset: by head against LightGBM, and by utility against the base."""
        requests = self.evaluations[0].requests
        rows, utility = [], []
        for subject in self.latency_ms:
            latency = f"{self.p50_ms(subject):.2f} ms, {self.over_base(subject):+.0f}%"
            lifts = [self.against(subject, TREES, head) for head in self.heads]
            rows.append([f"`{subject}`", *("-" if lift is None else str(lift) for lift in lifts), latency])
            hits = [self.hit(subject, head, "utility") for head in self.heads]
            lift, worst = self.by_utility(subject), self.worst_decile(subject)
            utility.append(
                [
                    f"`{subject}`",
                    *("-" if hit is None else f"{hit[0]:.3f}" for hit in hits),
                    "-" if lift is None else str(lift),
                    "-" if worst is None else f"{worst:.0f}%",
                ]
            )
        return [
            markdown_table(
                f"{self.name}: HIT@3 in each head's own order over LightGBM's, {requests:,} requests",
                ["variant", *self.heads, f"P50 of {CANDIDATES} candidates"],
                rows,
            ),
            markdown_table(
                f"{self.name}: HIT@3 in the utility's order",
                ["variant", *self.heads, f"{self.save} over the base", "worst decile"],
                utility,
            ),
        ]


def _chart(found: Sequence[_Found]) -> bytes:
    """Draw quality over latency, as SVG: HIT@3 of the strongest action by utility, with its 95% interval over users."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2 * -(-len(found) // 2)), layout="constrained")
        axes = figure.subplots(-(-len(found) // 2), 2, squeeze=False).flatten()
        for axis, one in zip(axes, found, strict=False):
            for place, subject in enumerate(one.latency_ms):
                if (hit := one.hit(subject, one.save, "utility")) is None:
                    continue
                mean, low, high = hit
                axis.errorbar(
                    [one.p50_ms(subject)],
                    [mean],
                    [[mean - low], [high - mean]],
                    color=COLOURS[place % len(COLOURS)],
                    marker=MARKERS[place % len(MARKERS)],
                    label=subject,
                )
            axis.set_title(f"{one.name}: {one.save}")
            axis.set_xlabel(f"P50 of {CANDIDATES} candidates, ms")
            axis.set_ylabel("HIT@3 by utility")
        axes[0].legend(fontsize=7)
        for axis in axes[len(found) :]:
            axis.set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
