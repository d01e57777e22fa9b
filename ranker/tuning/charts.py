"""The Pareto fronts of a tuning as SVG."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.figure import Figure

from ranker.evaluation.charts import COLOURS, STYLE, svg
from ranker.tuning.results import TunedWeights


def front_chart(tuned: TunedWeights) -> str | None:
    """Draw the objective over each theta, and where the weights before and after are; None without fronts."""
    parties = [party for party in tuned.parties if tuned.fronts.get(party.party)]
    if not parties:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(5.0, min(10.0, 3.4 * len(parties))), 3.4), layout="constrained")
        panels = figure.subplots(1, len(parties), squeeze=False)[0]
        for panel, party in zip(panels, parties, strict=True):
            points = tuned.fronts[party.party]
            thetas, objectives = [p.theta for p in points], [p.objective for p in points]
            panel.plot(thetas, objectives, color=COLOURS[0], marker=".", label="most that is possible")
            panel.axvline(party.theta, color="#555555", linestyle=(0, (4, 3)), linewidth=1)
            panel.plot(
                [party.before.value], [tuned.before], "s", color=COLOURS[1], markersize=7, label="weights in force"
            )
            panel.plot(
                [party.after.value], [tuned.deployed], "o", color=COLOURS[2], markersize=7, label="tuned weights"
            )
            panel.set(xlabel=f"{party.party}, at least per request", title=party.party)
        panels[0].set_ylabel("objective per request")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
        return svg(figure)
