"""The charts of an evaluation, as SVG. Matplotlib comes with the train extra.

Each scorer has its own colour and marker. The colours are Okabe and Ito's, which colour-blind readers can distinguish;
the markers help in print.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ranker.evaluation.bootstrap import Estimate
from ranker.evaluation.metrics import TOP
from ranker.evaluation.results import POPULARITY, Evaluation, HeadFacts, Hit

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "svg.fonttype": "path",  # independent of installed fonts
    "svg.hashsalt": "pinrank",  # equal numbers give equal bytes
}
_ORDERS = ("utility", "head")
_COLUMNS_MAX = 4
#: Bins with fewer rows are mostly noise and are not drawn; the numbers include them.
ROWS_DRAWN_MIN = 10
WIDTH_INCHES = 10.0


def lift_chart(evaluation: Evaluation) -> str | None:
    """Draw the relative lift of HIT@3 per head with its interval, by utility and by head; None if there is no lift."""
    scorers = [s.name for s in evaluation.scorers if s.name != evaluation.baseline]
    hits = {(s.scorer, s.head): s for s in evaluation.scores}
    lifts: dict[tuple[str, str, str], Estimate] = {}
    for (scorer, head), score in hits.items():
        for order in _ORDERS:
            lift = _lift(getattr(score, f"hit_at_{TOP}_by_{order}"))
            if lift is not None and scorer in scorers:
                lifts[order, scorer, head] = lift
    orders = [order for order in _ORDERS if any(key[0] == order for key in lifts)]
    if not orders:
        return None
    with mpl.rc_context(STYLE):
        height = 1.2 + 0.28 * len(evaluation.heads) * (len(scorers) + 1)
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        panels = figure.subplots(1, len(orders), sharey=True, squeeze=False)[0]
        for panel, order in zip(panels, orders, strict=True):
            panel.axvline(0, color="#555555", linewidth=1)
            for place, scorer in enumerate(scorers):
                offset = (place - (len(scorers) - 1) / 2) / (len(scorers) + 1)
                drawn = [
                    (row + offset, lifts[order, scorer, head.head])
                    for row, head in enumerate(evaluation.heads)
                    if (order, scorer, head.head) in lifts
                ]
                _points(panel, drawn, evaluation, scorer, sideways=True)
            panel.set_title("final order (by utility)" if order == "utility" else "order by the head's own probability")
            panel.set_xlabel(f"lift of HIT@{TOP} over {evaluation.baseline}, %")
            panel.grid(visible=False, axis="y")
        panels[0].set_yticks(
            range(len(evaluation.heads)), [_head_label(head, "lower is better by utility") for head in evaluation.heads]
        )
        panels[0].set_ylim(len(evaluation.heads) - 0.5, -0.5)
        _legend(figure, panels[0])
        return svg(figure)


def reliability_chart(evaluation: Evaluation) -> str | None:
    """Draw observed shares over predicted probabilities, one panel per head; None if no bundle has probabilities."""
    scores = [score for score in evaluation.scores if score.reliability]
    heads = [head for head in evaluation.heads if any(score.head == head.head for score in scores)]
    if not heads:
        return None
    with mpl.rc_context(STYLE):
        figure, panels = panel_grid(len(heads), 2.5)
        for panel, head in zip(panels, heads, strict=True):
            top = 0.0
            for score in (score for score in scores if score.head == head.head):
                bins = [b for b in score.reliability if b.count >= ROWS_DRAWN_MIN]
                if not bins:
                    continue
                said = [100 * b.mean_probability for b in bins]
                came = [100 * b.observed_share for b in bins]
                counts = np.array([b.count for b in bins], float)
                look = _look(evaluation, score.scorer)
                panel.plot(said, came, color=look["color"], linewidth=1, alpha=0.6)
                sizes = 8 + 70 * np.sqrt(counts / counts.max())
                panel.scatter(said, came, s=sizes, alpha=0.85, linewidths=0, label=score.scorer, **look)
                top = max(top, *said, *came)
            limit = max(top, 1e-3) * 1.08
            panel.plot([0, limit], [0, limit], color="#555555", linewidth=1, linestyle=(0, (4, 3)))
            panel.set(xlim=(0, limit), ylim=(0, limit), aspect="equal", title=head.head)
            panel.set_xlabel("mean predicted probability, %")
        panels[0].set_ylabel("observed share, %")
        _legend(figure, panels[0])
        return svg(figure)


def slice_chart(evaluation: Evaluation) -> str | None:
    """Draw HIT@3 by slice of users with its interval, one panel per head; by utility if every bundle has one."""
    order = "head" if any(scorer.utility_missing is not None for scorer in evaluation.scorers) else "utility"
    spans = [span for span in evaluation.slices if span.requests]
    heads = [head for head in evaluation.heads if head.requests]
    scorers = [scorer.name for scorer in evaluation.scorers]
    if not heads:
        return None
    with mpl.rc_context(STYLE):
        figure, panels = panel_grid(len(heads), 2.7)
        for panel, head in zip(panels, heads, strict=True):
            for place, scorer in enumerate(scorers):
                offset = (place - (len(scorers) - 1) / 2) / (len(scorers) + 1)
                drawn: list[tuple[float, Estimate]] = []
                for score in evaluation.slice_scores:
                    hit: Hit | None = getattr(score, f"hit_at_{TOP}_by_{order}")
                    if (score.scorer, score.head) != (scorer, head.head) or hit is None or hit.mean.value is None:
                        continue
                    drawn.append(([span.name for span in spans].index(score.slice) + offset, hit.mean))
                _points(panel, drawn, evaluation, scorer, sideways=False)
            panel.set_xticks(range(len(spans)), [f"{s.name}\n{s.requests:,} req." for s in spans])
            panel.set_xlim(-0.5, len(spans) - 0.5)
            panel.set_ylim(bottom=0)
            panel.grid(visible=False, axis="x")
            panel.set_title(_head_label(head, "lower is better") if order == "utility" else head.head)
        panels[0].set_ylabel(f"HIT@{TOP} by {order}, pins of {TOP}")
        _legend(figure, panels[0])
        return svg(figure)


def _lift(hit: Hit | None) -> Estimate | None:
    if hit is None or hit.lift_percent is None or hit.lift_percent.value is None:
        return None
    return hit.lift_percent


def _points(
    panel: Axes, drawn: Sequence[tuple[float, Estimate]], evaluation: Evaluation, scorer: str, *, sideways: bool
) -> None:
    """Draw estimates with their intervals at the given positions on the other axis."""
    if not drawn:
        return
    places = [place for place, _ in drawn]
    values = np.array([e.value for _, e in drawn], float)
    ends = np.array([(e.value if e.low is None else e.low, e.value if e.high is None else e.high) for _, e in drawn])
    # With few users, the value may lie outside its percentile interval; an error bar cannot be negative.
    bars = np.maximum(0, np.abs(ends.astype(float).T - values))
    look = _look(evaluation, scorer)
    x, y, along = (values, places, {"xerr": bars}) if sideways else (places, values, {"yerr": bars})
    panel.errorbar(
        x, y, label=scorer, color=look["color"], fmt=look["marker"], markersize=5, linewidth=1.4, capsize=2.5, **along
    )


def _look(evaluation: Evaluation, scorer: str) -> dict[str, Any]:
    """Return the colour and marker of a scorer, equal in every chart."""
    names = [s.name for s in evaluation.scorers if s.name != POPULARITY]
    place = names.index(scorer)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def _head_label(head: HeadFacts, direction: str) -> str:
    return f"{head.head}\n({direction})" if head.lower_is_better else head.head


def panel_grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels, at most four in a row, each so many inches high."""
    columns = min(count, _COLUMNS_MAX)
    rows = -(-count // columns)
    width = WIDTH_INCHES * max(columns, 2) / _COLUMNS_MAX
    figure = Figure(figsize=(width, 0.5 + height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def _legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), frameon=False)


def svg(figure: Figure) -> str:
    """Return a figure as text; equal figures give equal texts."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
